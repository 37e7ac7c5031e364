"""What clients do wrong, or too much: the right status, no crash, and all slots free again."""

import contextlib
import http.client
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time

import psutil
import pytest

pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")
pytest.importorskip("uvicorn", reason="LAB_EXTRAS=serve")

from lab.serve.requests import Limits
from tests.launching import wait_for
from tests.serving import idle, language, live
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

LIMITS = Limits(body=20_000, seconds=1.0)
TEXT = {"prompt": "To be", "max_tokens": 2, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "To be"}], "max_tokens": 2, "temperature": 0}
LONG = {"prompt": "a", "max_tokens": 90, "temperature": 0}
PATHS = {"/v1/completions": TEXT, "/v1/chat/completions": CHAT}


@pytest.fixture(scope="module")
def service():
    found = language(slots=2, queue=2)
    yield found
    assert found.close(0)


@pytest.fixture(scope="module")
def port(service):
    with live(service, limits=LIMITS) as found:
        yield found


@pytest.fixture
def slow(service, monkeypatch):
    """Steps of 30 ms."""
    step = service.engine.slots.step
    monkeypatch.setattr(service.engine.slots, "step", lambda *rest: time.sleep(0.03) or step(*rest))


def post(port, path, body, headers=None):
    """(status, headers, parsed body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers or {})
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read())


def raw(port, data, *, half_close=False, wait=10.0):
    """The status of the answer to these bytes; None if the connection ends without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as s:
        found = b""
        with contextlib.suppress(OSError):
            s.sendall(data)
            if half_close:
                s.shutdown(socket.SHUT_WR)
            while len(found) < 12 and (part := s.recv(4096)):
                found += part
        return int(found[9:12]) if found.startswith(b"HTTP/1.1 ") else None


def wrong_values(rng, path):
    """(body, statuses): one field of a good request has another type or a value out of range."""
    whole, value = PATHS[path], rng.choice
    chat = path.endswith("chat/completions")
    field, values = rng.choice([
        ("max_tokens", ["3", 1.5, True, 0, -1, [], {}, 1 << 40]), ("temperature", ["1", -1, 11, [], {}, True, 10**400]),
        ("top_p", [0, 2, "0.5", []]), ("top_k", ["4", -2, 0.5, {}]), ("seed", ["1", 0.5, [], 1 << 70]),
        ("stop", [1, [1], [""], ["x"] * 17, {}, "x" * 1001]), ("stream", ["true", 1, []]), ("n", [2, "1", 0]),
        ("stream_options", [1, "x", {"include_usage": 1}]), ("model", [1, []]), ("tools", [[{}]]),
        ("logprobs", [21, "1", -1, [], True] if not chat else [1, "true", []]), ("logit_bias", [{"1": 2}]),
        ("messages", [None, [], "hi", [1], [{}], [{"role": "tool", "content": "x"}], [{"role": "user"}],
                      [{"role": "user", "content": 1}], [{"role": "user", "content": [{"type": "image_url"}]}],
                      [{"role": ["user"], "content": "x"}]])
        if chat else ("prompt", [1, {}, [1.5], [True], [-1], [256], ["a", "b"], [[1], [2]], [None]])])
    return json.dumps(whole | {field: value(values)}).encode(), {422}


def not_json(rng, path):
    """(body, statuses): bytes that are no JSON object in UTF-8."""
    good = json.dumps(PATHS[path]).encode()
    cut = good[:rng.randrange(1, len(good))]
    noise = bytes(rng.randrange(128, 256) for _ in range(rng.randrange(1, 200)))
    return rng.choice([
        (cut, {400}), (noise, {400}), (good + cut[:1] + noise, {400}), (b"", {400}),
        (good.replace(b":", b"=", 1), {400}),
        (good.decode().encode("utf-16"), {400}), (b"\xef\xbb\xbf" + good, {400}), (b"[" * 9000, {400}),
        (b'{"temperature": NaN}', {400}), (b'{"seed": ' + b"9" * 5000 + b"}", {400}), (b"[]", {422}), (b"null", {422}),
        (b'"x"', {422}), (b"1", {422}), (b'{"a": ' * 2000 + b"1" + b"}" * 2000, {400, 422}), (b"\x00" * 40, {400}),
        (good.replace(b"To be", b"\xff\xfe"), {400}), (good.replace(b"To be", b"\\ud800"), {400}),
        (good.replace(b"To be", b"a" * 15_000), {400}), (good.replace(b"To be", b"a" * 20_001), {413})])


