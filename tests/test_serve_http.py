"""OpenAI's API: what it answers, in parts and whole, beside the engine's tokens and to the real client."""

import itertools
import json

import pytest

pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")
pytest.importorskip("uvicorn", reason="LAB_EXTRAS=serve")

from starlette.testclient import TestClient

from lab.data.tokenizers import Bytes
from lab.models.session import Session
from lab.serve import app
from lab.serve.requests import Limits
from lab.serve.text_stream import TextStream
from tests.serving import language, live
from tests.test_generate import random_params
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

PROMPT = "To be"


@pytest.fixture(scope="module")
def service():
    found = language()
    yield found
    assert found.close(0)


@pytest.fixture(scope="module")
def client(service):
    with TestClient(app.build(service, limits=Limits()), raise_server_exceptions=False) as found:
        yield found


def by_session(service, prompt, new, **how):
    model = service.engine.slots.model
    session = Session(model, random_params(model), vocab=256, **how)
    return list(itertools.islice(session.tokens(list(prompt.encode())), new))


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]" and response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_what_chat_would_write(client, service):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 5, "temperature": 0.8, "top_p": 0.9}
    found = client.post("/v1/completions", json=body).json()
    tokens = by_session(service, PROMPT, 12, seed=5, temperature=0.8, top_p=0.9)
    choice = found["choices"][0]
    assert choice["text"] == bytes(tokens).decode(errors="replace") and choice["finish_reason"] == "length"
    assert found["object"] == "text_completion" and found["usage"]["total_tokens"] == 17
    other = client.post("/v1/completions", json=body | {"seed": 6}).json()
    assert other["choices"][0]["text"] != choice["text"]  # negative control
    ids = client.post("/v1/completions", json=body | {"prompt": list(PROMPT.encode())}).json()
    assert ids["choices"][0]["text"] == choice["text"]
    assert client.post("/v1/completions", json=body | {"seed": 5 - (1 << 32)}).json()["choices"] == found["choices"]


def test_a_stream_has_the_same_text_and_counts(client):
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "logprobs": 2}
    whole = client.post("/v1/completions", json=body).json()
    found = events(client.post("/v1/completions", json=body | {
        "stream": True, "stream_options": {"include_usage": True}}))
    *parts, last = found
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["choices"][0]["text"]
    assert [part["choices"][0]["finish_reason"] for part in parts[-2:]] == [None, "length"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 20
    logprobs = [part["choices"][0]["logprobs"] for part in parts]
    assert sum((lp["token_logprobs"] for lp in logprobs), []) == whole["choices"][0]["logprobs"]["token_logprobs"]
    assert whole["choices"][0]["logprobs"]["token_logprobs"][3] == max(
        whole["choices"][0]["logprobs"]["top_logprobs"][3].values())


def test_a_chat_whole_and_streamed(client):
    body = {"messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": [
        {"type": "text", "text": " brief"}]}], "max_tokens": 9, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    whole = client.post("/v1/chat/completions", json=body).json()
    message = whole["choices"][0]["message"]
    plain = client.post("/v1/completions", json={"prompt": "Be brief", "max_tokens": 9, "temperature": 0}).json()
    assert message["content"] == plain["choices"][0]["text"] and message["role"] == "assistant"
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == 9 and all(len(one["top_logprobs"]) == 3 for one in content)
    assert content[0]["top_logprobs"][0]["bytes"] == content[0]["bytes"]
    parts = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == message["content"]


def test_stop_strings_cut_the_text(client):
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = whole[5:8]
    want = whole[:whole.index(stop)]
    for streamed in (False, True):
        found = client.post("/v1/completions", json=body | {"stop": ["never there", stop], "stream": streamed})
        choices = [part["choices"][0] for part in (events(found) if streamed else [found.json()])]
        assert "".join(choice["text"] for choice in choices) == want and choices[-1]["finish_reason"] == "stop"


def test_parts_of_text_take_nothing_back():
    text = Bytes().restore("")

    def parts(written, stop=()):
        stream = TextStream(text, [], stop)
        return [stream.add(i) for i in written] + [stream.end()], stream.stopped

    assert parts("aé😀".encode()) == (["a", "", "é", "", "", "", "😀", ""], False)
    assert parts(b"ab\xc3") == (["a", "b", "", "\ufffd"], False)
    assert parts(b"abcabd!", ("abd",)) == (["", "", "abc", "", "", "", "", ""], True)
    assert parts(b"xaab", ("aac",)) == (["x", "", "", "aab", ""], False)
    assert parts(b"xa", ("ab",)) == (["x", "", "a"], False)
    assert "".join(parts(b"\xff" * 50)[0]) == "\ufffd" * 50


def test_models_and_health(client, service):
    found = client.get("/v1/models").json()["data"][0]
    assert found["id"] == "tiny" and found["context"] == 96 and client.get("/v1/models/tiny").json() == found
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_before_it_is_compiled_it_says_so():
    waiting = language(start=False)
    with TestClient(app.build(waiting, limits=Limits())) as client:
        assert client.get("/healthz").status_code == 200
        for found in (client.get("/readyz"), client.post("/v1/completions", json={"prompt": "a"})):
            assert found.status_code == 503 and found.headers["retry-after"] == "5"


def test_the_real_client(service):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    with live(service, key="a key") as port:
        client = openai.OpenAI(api_key="a key", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)
        asks(openai, client, service)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(api_key="b key", base_url=client.base_url).models.list()
        client.close()


def asks(openai, ours, service):
    assert [model.id for model in ours.models.list()] == ["tiny"]
    said = [{"role": "user", "content": PROMPT}]
    how = {"model": "tiny", "max_tokens": 8, "temperature": 0.9, "seed": 3}
    whole = ours.chat.completions.create(messages=said, logprobs=True, top_logprobs=2, extra_body={"top_k": 7}, **how)
    assert whole.usage.completion_tokens == 8 and len(whole.choices[0].logprobs.content) == 8
    want = bytes(by_session(service, PROMPT, 8, seed=3, temperature=0.9, top_k=7)).decode(errors="replace")
    assert whole.choices[0].message.content == want
    stream = ours.chat.completions.create(messages=said, stream=True, extra_body={"top_k": 7}, **how)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == want
    text = ours.completions.create(prompt=PROMPT, logprobs=1, stop=["\x00never"], extra_body={"top_k": 7}, **how)
    assert text.choices[0].text == want and text.choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError):
        ours.completions.create(prompt="a", **how | {"model": "gpt-4"})
    with pytest.raises(openai.UnprocessableEntityError, match="tools is not supported"):
        ours.chat.completions.create(messages=said, tools=[{"type": "function", "function": {"name": "f"}}], **how)
    with pytest.raises(openai.BadRequestError, match="100 tokens, and the model's context is 96"):
        ours.completions.create(prompt="a" * 100, **how)
