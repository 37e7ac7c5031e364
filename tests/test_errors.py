"""What is said of exceptions that a person can do something about, and what may fail without failing a run."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lab.errors import UserError, explain, forgiving, naming
from lab.files import replace_file
from lab.tasks import text_report
from lab.tasks.language import LanguageModel
from lab.train import plots
from tests.conftest import ROOT


@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, "No space left on device. Free some space"), (errno.EFBIG, "File too large. Raise the limit on the"),
    (errno.EMFILE, "x.json cannot be opened: Too many open files. Raise the limit"), (errno.EISDIR, "Is a directory"),
    (errno.EROFS, "Read-only file system"), (errno.EDQUOT, "quota")])
def test_what_the_system_refuses_is_one_sentence_with_the_file(number, words):
    status, sentence = explain(OSError(number, os.strerror(number), "x.json"))
    assert status == 2 and "x.json" in sentence and words in sentence and "\n" not in sentence


@pytest.mark.parametrize("error", [
    MemoryError(), ImportError("a.so: failed to map segment from shared object"),
    RuntimeError("can't start new thread"), RuntimeError("std::bad_alloc")])
def test_no_memory(error):
    assert "There is not enough memory" in explain(error)[1]


def test_a_mistake_of_the_program_is_a_traceback():
    for error in (ValueError("x"), RuntimeError("x"), ImportError("x"), FileNotFoundError(2, "x", "y")):
        assert explain(error) is None
    assert explain(UserError("x")) == (2, "x") and explain(BrokenPipeError()) == (141, "")


def test_the_device_has_too_little_memory():
    status, sentence = explain(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore"))
    assert status == 2 and "--grad-accum-steps" in sentence and "more" not in sentence.partition(").")[0]


def test_a_file_that_cannot_be_written_to_is_named(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError) as caught, naming(tmp_path / "a.json"), open("/dev/full", "w") as full:
        full.write("x")
        full.flush()
    assert caught.value.filename == str(tmp_path / "a.json")


def test_forgiving(caplog):
    with caplog.at_level(logging.WARNING, "lab"), forgiving("The picture"):
        raise ValueError("first line\nsecond line")
    assert [r.getMessage() for r in caplog.records] == ["warning: The picture failed: ValueError: first line"]
    with pytest.raises(KeyboardInterrupt), forgiving("The picture"):
        raise KeyboardInterrupt


def test_names_that_are_no_text_are_written_with_escapes(tmp_path):
    replace_file(tmp_path / "report.txt", "class caf\udce9: \u2713\n")
    assert (tmp_path / "report.txt").read_bytes() == "class caf\\udce9: \u2713\n".encode()


def test_pictures_do_not_need_the_backend_of_a_notebook(tmp_path):
    """matplotlib itself refuses to be imported with a backend that is not there (the negative control)."""
    env = os.environ | {"MPLBACKEND": "module://no_such_backend", "PYTHONPATH": str(ROOT)}
    code = "import os\n{}\nassert os.environ['MPLBACKEND'] == 'module://no_such_backend'"
    ours = ("import numpy, pathlib; from lab.train import plots\n"
            "plots.confusion(numpy.eye(2), 'ab', pathlib.Path('c.png'))")
    theirs = "import matplotlib.pyplot as p; p.figure().savefig('d.png')"
    found = [subprocess.run([sys.executable, "-c", code.format(body)], env=env, cwd=tmp_path).returncode
             for body in (ours, theirs)]
    assert found[0] == 0 and found[1] != 0 and (tmp_path / "c.png").stat().st_size > 1000


def test_a_picture_that_fails_is_a_warning(tmp_path, caplog):
    (tmp_path / "plots").write_text("a file")
    with caplog.at_level(logging.WARNING, "lab"):
        plots.confusion(np.eye(2), "ab", tmp_path / "plots" / "confusion.png")
    assert len(caplog.records) == 1 and "The picture confusion.png failed" in caplog.records[0].getMessage()


def test_samples_and_comparisons_fail_alone(tmp_path, monkeypatch, caplog):
    """xz without memory leaves the samples, samples that cannot be drawn leave the comparison."""
    tokens = np.zeros((4, 9), np.int32)

    class Records:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
            return {"tokens": tokens[chosen]}

    data = SimpleNamespace(validation=Records(), validation_bytes=lambda most: b"text " * 100,
                           decode=lambda ids: "text")
    outcome = SimpleNamespace(model=SimpleNamespace(context=8), compute=None, data=data, folder=tmp_path, seed=0,
                              variables={"params": {}}, means={"bits_per_byte": 2.0})
    monkeypatch.setattr("lab.models.generate.sample_texts", lambda *args, **kwargs: [" goes on"])
    whole = LanguageModel(samples=1).artifacts(outcome)
    assert len(whole) == 3 and "xz -9" in whole[0] and whole[2] == "  | text goes on"

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    with caplog.at_level(logging.WARNING, "lab"):
        with monkeypatch.context() as patch:
            patch.setattr(text_report.lzma, "compress", fail)
            assert LanguageModel(samples=1).artifacts(outcome) == whole[1:]
        monkeypatch.setattr("lab.models.generate.sample_texts", fail)
        assert LanguageModel(samples=1).artifacts(outcome) == whole[:1]
    assert len(caplog.records) == 2


def test_every_text_file_names_its_encoding():
    """Whatever the locale. `open` without one would ask it."""
    import ast

    missing = []
    for path in sorted((ROOT / "lab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and not encoded(node):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not missing


def encoded(call) -> bool:
    import ast

    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(getattr(call.func, "value", None), "id", "")
    words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute):
        return any(k.arg == "encoding" for k in call.keywords) or "utf-8" in words or len(call.args) > (name[0] == "w")
    if name == "open" and owner not in ("os", "Image", "gzip", "tarfile", "zipfile", "io"):
        modes = [w for w in words if w and set(w) <= set("rwaxbt+")]
        opens = modes or (isinstance(call.func, ast.Name) and call.args)
        return not opens or any("b" in w for w in modes) or any(k.arg == "encoding" for k in call.keywords)
    return True


def test_the_rule_of_encodings_sees_a_violation():
    import ast

    for good in ("p.read_text('utf-8')", "open(f, 'rb')", "open(f, encoding='utf-8')", "p.open('xb')", "s.open()",
                 "p.write_text(t, 'utf-8')", "os.open(p, 1)"):
        assert encoded(ast.parse(good).body[0].value), good
    for bad in ("p.read_text()", "open(f)", "open(f, 'w')", "p.open('a')", "p.write_text(t)"):
        assert not encoded(ast.parse(bad).body[0].value), bad


def test_a_limit_of_the_shell_is_a_sentence(tmp_path):
    from tests.test_cli import furnished

    command = f"ulimit -f 1; exec {sys.executable} -m lab small.py --run-dir run"
    done = subprocess.run(["bash", "-c", command], cwd=furnished(tmp_path), env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be written" in done.stderr and "(ulimit -f)" in done.stderr