def test_malformed_requests_get_the_right_status(port, service):
    """LAB_FUZZ=N: N times as many; no thread and no open file is left behind."""
    rng = random.Random(0)
    seen = {}
    before = None
    for i in range(300 * int(os.environ.get("LAB_FUZZ", "1"))):
        if i == 50:
            before = resources()
        path = rng.choice(list(PATHS))
        body, statuses = rng.choice([wrong_values, not_json])(rng, path)
        headers = rng.choice([{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json"},
                              {"Content-Type": "\xff"}, {"X": "y" * 9000}])
        status, _, answer = post(port, path, body, headers)
        assert status in statuses, (i, path, body[:200], status, answer)
        assert answer["error"]["message"] and answer["error"]["code"] == status
        seen[status] = seen.get(status, 0) + 1
    assert set(seen) == {400, 413, 422} and min(seen.values()) >= 5
    wait_for(lambda: all(now <= was for now, was in zip(resources(), before, strict=True)), 10, "the last connection")
    assert post(port, "/v1/completions", TEXT)[0] == 200 and idle(service)


def resources():
    """(threads, open files) of this process."""
    return threading.active_count(), psutil.Process().num_fds()


@pytest.mark.parametrize("stream", [True, False])
def test_clients_killed_in_their_streams_free_their_slots(port, service, slow, stream):
    before = resources()
    code = f"""
import http.client, json
c = http.client.HTTPConnection("127.0.0.1", {port})
c.request("POST", "/v1/completions", json.dumps({LONG | {"stream": stream}!r}))
print("asked", flush=True)
c.getresponse().read()
"""
    for _ in range(int(os.environ.get("LAB_FUZZ", "1"))):
        clients = [subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE) for _ in range(4)]
        for client in clients:
            assert client.stdout.readline() == b"asked\n"
        wait_for(lambda: service.engine.running, 10, "a request in a slot")
        for client in clients:
            client.kill()
            client.communicate()
        assert idle(service, 5)
    assert post(port, "/v1/completions", TEXT)[0] == 200
    wait_for(lambda: all(now <= was for now, was in zip(resources(), before, strict=True)), 10, "the last connection")


def test_both_numbers_of_a_prompt_that_is_too_long(port):
    _, _, found = post(port, "/v1/completions", {"prompt": "a" * 100})
    assert "100 tokens, and the model's context is 96" in found["error"]["message"]
    _, _, found = post(port, "/v1/completions", {"prompt": "a" * 90, "max_tokens": 7})
    assert "90 tokens and max_tokens is 7: together 97" in found["error"]["message"]
    assert post(port, "/v1/completions", {"prompt": "a" * 90, "max_tokens": 6})[0] == 200
    assert post(port, "/v1/completions", {"prompt": "", "max_tokens": 6})[0] == 400  # bytes have no token to begin with


def test_what_is_not_http(port, service):
    good = json.dumps(TEXT).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    rng = random.Random(1)
    garbage = [bytes(rng.randrange(256) for _ in range(60)) + b"\r\n\r\n" for _ in range(30)]
    for data in [b"\r\n\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/x\r\n\r\n", head + b"Content-Length: x\r\n\r\n",
                 head + b"Content-Length: -1\r\n\r\n", head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
                 head + b"X: " + b"y" * 80_000 + b"\r\n\r\n", *garbage]:
        assert raw(port, data, wait=5) in (400, 431, None), data[:80]
    for method, path, status in ((b"GET", b"/v1/completions", 405), (b"PUT", b"/v1/models", 405), (b"GET", b"/x", 404),
                                 (b"GET", b"/v1/models/../../etc/passwd", 404), (b"GET", b"/%2e%2e/%00", 404),
                                 (b"DELETE", b"/", 405), (b"POST", b"/v1/files", 404)):
        assert raw(port, method + b" " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n") == status, path
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, good[i:i + 1]) for i in range(len(good))) + b"0\r\n\r\n"
    assert raw(port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks) == 200
    endless = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    assert raw(port, head + b"Transfer-Encoding: chunked\r\n\r\n" + endless * 3) == 413
    assert raw(port, head + b"Content-Length: 999999999999\r\n\r\n") == 413
    assert idle(service)


