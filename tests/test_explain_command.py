"""`./launch.sh explain` as a user types it: tables, messages, images, a language model; a page, numbers, mistakes."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lab
from lab.data.images.images import Images
from lab.data.images.sources import ImageFolder
from lab.data.messages.messages import Messages
from lab.data.tables.csv_files import Csv
from lab.data.word_tokenizer import Words
from lab.experiment import Checkpoint, Evaluate, Experiment
from lab.models.bert import BERT
from lab.models.rnn import LSTM
from lab.models.vit import ViT
from lab.optim import SGD, Constant
from lab.tasks.masked import MaskedLM
from lab.tasks.supervised import Classify
from lab.weights.read import parameter_shapes
from lab.weights.write import write
from tests.test_hugging_face_tokenizer import byte_level
from tests.test_predict import place, table  # noqa: F401 (a fixture)
from tests.test_step import compiled_in_haste  # noqa: F401 (a fixture)
from tests.test_weights import random

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
USUAL = dict(task=Classify(), optim=SGD(lr=Constant(0.1)), steps=2, batch=8, evaluate=Evaluate(every=0),
             checkpoint=Checkpoint(every=0))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_table(place, typed):  # noqa: F811
    status, out, err = typed("explain", "sales", "--input", "new.csv", "--record", "5")
    assert status == 0 and "Written to sales/explanation.html, explanation.json" in out, err
    found = read(place / "sales" / "explanation.json")
    assert found["units"] == ["size", "town"] and found["values"] == ["1185", "Zug"]
    row = next(row for row in table(place / "before.csv") if row["record"] == "5")
    assert found["score"] == pytest.approx(float(row["prediction"]), rel=1e-5)
    maps = found["maps"]
    assert sum(maps["integrated gradients"]) == pytest.approx(found["score"] - found["baseline_score"], rel=1e-3)
    assert maps["integrated gradients"][0] == pytest.approx(maps["gradient x input"][0], rel=1e-5)  # mean 0, a number
    # Another row as the baseline: only what differs counts.
    lines = (place / "new.csv").read_text().splitlines()
    (place / "base.csv").write_text("\n".join([lines[0], lines[8]]) + "\n")  # record 7: the same town
    status, out, err = typed("explain", "sales", "--input", "new.csv", "--record", "5", "--baseline", "base.csv")
    assert status == 0, err
    assert read(place / "sales" / "explanation.json")["maps"]["integrated gradients"][1] == 0 != maps["occlusion"][0]


def test_a_language_model(place, typed):  # noqa: F811
    status, out, err = typed("explain", "letters", "--input", "a few", "--output", "new/it.html")
    assert status == 0 and "it.html, it.json, it.npz" in out, err
    maps = np.load(place / "new" / "it.npz")["attention"]
    assert maps.shape == (1, 1, 5, 5) and np.allclose(maps.sum(-1), 1, atol=1e-5)
    page = (place / "new" / "it.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and not re.search(r'(src|href)="(?!data:)|https?://|<script', page)


def test_messages_and_images(place, typed):  # noqa: F811
    rows = [("what a sunny day", "sun"), ("rain and rain again", "rain")] * 20
    (place / "m.csv").write_text("text,kind\n" + "".join(f"{text} {i},{kind}\n" for i, (text, kind) in enumerate(rows)))
    (place / "pixels").mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        kind = place / "pixels" / "ab"[i % 2]
        kind.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(kind / f"{i}.png")
    words = Experiment(Messages(Csv("m.csv", target="kind", text="text"), Words(20), 8),
                       LSTM(vocab=20, width=8, hidden=4), **USUAL)
    lab.fit(words, place / "words", quiet=True)
    lab.fit(Experiment(Images(ImageFolder("pixels"), (8, 8, 1), validation=4), ViT(depth=1, width=8, heads=2, patch=4,
                                                                                  classes=2), **USUAL),
            place / "pictures", quiet=True)
    status, out, err = typed("explain", "words", "--input", "Rain, rain and a sunny day", "--target", "sun")
    found = read(place / "words" / "explanation.json")
    assert status == 0 and found["explained"] == "log-odds of sun against rain", err
    assert len(found["units"]) == len(found["maps"]["occlusion"]) == 6 and found["completeness"]["gap"] < 0.01
    status, out, err = typed("explain", "pictures", "--input", "pixels/a/0.png")
    found = read(place / "pictures" / "explanation.json")
    assert status == 0 and np.shape(found["maps"]["integrated gradients"]) == (8, 8), err
    assert np.load(place / "pictures" / "explanation.npz")["attention"].shape == (1, 2, 5, 5)


def test_an_encoder_compares_texts_and_a_masked_model_is_refused(place, typed, mistake):  # noqa: F811
    tokenizer = byte_level()
    model = BERT(depth=1, width=16, heads=2, vocab=tokenizer.get_vocab_size(), context=16, norm_place="post",
                 output="embedding", pool="mean", norm_epsilon=1e-12, mlp="gelu_exact")
    write(model, {path: random(*shape, seed=i) for i, (path, shape) in enumerate(parameter_shapes(model).items())},
          place / "encoder")
    tokenizer.save(str(place / "encoder" / "tokenizer.json"))
    status, out, err = typed("explain", "encoder", "--input", "a b", "--target", "c d", "--output", "near.html")
    assert status == 0 and read(place / "near.json")["explained"] == "the cosine similarity to 'c d'", err
    assert -1 <= read(place / "near.json")["score"] <= 1
    assert "compares --input TEXT with --target TEXT" in mistake("explain", "encoder", "--input", "a b")
    (place / "m.csv").write_text("text,kind\n" + "".join(f"words {i},{'ab'[i % 2]}\n" for i in range(40)))
    lab.fit(Experiment(Messages(Csv("m.csv", target="kind", text="text"), Words(20), 8), BERT(
        depth=1, width=8, heads=1, context=8, vocab=21), **USUAL | {"task": MaskedLM()}), place / "masked", quiet=True)
    assert "the task of masked is MaskedLM" in mistake("explain", "masked", "--input", "words 1")


def test_mistakes(place, typed, mistake):  # noqa: F811
    for number, said in (("3", "it is blank"), ("99", "there are 0 to 59")):
        status, _, err = typed("explain", "sales", "--input", "new.csv", "--record", number)
        assert status == 2 and f"no record {number}: {said}" in err  # beside what is logged of blanks and gaps
    (place / "one.csv").write_text('size,town\n"1,000",Uri\n')
    (place / "narrow.csv").write_text("size\n3\n")
    (place / "none.png").write_text("no image")
    (place / "unfinished").mkdir(exist_ok=True)
    shutil.copy(place / "sales" / "experiment.json", place / "unfinished")
    for words, said in (
            (("sales", "--input", "narrow.csv"), "narrow.csv has no column 'town'"),
            (("sales", "--input", "nowhere.csv"), "--input nowhere.csv does not exist"),
            (("sales", "--input", "one.csv", "--record", "1"), "no record 1: there is only 0"),
            (("sales", "--input", "one.csv", "--target", "x"), "--target and --against are for classes"),
            (("sales", "--input", "one.csv", "--baseline", "blur"), "--baseline blur: give mean, zero or a file"),
            (("sales", "--input", "one.csv", "--output", "x.pdf"), "must end in .html"),
            (("letters", "--input", ""), "--input is empty"),
            (("letters", "--input", "far too long"), "The text has 12 tokens and the model reads 8"),
            (("letters", "--input", "a", "--target", "the"), "must be one token"),
            (("unfinished", "--input", "new.csv"), "unfinished has no checkpoint yet"),
            (("nowhere", "--input", "new.csv"), "nowhere")):
        assert said in mistake("explain", *words), words


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_the_page_in_a_browser(place, typed, tmp_path):  # noqa: F811
    """Light or dark, the page has text, coloured tokens and a picture."""
    assert typed("explain", "letters", "--input", "a few", "--output", "seen.html")[0] == 0
    seen = []
    for how in ((), ("--blink-settings=preferredColorScheme=0",)):
        shot = tmp_path / f"{len(seen)}.png"
        subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *how,
                        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
                        "--window-size=400,1200", f"--screenshot={shot}", (place / "seen.html").as_uri()],
                       check=True, timeout=120, capture_output=True)
        image = np.asarray(Image.open(shot).convert("RGB"), np.int32)
        assert (image.max(-1) - image.min(-1) > 60).mean() > 1e-3
        seen.append(np.median(image))
    assert seen[0] > 230 and seen[1] < 60, seen
