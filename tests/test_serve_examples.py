"""The examples for Kubernetes and Ray Serve name flags, paths and a metric that exist."""

import ast
import inspect
import re

import pytest

pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")
pytest.importorskip("yaml")

import yaml

from lab.commands.serve import KEY, serve
from lab.commands.serve_models import Options
from lab.serve.app import OPEN
from tests.conftest import ROOT

EXAMPLES = ROOT / "lab/serve/examples"


def documents():
    return {one["kind"]: one for one in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())}


def test_kubernetes():
    found = documents()
    pod = found["Deployment"]["spec"]["template"]["spec"]
    container, = pod["containers"]
    words = container["args"]
    assert words[:2] == ["./launch.sh", "serve"]
    flags = {word.removeprefix("--"): value for word, value in zip(words, words[1:], strict=False)
             if word.startswith("--")}
    assert set(flags) <= set(inspect.signature(serve).parameters)
    probes = [container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")]
    assert set(probes) <= set(OPEN) - {"/"}
    assert pod["terminationGracePeriodSeconds"] >= int(flags["drain"]) + 10
    assert container["ports"][0]["containerPort"] == int(flags["port"])
    assert KEY in {one["name"] for one in container["env"]}
    metric = found["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert metric == "lab_queue" and '"queue"' in (ROOT / "lab/serve/engine.py").read_text()


def test_kubernetes_by_its_schemas():
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for one in documents().values():
        validator.validate(one, "1.37", strict=True)
    wrong = documents()["Deployment"]
    wrong["spec"]["template"]["spec"]["containers"][0]["portz"] = []
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, "1.37", strict=True)


def test_ray_serve_calls_what_exists():
    """Ray itself is not installed here: see lab/serve/README.md for what was run."""
    source = (EXAMPLES / "ray_serve.py").read_text()
    call, = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)
             and getattr(node.func, "id", "") == "Options")
    values = [ast.literal_eval(x) if isinstance(x, ast.Constant) else 1 for x in call.args]
    Options(*values, **{k.arg: 1 for k in call.keywords})
    assert re.search(r"serve run lab\.serve\.examples\.ray_serve:application", source)