def test_slow_and_half_closed_sockets(port, service):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n"
    began = time.monotonic()
    assert raw(port, head + b"\r\n{") == 408
    assert raw(port, head, wait=5) in (400, None) and raw(port, b"", wait=5) in (400, None)
    assert time.monotonic() - began < 8  # each about a second
    for data in (b"", b"GET", head, head + b"\r\n{"):
        assert raw(port, data, half_close=True, wait=5) in (400, None)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:  # a byte at a time never makes a request
        with contextlib.suppress(OSError):
            for i in range(60):
                s.sendall(head[i:i + 1])
                time.sleep(0.05)
        with contextlib.suppress(OSError):
            s.recv(4096)
        with contextlib.suppress(OSError):
            assert s.recv(4096) == b""
    assert post(port, "/v1/completions", TEXT)[0] == 200 and idle(service)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_goes_away_frees_its_slot(port, service, slow, stream, reset):
    body = json.dumps(LONG | {"stream": stream}).encode()
    sockets = []
    for _ in range(4):  # two in slots, two in the queue
        s = socket.create_connection(("127.0.0.1", port), timeout=10)
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        sockets.append(s)
    wait_for(lambda: (len(service.engine.running), len(service.engine.waiting)) == (2, 2), 10, "all four")
    began = time.monotonic()
    for s in sockets:
        if reset:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.close()
    assert idle(service) and time.monotonic() - began < 1.5  # all of them would take 5 s


def test_a_full_queue_says_when_to_come_again(port, service, slow):
    found, threads = [], []
    for _ in range(7):
        threads.append(threading.Thread(target=lambda: found.append(post(port, "/v1/completions", LONG | {
            "max_tokens": 20}))))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    statuses = sorted(status for status, _, _ in found)
    assert statuses[0] == 200 and statuses[-1] == 429 and statuses.count(200) >= 4
    refused = next(x for x in found if x[0] == 429)
    assert 1 <= int(refused[1]["retry-after"]) <= 60 and refused[2]["error"]["type"] == "rate_limit_error"
    assert idle(service)


def test_a_deadline_and_a_failure_have_their_status(port, service, slow, monkeypatch):
    monkeypatch.setattr(service, "seconds", 0.4)
    status, _, found = post(port, "/v1/completions", LONG)
    assert status == 504 and "0.4 seconds" in found["error"]["message"]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(LONG | {"stream": True}))
    response = connection.getresponse()
    text = response.read().decode()
    assert response.status == 200 and '"code": 504' in text and "[DONE]" not in text
    monkeypatch.setattr(service, "seconds", 60.0)
    monkeypatch.setattr(service.engine.slots, "step", lambda *_: 1 / 0)
    assert post(port, "/v1/completions", TEXT)[0] == 500
    monkeypatch.undo()
    assert post(port, "/v1/completions", TEXT)[0] == 200 and idle(service)


def test_the_key():
    service = language(start=False)
    with live(service, key="sécret") as port:
        for given, status in ((None, 401), ("Bearer x", 401), ("Bearer sécret", 503), ("sécret", 401), ("", 401)):
            headers = {} if given is None else {"Authorization": given.encode()}
            assert post(port, "/v1/completions", TEXT, headers)[0] == status
        assert raw(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") == 200
        assert raw(port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n") == 401


def test_pages_of_other_sites_may_not_use_it(port):
    own = f"http://127.0.0.1:{port}"
    for origin, status in ((own, 200), ("http://example.com", 403), ("null", 403), (f"http://localhost:{port}", 403)):
        assert post(port, "/v1/completions", TEXT, {"Origin": origin})[0] == status
