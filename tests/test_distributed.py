"""Several processes: who is missing, who differs, who died; stopping together; going on with another number of them.

What needs no JAX runs on `lab.parallel.channel` alone, in processes that start in 0.1 s.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path

import pytest

from lab.configuration.values import flat
from lab.errors import UserError
from lab.experiment import Checkpoint, Mesh
from lab.parallel.channel import OTHER, ZERO, _Link, _servers
from lab.parallel.local_processes import devices_of
from lab.parallel.processes import Launch, find_launch, visible_gpus
from lab.parallel.shared_secret import new_secret, shared_secret
from lab.tasks.language import LanguageModel
from lab.train import ending, loop
from lab.train.experiment_file import load
from lab.train.metrics import read_rows
from lab.train.run_folder import checkpoint_folder
from tests.conftest import ROOT
from tests.launching import free_port
from tests.test_cli import furnished
from tests.test_loop import Quiet
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

LIMIT = 120  # seconds after which a process that should have ended is a failure


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with small.py and its text."""
    return furnished(tmp_path_factory.mktemp("processes"))


def start(place: Path, *words: str, devices: int = 2, **variables: object) -> subprocess.Popen:
    """`python -m lab WORDS` in `place`, piped, with compiled programs kept for the next one."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "LAB_PLATFORM": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "LAB_START_SECONDS": "60",
        "JAX_COMPILATION_CACHE_DIR": str(place / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen([sys.executable, "-P", "-m", "lab", *words], cwd=place, text=True, stdout=subprocess.PIPE,
                            env=env | {k: str(v) for k, v in variables.items()}, stderr=subprocess.PIPE)


def pair(place: Path, *words: str, second: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    """Two processes of one run, started as a launcher would; `second`: what only process 1 gets."""
    port = free_port()
    each = [dict(LAB_COORDINATOR=f"127.0.0.1:{port}", LAB_PROCESSES=2, LAB_PROCESS_ID=k) for k in range(2)]
    return [start(place, *words, **each[0]), start(place, *words, *second, **each[1])]


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    limit = time.monotonic() + LIMIT
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def steps_of(folder: Path) -> list[int]:
    """The steps of the committed checkpoints."""
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def last_step(folder: Path) -> int:
    rows = read_rows(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


# -------------------------------------------------------------------------------------------------------- whole runs


def test_eight_devices_then_one_then_two_processes(place, monkeypatch):
    """8 devices, stopped; 1 device, stopped; 2 processes x 2, one of them told to stop, and again to the end."""
    experiment = load(place / "small.py").experiment
    experiment = replace(experiment, steps=30, task=LanguageModel(samples=0),
                         checkpoint=Checkpoint(every=0, best=False))
    monkeypatch.setattr(ending.plots, "curves", lambda *_: [])
    folder, whole = place / "elastic", place / "whole"
    with Quiet() as screen:
        assert loop.train(experiment, whole, screen, place / "small.py") == 0
    for devices, at in ((8, 3), (1, 3)):
        stop = Quiet(at=at, action=lambda: os.kill(os.getpid(), signal.SIGTERM))
        with stop as screen:
            part = replace(experiment, mesh=Mesh(data=devices))
            assert loop.train(part, folder, screen, place / "small.py") == 75
    before = steps_of(folder)[-1]
    assert 6 <= before < 16
    words = ("small.py", "--run-dir", str(folder), "--steps", "30", "--checkpoint.every", "0", "--checkpoint.no-best",
             "--task.samples", "0")

    processes = pair(place, *words)
    wait_for(lambda: last_step(folder) >= before + 2, *processes)
    processes[1].send_signal(signal.SIGTERM)  # the other one gets no signal
    first, second = (finish(p) for p in processes)
    assert (first[0], second[0]) == (75, 75), first[2] + second[2]
    saved = steps_of(folder)[-1]
    assert before + 2 <= saved < 30
    assert f"Resuming from step {before} of 30" in first[1]
    assert f"SIGTERM: saved after step {saved} of 30" in first[1]
    logs = [(folder / "logs" / f"process-{k}.txt").read_text() for k in range(2)]
    assert all(f"SIGTERM: saved after step {saved} of 30" in log for log in logs)
    assert second[1] == ""  # only process 0 talks

    status, out, err = finish(start(place, "--processes", "2x2", *words))
    assert status == 0, err
    assert f"Resuming from step {saved} of 30" in out and "4 x cpu (cpu) in 2 processes" in out
    assert err == "" and "Gloo" not in out
    rows, wanted = read_rows(folder / "metrics.jsonl"), read_rows(whole / "metrics.jsonl")
    assert [(r["step"], r["split"]) for r in rows] == [(r["step"], r["split"]) for r in wanted]
    for name in ("loss", "accuracy"):
        assert [r[name] for r in rows] == pytest.approx([r[name] for r in wanted], abs=1e-5)
    assert abs(wanted[-1]["loss"] - wanted[-2]["loss"]) > 1e-5  # a run shifted by one update would be seen
    result = json.loads((folder / "result.json").read_text())
    assert result["final"]["loss"] == pytest.approx(wanted[-1]["loss"], abs=1e-5)
    assert (folder / "plots" / "loss.png").exists()


def test_exact_updates_do_not_depend_on_the_processes(place):
    """All but the evaluations, whose sums are not exact; without --exact already an early row differs."""
    words = ("small.py", "--steps", "6", "--evaluate.every", "0")
    found = {}
    for exact in ((), ("--exact",)):
        for many in ((), ("--processes", "2x2")):
            folder = place / f"exact-{len(exact)}-{len(many)}"
            status, _, err = finish(start(place, *many, *words, *exact, "--run-dir", str(folder), devices=1))
            assert status == 0, err
            found[exact, many] = [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "train"]
    assert len(found[("--exact",), ()]) == 6 and found[("--exact",), ()] == found[("--exact",), ("--processes", "2x2")]
    assert found[(), ()] != found[(), ("--processes", "2x2")]  # negative control


def test_killed(place):
    """kill -9 of one of two: the other ends at once, says which it was, and so does the parent."""
    folder = place / "killed"
    parent = start(place, "--processes", "2", "small.py", "--run-dir", str(folder), "--steps", "2000", devices=2)
    wait_for(lambda: last_step(folder) >= 3, parent)
    log = folder / "logs" / "process-1.txt"
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True).stdout
    children = [int(pid) for pid in found.split()]
    environs = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    one = next(pid for pid, environ in environs.items() if b"LAB_PROCESS_ID=1" in environ)
    begin = time.monotonic()
    os.kill(one, signal.SIGKILL)
    status, _, err = finish(parent)
    assert status == 1
    assert time.monotonic() - begin < 15
    assert re.search(rf"error: Process 1 \(.*pid {one}\) ended without a word", err), err
    assert "error: Process 1 was ended by SIGKILL." in err
    assert "Traceback" not in err
    assert log.exists()


def test_process_0_is_killed(place):
    """The one that coordinates: Gloo, gRPC and JAX all fail in the survivor, which says one sentence."""
    folder = place / "killed-0"
    parent = start(place, "--processes", "2", "small.py", "--run-dir", str(folder), "--steps", "2000", devices=2)
    wait_for(lambda: last_step(folder) >= 3, parent)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True).stdout
    environs = {int(pid): Path(f"/proc/{int(pid)}/environ").read_bytes() for pid in found.split()}
    os.kill(next(pid for pid, environ in environs.items() if b"LAB_PROCESS_ID=0" in environ), signal.SIGKILL)
    status, _, err = finish(parent)
    assert status == 1
    assert err.count("\n") == 2, err
    survivor, own = err.splitlines()
    assert re.match(r"\[1\] error: Process 0 \(.*\) ended without a word .* resumes from the last checkpoint", survivor)
    assert own == "error: Process 0 was ended by SIGKILL."


def ends(processes: list[subprocess.Popen], status: int = 2) -> str:
    """All end with the status and without a traceback; returns what they printed to stderr."""
    ended = [finish(p) for p in processes]
    said = "".join(err for _, _, err in ended)
    assert [code for code, _, _ in ended] == [status] * len(ended), said
    assert "Traceback" not in said
    return said


FAMILY = """
import subprocess, sys
from lab.parallel import local_processes as local
bodies = "import os; os.kill(os.getpid(), 9)", "import sys, time; time.sleep(0.5); sys.exit('why')"
real = subprocess.Popen
local.subprocess.Popen = lambda words, env, **how: real(
    [sys.executable, "-c", bodies[int(env["LAB_PROCESS_ID"])]], env=env, **how)
