"""/v1/predict says what `./launch.sh predict` writes, for tables, messages and images; /v1/embeddings."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette", reason="LAB_EXTRAS=serve")
pytest.importorskip("uvicorn", reason="LAB_EXTRAS=serve")

from PIL import Image
from starlette.testclient import TestClient

import lab
from lab.commands.serve_models import Options, service_of
from lab.data.images.images import Images
from lab.data.images.sources import ImageFolder
from lab.data.messages.messages import Messages
from lab.data.tables import Sklearn
from lab.data.tables.csv_files import Csv
from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import Bytes
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.bert import BERT
from lab.models.gan import GAN
from lab.models.linear import MLP
from lab.optim import SGD, Constant
from lab.serve import app
from lab.serve.requests import Limits
from lab.tasks.adversarial import Adversarial
from lab.tasks.masked import MaskedLM
from lab.tasks.supervised import Classify
from lab.weights.read import parameter_shapes
from lab.weights.write import write
from tests.test_hugging_face_tokenizer import byte_level
from tests.test_predict import messages, pictures, place, table  # noqa: F401 (a fixture)
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)

OPTIONS = Options("it", 2, 64, 4, 60.0)
USUAL = dict(task=Classify(), optim=SGD(lr=Constant(0.1)), steps=2, batch=8, evaluate=Evaluate(every=0),
             checkpoint=Checkpoint(every=0))


def clients(run):
    service = service_of(str(run), OPTIONS, None, False, None)
    service.start()
    assert service.worker.ready.wait(120)
    return TestClient(app.build(service, limits=Limits()), raise_server_exceptions=False), service


def predicted(client, records, **how):
    how = how or {"content": json.dumps({"records": records})}
    found = client.post("/v1/predict", **how)
    return found.json()["data"] if found.status_code == 200 else (found.status_code, found.json()["error"]["message"])


def test_a_table(place):  # noqa: F811
    client, service = clients(place / "sales")
    rows = table(place / "new.csv")
    wanted = {row["record"]: float(row["prediction"]) for row in table(place / "before.csv")}
    records = [{"size": int(row["size"].replace(",", "")) if "," in row["size"] else None, "town": row["town"]}
               for i, row in enumerate(rows) if i not in (3, 30)]
    found = predicted(client, records)
    assert [one["prediction"] for one in found] == pytest.approx(list(wanted.values()), rel=1e-5)
    assert predicted(client, records[:1])[0]["prediction"] == pytest.approx(found[0]["prediction"], rel=1e-5)
    text = "\n".join(line for i, line in enumerate((place / "new.csv").read_text().splitlines()) if i not in (4, 31))
    same = predicted(client, None, content=text, headers={"Content-Type": "text/csv"})
    assert [one["prediction"] for one in same] == pytest.approx(list(wanted.values()), rel=1e-5)
    described = client.get("/v1/models").json()["data"][0]
    assert described["columns"] == [{"name": "size", "values": []}, {"name": "town", "values": ["Uri", "Zug"]}]
    for wrong, status, said in (
            ([{"size": 1}], 422, "has no 'town'"), ([{"size": "x", "town": "Uri"}], 422, "size"),
            ([], 422, "one record"),
            ([{"size": True, "town": "Uri"}], 422, "a boolean"), ([{"size": [1], "town": "Uri"}], 422, "an array"),
            ([{"size": 1, "town": "Bern"}], 422, "Bern"), ([1], 422, "an object"), ({}, 422, "an array"),
            ([{"size": None, "town": None}], 422, "value"), ([{"size": 1, "town": "a\0"}], 422, "NUL"),
            ([{"size": 1, "town": "\ud800"}], 422, "UTF-8"), ([{"size": 1, "town": '"\r\n,;'}], 422, "town")):
        code, message = predicted(client, wrong)
        assert code == status and said in message and "/tmp" not in message and "lab-serve-" not in message, message
    assert predicted(client, None, content="size,town\n1,Uri\n\x00,", headers={"Content-Type": "text/csv"})[0] == 422
    assert client.post("/v1/predict", content=b"{").status_code == 400
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 404
    assert service.close(5)


def test_messages_and_images_by_class_name(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    source = Csv(str(messages(tmp_path / "m.csv")), "kind", text="text")
    model = BERT(depth=1, width=16, heads=2, vocab=257, context=8, classes=2, position="rotary")
    texts = Experiment(data=Messages(source, Bytes(), length=8), model=model, **USUAL)
    client, service = clients(lab.fit(texts, tmp_path / "m", quiet=True).folder)
    found = predicted(client, ["xyz é", {"text": "xx"}, "a\nb"])
    assert [set(one["probabilities"]) for one in found] == [{"a", "b"}] * 3
    for one in found:
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert one["prediction"] == max(one["probabilities"], key=one["probabilities"].get)
    assert predicted(client, [" "])[0] == predicted(client, [None])[0] == predicted(client, [1.5, []])[0] == 422
    assert service.close(5)

    root = pictures(tmp_path / "p")
    images = Experiment(data=Images(ImageFolder(str(root)), (6, 5, 3)), model=MLP(classes=2, width=8), **USUAL)
    client, service = clients(lab.fit(images, tmp_path / "i", quiet=True).folder)
    file = (root / "cat" / "0.png").read_bytes()
    whole = predicted(client, None, content=file, headers={"Content-Type": "image/png"})[0]
    text = base64.b64encode(file).decode()
    for record in ({"image": text}, text, f"data:image/png;base64,{text}"):
        assert predicted(client, [record])[0]["probabilities"] == pytest.approx(whole["probabilities"], abs=1e-6)
    assert set(whole["probabilities"]) == {"cat", "dog"}
    other = io.BytesIO()
    Image.new("RGB", (50, 50)).save(other, "PNG")
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    for wrong, said in ((other.getvalue(), "50"), (bomb.getvalue(), "9000 x 9000 pixels"), (file[:60], ""),
                        (b"GIF89a", "not a PNG or JPEG"), (b"\x89PNG\r\n\x1a\n", "damaged"), (b"", "not a PNG")):
        code, message = predicted(client, [{"image": base64.b64encode(wrong).decode()}])
        assert code == 422 and said in message and "lab-serve-" not in message, message
    assert predicted(client, ["@@"])[0] == predicted(client, [{"path": "/etc/passwd"}])[0] == 422
    assert not list(Path("/tmp").glob("lab-serve-*"))
    assert service.close(5)


def test_embeddings(tmp_path):
    tokenizer = byte_level()
    model = BERT(depth=1, width=16, heads=2, vocab=tokenizer.get_vocab_size(), context=32, norm_place="post",
                 mlp="gelu_exact", norm_epsilon=1e-12, output="embedding", pool="mean", segments=2)
    draw = np.random.default_rng(0)
    params = {path: draw.normal(0, 0.5, shape).astype(np.float32) for path, shape in parameter_shapes(model).items()}
    write(model, params, tmp_path / "bert")
    tokenizer.save(str(tmp_path / "bert/tokenizer.json"))
    client, service = clients(tmp_path / "bert")
    texts = ["the quick", "a", "the quick brown fox jumps over", *["x"] * 20]
    found = client.post("/v1/embeddings", json={"input": texts}).json()
    vectors = np.array([one["embedding"] for one in found["data"]])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5) and found["usage"]["total_tokens"] > 23
    for i in (0, 1, 2, 22):
        alone = client.post("/v1/embeddings", json={"input": texts[i], "encoding_format": "base64"}).json()
        own = np.frombuffer(base64.b64decode(alone["data"][0]["embedding"]), "<f4")
        assert own == pytest.approx(vectors[i], abs=1e-5)
    assert np.abs(vectors[0] - vectors[2]).max() > 0.01  # negative control
    for wrong, status in (("a" * 500, 400), ([], 422), ("", 422), ([1], 422), (None, 422), (["a"] * 2049, 422)):
        assert client.post("/v1/embeddings", json={"input": wrong}).status_code == status
    assert service.close(5)


def test_embeddings_of_a_run(tmp_path):
    """A masked LM of ours, by its own tokenizer."""
    (tmp_path / "corpus.txt").write_text("to be or not to be, that is the question.\n" * 40)
    model = BERT(depth=1, width=16, heads=2, context=16, position="rotary", pool="mean")
    experiment = Experiment(**USUAL | {"data": Text(TextFiles(str(tmp_path / "corpus.txt")), Bytes(), length=16),
                                       "model": model, "task": MaskedLM()})
    run = lab.fit(experiment, tmp_path / "run", quiet=True)
    client, service = clients(run.folder)
    found = client.post("/v1/embeddings", json={"input": ["to be", "question"]}).json()
    vectors = np.array([one["embedding"] for one in found["data"]])
    assert vectors.shape == (2, 16) and np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    ids = run.data.fitted.encode("to be")[None]
    own = run.experiment.model.clone(output="embedding").apply({"params": run.params}, ids, train=False)
    assert vectors[0] == pytest.approx(np.asarray(own[0]), abs=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
    assert service.close(5)


def test_a_gan_makes_images(tmp_path):
    experiment = Experiment(**USUAL | {"data": Images(Sklearn("digits"), shape=(8, 8, 1)),
                                       "model": GAN(shape=(8, 8, 1), width=4), "task": Adversarial()})
    client, service = clients(lab.fit(experiment, tmp_path / "gan", quiet=True).folder)

    def made(**body):
        found = client.post("/v1/predict", json=body).json()
        files = [base64.b64decode(one["image"]) for one in found["data"]]
        return [np.asarray(Image.open(io.BytesIO(file))) for file in files], found["seed"]

    images, seed = made(n=3, seed=5)
    assert seed == 5 and [image.shape for image in images] == [(8, 8)] * 3
    np.testing.assert_array_equal(images[:2], made(n=2, seed=5)[0])  # an image depends on the seed and its number
    assert (images[0] != made(seed=6)[0][0]).any() and (images[0] != images[1]).any()
    again, seed = made()
    np.testing.assert_array_equal(again, made(seed=seed)[0])
    for wrong in ({"n": 0}, {"n": 65}, {"n": "2"}, {"seed": 0.5}):
        assert client.post("/v1/predict", json=wrong).status_code == 422
    assert service.close(5)
