"""/metrics counts what was asked and answered, in a form that Prometheus' own parser reads."""

import pytest

pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")
pytest.importorskip("uvicorn", reason="LAB_EXTRAS=serve")

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from lab.serve import app
from lab.serve.requests import Limits
from tests.serving import language
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)


def counts(client):
    found = client.get("/metrics")
    assert found.status_code == 200 and found.headers["content-type"].startswith("text/plain")
    return {(sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(found.text) for sample in family.samples}


def test_requests_tokens_and_times():
    service = language(slots=2)
    with TestClient(app.build(service, limits=Limits()), raise_server_exceptions=False) as client:
        body = {"prompt": "To be or not", "max_tokens": 6, "temperature": 0}
        for more in ({}, {"stream": True}):
            assert client.post("/v1/completions", json=body | more).status_code == 200
        client.post("/v1/completions", content=b"{")
        for path in ("/nothing", "/v1/models/a", "/v1/models/b"):
            client.get(path)
        found = counts(client)
        path = ("path", "/v1/completions")
        assert found["lab_requests_total", path, ("status", "200")] == 2
        assert found["lab_requests_total", path, ("status", "400")] == 1
        assert found["lab_requests_total", ("path", "other"), ("status", "404")] == 3  # no label by a client
        assert found["lab_tokens_total", ("kind", "prompt")] == 24
        assert found["lab_tokens_total", ("kind", "generated")] == 12
        assert found["lab_tokens_total", ("kind", "reused")] == 11
        assert found["lab_first_token_seconds_count",] == found["lab_token_seconds_count",] == 2
        assert found["lab_prompt_tokens_bucket", ("le", "16.0")] == 2 and found["lab_slots",] == 2
        assert found["lab_queue",] == found["lab_slots_busy",] == 0
    assert service.close(5)
    # A second server in the same process counts for itself.
    second = language(start=False)
    with TestClient(app.build(second, limits=Limits(), key="k")) as client:
        assert client.get("/metrics").status_code == 401
        client.headers["Authorization"] = "Bearer k"
        assert ("lab_requests_total", path, ("status", "200")) not in counts(client)