sys.exit(local._Family(["x.py"], 2, None).wait())
"""


def test_the_parent_speaks_last():
    """However late a survivor says why, the parent's own line about the signal comes after it."""
    ended = subprocess.run([sys.executable, "-c", FAMILY], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                           capture_output=True)
    assert (ended.returncode, ended.stderr) == (1, "[1] why\nerror: Process 0 was ended by SIGKILL.\n")


def test_different_flags(place):
    begin = time.monotonic()
    said = ends(pair(place, "small.py", second=("--optim.lr.peak", "0.02")))
    assert re.search(r"error: Process 1 \(.*\): --optim.lr.peak is 0.02 there and 0.01 in process 0\. Start all", said)
    assert time.monotonic() - begin < 60
    assert not (place / "runs").exists()


CODE = """
    from pathlib import Path
    from lab.parallel import processes as distributed
    processes = distributed.Processes(distributed.Launch("test", "", 0, 3, process), channel)
    if process == 2:
        distributed.ROOT = Path({root!r})
    try:
        processes.check_same(distributed.code_version(Path({file!r})), "Bring all machines to the same code.")
        processes.gather(None)
    except UserError as e:
        processes.leave(2, str(e))
    channel.gather(None, last=True)
"""


def test_different_code(place, tmp_path):
    shutil.copytree(ROOT / "lab", tmp_path / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    body = CODE.format(root=str(tmp_path), file=str(place / "small.py"))
    assert ends(talk(body), 0) == ""
    with (tmp_path / "lab/train" / "step.py").open("a") as file:
        file.write("# changed\n")
    said = ends(talk(body))
    assert re.search(
        r"error: Process 2 \(.*\): the file lab/train/step.py is \w+ there and \w+ in process 0\. Bring", said
    )


def test_a_mistake_that_all_make(place):
    status, _, err = finish(start(place, "--processes", "2x2", "small.py", "--batch", "6"))
    assert status == 2
    assert re.search(r"error: .*--batch 6 is not divisible by 4 devices", err), err
    assert err.count("error:") == 1


def test_a_bucket_needs_packages(tmp_path):
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed; without a network it takes 50 s to give up")
    with pytest.raises(UserError, match="LAB_EXTRAS=bucket"):
        checkpoint_folder(tmp_path, "gs://a-bucket/run")


# ------------------------------------------------------------------------------------------------------- the channel


CHANNEL = textwrap.dedent("""
    import signal, sys, time
    from lab.parallel.channel import Channel
    from lab.errors import UserError
    port, process, processes, seconds, silence = int(sys.argv[1]), *map(int, sys.argv[2:4]), *map(float, sys.argv[4:6])
    try:
        channel = Channel("127.0.0.1", port, process, processes, seconds, silence)
    except UserError as e:
        sys.exit(f"error: {e}")
    print("started", flush=True)
""")


def talk(body: str, *, count: int = 3, absent: tuple[int, ...] = (), seconds: float = 20, silence: float = 20
         ) -> list[subprocess.Popen]:
    """Processes that know `channel` and `process` and do `body`."""
    port = str(free_port())
    script = CHANNEL + textwrap.dedent(body)
    return [subprocess.Popen([sys.executable, "-c", script, port, str(k), str(count), str(seconds), str(silence)],
                             env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for k in range(count) if k not in absent]


def test_who_is_missing():
    processes = talk("", count=4, absent=(1, 3), seconds=2)
    assert "Processes 1, 3 of 4 did not arrive at 127.0.0.1:" in ends(processes)
    assert "within 2 s" in ends(talk("", count=2, absent=(1,), seconds=2))


def test_no_process_0():
    status, _, err = finish(talk("", count=2, absent=(0,), seconds=1)[0])
    assert status == 1  # of sys.exit in the script
    assert re.search(r"Process 1 did not reach process 0 at 127.0.0.1:\d+ within 1 s \(Connection refused\)", err)


@pytest.mark.parametrize("says, words", [
    (b"", r"did not reach process 0 at 127.0.0.1:\d+ within 1 s .it does not answer"),
    (b"SSH-2.0-x\r\n", "is not process 0 of this run, or has another secret"),
])
def test_what_is_not_process_0(says, words, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(sys.modules[__name__], "free_port", lambda: server.getsockname()[1])
        process, = talk("", count=2, absent=(0,), seconds=1, silence=1)
        connection = server.accept()[0]
        connection.sendall(says)
        assert re.search(words, finish(process)[2])
        connection.close()


def test_gather():
    processes = talk("""
        print(channel.gather({'k': process}), channel.gather(process == 0), flush=True)
        channel.gather(None, last=True)
    """)
    for process in processes:
        assert finish(process)[1].splitlines()[1] == "[{'k': 0}, {'k': 1}, {'k': 2}] [True, False, False]"


STEPS = """
    caught, step = [], 0
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    while not channel.stopping(caught[0] if caught else None):
        step += 1
        if step == 6:
            print("under way", flush=True)
        time.sleep(0.001 * (process + 1))
        {sync}
    print(step, len(caught), flush=True)
    channel.gather(None, last=True)
"""


@pytest.mark.parametrize("sync", ["channel.gather(None)", "pass"], ids=["in step", "free"])
@pytest.mark.parametrize("who", [(0,), (2,), (0, 1, 2)])
def test_all_stop_at_the_same_call(sync, who):
    processes = talk(STEPS.format(sync=sync))
    for process in processes:
        assert [process.stdout.readline() for _ in range(2)] == ["started\n", "under way\n"]
    for k in who:
        processes[k].send_signal(signal.SIGTERM)
    found = [finish(process) for process in processes]
    assert {code for code, _, _ in found} == {0}, found
    steps = {int(out.split()[0]) for _, out, _ in found}
    assert len(steps) == 1 and steps.pop() > 5
    assert [int(out.split()[1]) for _, out, _ in found] == [int(k in who) for k in range(3)]


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("number, how", [(signal.SIGKILL, "ended without a word"),
                                         (signal.SIGSTOP, "has not been heard of for 1 s")])
def test_one_that_dies_or_falls_silent(who, number, how):
    processes = talk("time.sleep(60)", silence=1)
    for process in processes:
        process.stdout.readline()
    processes[who].send_signal(number)
    begin = time.monotonic()
    others = [finish(p) for k, p in enumerate(processes) if k != who]
    assert time.monotonic() - begin < (0.9 if number == signal.SIGKILL else 5)
    assert {code for code, _, _ in others} == {1}
    said = [err for _, _, err in others]
    loud = said if who == 0 else said[:1]  # process 0 says it, if it is there
    assert all(re.search(rf"error: Process {who} \(.*\) {how}", err) for err in loud)
    assert who == 0 or said[1] == ""
    processes[who].kill()
    finish(processes[who])


def test_one_that_leaves_takes_the_others_with_it():
    processes = talk("channel.leave(2, 'The disk is full.') if process == 1 else time.sleep(60)")
    begin = time.monotonic()
    assert re.search(r"^error: Process 1 \(.*, pid \d+\): The disk is full\.$", ends(processes), re.MULTILINE)
    assert time.monotonic() - begin < 10
    assert ends(talk("channel.leave(75) if process == 2 else time.sleep(60)"), 75) == ""
    assert ends(talk("channel.leave(2, 'Late.', aloud=True) if process == 0 else time.sleep(60)")) == "error: Late.\n"


def test_strangers_and_wrong_numbers():
    """What is no process of this run is ignored; two with one number are an error."""
    processes = talk("print(channel.gather(1), flush=True); channel.gather(None, last=True)", absent=(1,))
    port = int(processes[0].args[3])
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        try:
            stranger = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            time.sleep(0.05)
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with contextlib.suppress(ConnectionResetError):
        assert stranger.recv(100) == b""
    script, words = processes[0].args[2], processes[0].args[4:]
    late = subprocess.Popen([sys.executable, "-c", script, str(port), "1", *words[1:]], text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert [finish(p)[0] for p in (*processes, late)] == [0, 0, 0]
    processes = talk("time.sleep(60)", absent=(2,))
    script, port, words = processes[1].args[2], processes[1].args[3], processes[1].args[4:]
    twin = subprocess.Popen([sys.executable, "-c", script, port, *words], text=True, stdout=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    assert "each with a number of its own" in ends([*processes, twin])


def connected(processes: list[subprocess.Popen]) -> _Link:
    """A connection to process 0, as soon as it listens."""
    wait_for(lambda: listens(int(processes[0].args[3])), processes[0])
    return _Link(socket.create_connection(("127.0.0.1", int(processes[0].args[3])), timeout=10), 10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def join(link: _Link, process: int, processes: int, secret: bytes) -> None:
    """What a process says that has this secret."""
    deliver_challenge(link.connection, ZERO + secret)
    answer_challenge(link.connection, OTHER + secret)
    link.send(process=process, processes=processes, name=f"number {process}")


def test_whoever_has_not_the_secret_is_a_stranger(monkeypatch):
    """It may say that it is process 1, and what it says is not heard; nor does it learn anything."""
    ours, theirs = b"the secret of our run", b"the secret of another"
    monkeypatch.setenv("LAB_SECRET", ours.decode())
    processes = talk("", count=2, absent=(1,), seconds=4)
    mute = connected(processes)  # says nothing: nobody waits for it
    for secret in (theirs, b"", ours[:-1]):
        link = connected(processes)
        with pytest.raises(AuthenticationError):
            join(link, 1, 2, secret)
        with contextlib.suppress(OSError, EOFError):
            link.send(process=1, processes=2, name="a stranger")
            link.send(kind="end", status=0, sentence="stop")
            assert not link.connection.recv_bytes()
    with socket.create_connection(("127.0.0.1", int(processes[0].args[3])), timeout=10) as connection:
        connection.sendall(b"x" * 10_000)  # more than a challenge may have
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
    said = ends(processes)
    assert "Process 1 of 2 did not arrive" in said and "3 connections had another LAB_SECRET" in said
    assert ours.decode() not in said
    mute.connection.close()

    processes = talk("time.sleep(60)", count=2, absent=(1,))  # negative control
    link = connected(processes)
    join(link, 1, 2, ours)
    assert link.receive() == {"kind": "put", "key": "start", "value": True}
    link.connection.close()
    assert "error: Process 1 (number 1) ended without a word" in ends(processes, 1)


@pytest.mark.parametrize("keys", [(ZERO, OTHER), (ZERO, ZERO)], ids=["two keys", "one key"])
def test_process_0_does_not_answer_its_own_challenge(keys, monkeypatch):
    """A stranger hands what it is asked to a second connection. With one key for both sides it would get in."""
    monkeypatch.setenv("LAB_SECRET", "the secret of our run")
    script = "import lab.parallel.channel as c; c.ZERO, c.OTHER = {!r}, {!r}\n"
    monkeypatch.setattr(sys.modules[__name__], "CHANNEL", script.format(*keys) + CHANNEL)
    processes = talk("time.sleep(60)", count=2, absent=(1,), seconds=4)
    first, second = connected(processes), connected(processes)
    first.connection.send_bytes(b"#CHALLENGE#{sha256}" + b"0" * 40)
    first.connection.recv_bytes(256)
    first.connection.send_bytes(b"#WELCOME#")
    second.connection.send_bytes(first.connection.recv_bytes(256))  # what process 0 asks
    first.connection.send_bytes(second.connection.recv_bytes(256))
    assert first.connection.recv_bytes(256) == (b"#FAILURE#" if keys == (ZERO, OTHER) else b"#WELCOME#")
    assert "Process 1 of 2 did not arrive" in ends(processes)


def test_another_secret_is_a_sentence(tmp_path):
    """Machines without a common home folder; a process 0 that is not ours learns nothing and is believed nothing."""
    start = dict(os.environ)
    processes = []
    for k, secret in enumerate(("a" * 16, "b" * 16)):
        os.environ["LAB_SECRET"] = secret
        processes += talk("", count=2, absent=(1 - k,), seconds=3)
        if k == 0:
            port = processes[0].args[3]
        else:
            processes[1].kill()
            words = [*processes[1].args[:3], port, *processes[1].args[4:]]
            processes[1] = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.environ.clear()
    os.environ.update(start)
    first, second = map(finish, processes)
    assert second[0] == 1 and "has another secret" in second[2] and "set LAB_SECRET to the same" in second[2]
    assert "Process 1 of 2 did not arrive" in first[2] and "1 connections had another LAB_SECRET" in first[2]


def test_where_the_secret_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    assert shared_secret({"LAB_SECRET": "0123456789abcdef"}) == b"0123456789abcdef"
    with pytest.raises(UserError, match="LAB_SECRET has 5 characters"):
        shared_secret({"LAB_SECRET": "short"})
    own = shared_secret({})
    assert own == shared_secret({}) and len(own) == 64 and (tmp_path / "secret/key").stat().st_mode & 0o777 == 0o600
    assert new_secret({}) != new_secret({}) and new_secret({"LAB_SECRET": "mine"}) == "mine"
    (tmp_path / "secret/key").chmod(0o644)
    with pytest.raises(UserError, match="is not a file that only you can read"):
        shared_secret({})
    assert devices_and_secret("2") and devices_and_secret("2") != devices_and_secret("2")


def devices_and_secret(many: str) -> str:
    """LAB_SECRET as the processes of `--processes` get it: one for all of a run."""
    from lab.parallel import local_processes as local

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.subprocess, "Popen", lambda *_, env, **__: found.append(env["LAB_SECRET"]) or FakeChild())
        patch.setattr(local.signal, "signal", lambda *_: None)
        local._Family(["x.py"], int(many), None)
    assert len(set(found)) == 1 and len(found) == int(many)
    return found[0]


def test_every_launcher_hands_a_secret_on(tmp_path, monkeypatch):
    """By the environment or a file that only its owner reads, never on a command line."""
    from lab.launch import hosts, job, sky, slurm, tpu
    from lab.launch.options import Options

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAB_SECRET", raising=False)
    made = job.make_job(["experiments/gpt_char.py", "--checkpoint-dir", "gs://mine/x"], "--slurm")
    line = next(line for line in slurm.script(made, "--nodes=2").splitlines() if "LAB_SECRET" in line)
    found = [subprocess.run(["bash", "-c", f"{line.partition('; ')[2] or line}\nprintf %s \"$LAB_SECRET\""],
                            capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", secret) for secret in found) and found[0] != found[1]
    words = hosts.mpirun(["h1", "h2"], "true")
    assert words[words.index("-x") + 1] == "LAB_SECRET"
    assert "LAB_SECRET=$(cat launch/secret)" in tpu.script(made)
    runs = []
    monkeypatch.setattr(sky, "tool", lambda *_: "sky")
    monkeypatch.setattr(sky.subprocess, "run", lambda words, env: runs.append((words, env)) or FakeChild())
    sky.launch(Options(sky="--num-nodes 2 --gpus H100:8"), made)
    (words, env), = runs
    assert words[words.index("--env") + 1] == "LAB_SECRET" and len(env["LAB_SECRET"]) == 32
    assert env["LAB_SECRET"] not in " ".join(words) + (made.folder / "sky.yaml").read_text()


class FakeChild:
    """Stands for a process whose errors have ended."""

    stderr, returncode = (), 0


def test_listens_where_the_others_look_only():
    """At the coordinator's address; at all of this machine only where its own name says nothing of it."""
    def addresses(host: str) -> set[str]:
        found = _servers(host, 0)
        names = {server.getsockname()[0] for server in found}
        for server in found:
            server.close()
        return names

    assert addresses("127.0.0.1") == addresses("localhost") == {"127.0.0.1"}
    if socket.has_ipv6 and Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").read_text() == "0\n":
        assert addresses("::1") == {"::1"}
    everywhere = {"::"} if socket.has_dualstack_ipv6() else {"0.0.0.0"}
    assert addresses("198.51.100.7") == everywhere  # not here: a router's
    assert addresses("no-such-name.invalid") == everywhere
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing; asks which address leads out
        try:
            probe.connect(("198.51.100.7", 9))
        except OSError:
            return
        here = probe.getsockname()[0]
    assert addresses(here) == {here}


def test_process_0_says_why_though_not_all_are_there():
    """Others may end the run while process 0 still waits for one; only it says why."""
    processes = talk("", absent=(1, 2))
    links = [connected(processes) for _ in range(2)]
    for link in links:
        join(link, 1, 3, shared_secret())
    for link in links:
        while (told := link.receive())["kind"] == "ping":
            pass
        assert (told["kind"], told["status"]) == ("end", 2)
        link.connection.close()
    assert "each with a number of its own" in ends(processes)


# --------------------------------------------------------------------------------------------------------- launchers


def test_launchers():
    assert find_launch({}) is None
    assert find_launch({"LAB_COORDINATOR": "h:1", "LAB_PROCESSES": "1", "LAB_PROCESS_ID": "0"}) is None
    explicit = {"LAB_COORDINATOR": "[fe80::1]:90", "LAB_PROCESSES": "4", "LAB_PROCESS_ID": "3"}
    assert find_launch(explicit) == Launch("LAB_COORDINATOR", "fe80::1", 90, 4, 3)
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    assert find_launch(sky) == Launch("SkyPilot", "10.0.0.1", 8476, 2, 1)


@pytest.mark.parametrize("devices, gpus, local", [("", "1", None), ("0,1,2,3", "1", [0, 1, 2, 3]), ("3", "4", [0]),
                                                  ("0,1,2,3", "4(x2)", [1])])
def test_slurm(monkeypatch, devices, gpus, local):
    """JAX reads the process's environment itself. One task on a node drives all its GPUs, else each its own."""
    variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1",
                 "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": gpus, "CUDA_VISIBLE_DEVICES": devices}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = find_launch(os.environ)
    assert found == Launch("SLURM", "n1", 65535 - 2**12 + 1 + 7, 2, 1, local)


def test_open_mpi(monkeypatch):
    for name, value in {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.77.0.1,10.78.0.1:34911",
                        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
                        "OMPI_COMM_WORLD_LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    found = find_launch(os.environ)
    assert (found.launcher, found.host, found.processes, found.process) == ("Open MPI", "10.77.0.1", 2, 1)


@pytest.mark.parametrize("variables", [{"LAB_COORDINATOR": "h:1"}, {"LAB_PROCESS_ID": "0"},
                                       {"LAB_COORDINATOR": "h", "LAB_PROCESSES": "2", "LAB_PROCESS_ID": "0"},
                                       {"LAB_COORDINATOR": "h:1", "LAB_PROCESSES": "2", "LAB_PROCESS_ID": "2"}])
def test_variables_that_do_not_fit(variables):
    with pytest.raises(UserError, match="LAB_PROCESSES"):
        find_launch(variables)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "x"}


@pytest.mark.parametrize("left", [
    SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # `srun --pty bash` inside `salloc -n 4`
    {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")},  # a shell that salloc opened
    {name: value for name, value in SLURM.items() if "STEP" not in name},  # a script that sbatch started
    TPU | {"LAB_PLATFORM": "cpu"}, {"MEGASCALE_NUM_SLICES": "2", "LAB_PLATFORM": "gpu"},
    {"SKYPILOT_NUM_NODES": "1"}, {"SKYPILOT_NODE_IPS": "10.0.0.1"}, {"OMPI_COMM_WORLD_SIZE": "1"}, {"SLURM_NTASKS": ""},
])
def test_variables_that_are_left_over(monkeypatch, left):
    """Of an interactive shell, or of another job: this process is alone."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert find_launch(left) is None


@pytest.mark.parametrize("half, words", [
    ({n: v for n, v in SKY.items() if "IPS" not in n}, "SkyPilot seems to have started several processes, but SKYPILOT_"
     "NODE_IPS is not set .there are SKYPILOT_NODE_RANK, SKYPILOT_NUM_NODES.. If several"),
    (SKY | {"SKYPILOT_NODE_RANK": "first"}, "SKYPILOT_NODE_RANK=first must be a number of at least 0. If several"),
    (SKY | {"SKYPILOT_NUM_NODES": "two"}, "SKYPILOT_NUM_NODES=two must be a number"),
    (SKY | {"JAX_COORDINATOR_PORT": "http"}, "JAX_COORDINATOR_PORT=http must be a number"),
    ({n: v for n, v in SLURM.items() if "LOCALID" not in n}, "SLURM seems to have .* SLURM_LOCALID is not set"),
    (SLURM | {"SLURM_NTASKS": "-4"}, "SLURM_NTASKS=-4 must be a number of at least 1"),
    (SLURM | {"SLURM_JOB_ID": "seven"}, "The variables of SLURM cannot be used .ValueError"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_LOCAL_RANK and .* are not set"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
      "OMPI_MCA_orte_hnp_uri": "7.0;ib://x"}, "The variables of Open MPI cannot be used .RuntimeError"),
])
def test_variables_that_are_half_there(monkeypatch, half, words):
    """Several processes that each think they are alone would write into one run folder."""
    for name, value in half.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        find_launch(half)


def test_devices_of_local_processes(monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda *_: [Path(f"/dev/nvidia{k}") for k in (0, 10, 2)])
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ["0", "2", "10"]
    force = "--xla_force_host_platform_device_count"
    assert devices_of(1, 2, None, {}) == {"XLA_FLAGS": f"{force}=1"}
    assert devices_of(1, 2, None, {"XLA_FLAGS": f"{force}=8 --x"})["XLA_FLAGS"].split() == ["--x", f"{force}=4"]
    assert devices_of(1, 2, 3, {}) == {"XLA_FLAGS": f"{force}=3"}
    gpu = {"LAB_PLATFORM": "gpu", "CUDA_VISIBLE_DEVICES": "0,2,4,6"}
    assert [devices_of(k, 2, None, gpu)["CUDA_VISIBLE_DEVICES"] for k in range(2)] == ["0,2", "4,6"]
    with pytest.raises(UserError, match="needs 8 GPUs; there are 4"):
        devices_of(0, 2, 4, gpu)


@pytest.mark.parametrize("words", [("--processes",), ("--processes", "0", "a.py"), ("--processes", "two", "a.py"),
                                   ("--processes", "2x0", "a.py"), ("--processes", "2", "evaluate", "runs/a")])
def test_processes_on_the_command_line(words, capsys):
    from lab.__main__ import main

    assert main(words) == 2
    assert "error: --processes" in capsys.readouterr().err


def test_flat():
    assert flat({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": 1, "a.c": [2], "d": None}
