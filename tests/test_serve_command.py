"""`./launch.sh serve`: from a folder with weights to an answer, and its end."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest

pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")
pytest.importorskip("uvicorn", reason="LAB_EXTRAS=serve")
pytest.importorskip("jinja2", reason="LAB_EXTRAS=chat")

from lab.__main__ import main
from lab.weights.tokenizer import tokenizer_of
from tests.conftest import ROOT
from tests.launching import children_hear, wait_for
from tests.test_sample_weights import greedy, tiny  # noqa: F401 (a fixture)


@pytest.fixture
def started(tmp_path):
    """Starts the command on a free port: (process, port, lines of its log)."""
    processes = []

    def start(*words, **variables):
        env = os.environ | {"PYTHONPATH": str(ROOT), "LAB_PLATFORM": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                            "XLA_FLAGS": "--xla_force_host_platform_device_count=1"} | variables
        with children_hear(held=True):
            process = subprocess.Popen([sys.executable, "-m", "lab", "serve", *map(str, words), "--port", "0"], env=env,
                                       cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        lines = []
        threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
        said = process.stdout.readline()
        found = re.search(r"at http://127\.0\.0\.1:(\d+)$", said.strip())
        assert found, (said, lines)
        return process, int(found[1]), lines

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def status(port, path):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30).status
    except urllib.error.HTTPError as e:
        return e.code


def asked(port, body):
    """A streamed chat: the response, whose parts are still to be read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def test_it_answers_and_finishes_what_runs(tiny, started):  # noqa: F811
    folder, model, params = tiny
    process, port, lines = started(folder, "--context", "512", "--slots", "2")
    assert status(port, "/healthz") == 200
    wait_for(lambda: status(port, "/readyz") == 200, 120, "compilation")
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "stream": True, "max_tokens": 400}
    response = asked(port, body)
    first = [response.readline() for _ in range(6)]
    assert response.status == 200 and b'"assistant"' in first[0]
    process.send_signal(signal.SIGTERM)
    rest = response.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    parts = [json.loads(line[6:]) for line in b"".join([*first, rest]).split(b"\n\n") if line[6:7] == b"{"]
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    own = tokenizer_of(str(folder), model)
    prompt = own.encode_prompt("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n").tolist()
    ids = greedy(model, params, prompt, 60, own.size)
    ids = ids[:ids.index(own.eot)] if own.eot in ids else ids
    assert text.startswith(own.decode(ids)) and len(text) > 0
    assert process.wait(30) == 0
    assert any("SIGTERM: finishing what runs" in line for line in lines)


def test_it_stops_while_it_compiles(tiny, started):  # noqa: F811
    process, port, _ = started(tiny[0], "--context", "1024")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_mistakes_are_sentences(tiny, capsys, monkeypatch):  # noqa: F811
    folder = str(tiny[0])
    for words, said in (((folder, "--port", "99999"), "--port 99999 is out of range"),
                        ((folder, "--host", "192.0.2.1"), "Cannot listen at 192.0.2.1"), (("nowhere",), "nowhere"),
                        ((folder, "--best"), "are for run folders")):
        capsys.readouterr()
        assert main(["serve", *words, *(() if "--port" in words else ("--port", "0"))]) == 2
        err = capsys.readouterr().err
        assert said in err and "Traceback" not in err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "lab.serve.server", raising=False)
    import lab.serve

    monkeypatch.delattr(lab.serve, "server", raising=False)
    assert main(["serve", folder]) == 2
    assert "LAB_EXTRAS=serve ./launch.sh serve" in capsys.readouterr().err
