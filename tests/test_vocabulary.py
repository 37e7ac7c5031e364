"""A model's vocabulary follows the tokenizer where it is left out, whatever overrides or arms make of that."""

from dataclasses import replace
from pathlib import Path

import pytest

from lab.configuration.rebuild import from_json
from lab.configuration.values import to_json
from lab.data.messages.messages import Messages
from lab.data.tables.bundled import Sklearn
from lab.data.tables.csv_files import Csv
from lab.data.tables.tables import Table
from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.data.tokenizers import BPE, Bytes, Chars
from lab.data.word_tokenizer import Words
from lab.errors import UserError
from lab.experiment import Experiment
from lab.models.bert import BERT
from lab.models.gpt import GPT
from lab.models.rnn import LSTM
from lab.optim import AdamW, Constant
from lab.study.design.arms import Design, Study
from lab.tasks.language import LanguageModel
from lab.tasks.masked import MaskedLM
from lab.tasks.supervised import Classify


@pytest.fixture
def letters(text_file: Path) -> Experiment:
    return Experiment(Text(TextFiles(str(text_file)), Bytes(), 8), GPT(depth=1, width=8, heads=1, context=8),
                      LanguageModel(), AdamW(lr=Constant(1e-3)), steps=2, batch=8)


def test_it_is_the_tokenizers(letters, text_file, tmp_path):
    for tokenizer in (Bytes(), BPE(300), Chars()):
        spec = replace(letters, data=replace(letters.data, tokenizer=tokenizer))
        found = spec.filled()
        assert found.model.vocab == spec.data.load().metadata["vocab"] and found.filled() is found
        assert replace(spec, model=found.model).fingerprint() == found.fingerprint()
        assert from_json(to_json(found)) == found  # a run is opened with what it had
        masked = replace(spec, model=BERT(depth=1, width=8, heads=1, context=8), task=MaskedLM())
        assert masked.filled().model.vocab == found.model.vocab + 1  # [MASK]
    assert letters.filled().model.vocab == 256 and letters.model.vocab is None
    explicit = replace(letters, model=letters.model.clone(vocab=512))
    assert explicit.filled() is explicit
    (tmp_path / "m.csv").write_text("text,kind\n" + "".join(f"word{i} a,{'xy'[i % 2]}\n" for i in range(20)))
    messages = replace(letters, data=Messages(Csv(str(tmp_path / "m.csv"), "kind", text="text"), Words(9), length=4),
                       model=LSTM(width=4, hidden=4), task=Classify())
    assert messages.filled().model.vocab == 9
    assert replace(messages, model=BERT(depth=1, width=8, heads=1, context=4, classes=2)).filled().model.vocab == 9


def test_data_without_a_vocabulary(letters):
    with pytest.raises(UserError, match="--model.vocab .*tokenizer.* this data has"):
        replace(letters, data=Table(Sklearn("iris"))).filled()


def test_it_follows_flags_and_arms(letters, tmp_path, monkeypatch):
    import sys

    from lab.commands.arguments import parse
    from lab.commands.train import TrainOptions
    from lab.study.run.command import StudyOptions

    file = tmp_path / "letters.py"
    file.write_text("from tests.test_vocabulary import made\nexperiment = made\n")
    monkeypatch.setattr(sys.modules[__name__], "made", replace(letters, data=replace(letters.data, tokenizer=BPE(300))),
                        raising=False)
    for flags, size in (([], 300), (["--data.tokenizer.vocab", "400"], 400), (["--model.vocab", "512"], 512)):
        assert parse(file, flags, TrainOptions)[0].model.vocab == size
    base = parse(file, ["--vary", "data.tokenizer.vocab=300,400"], StudyOptions)[0]
    arms = Study(base, Design({"larger": {"data.tokenizer.vocab": 400}})).experiments()
    assert [arm.model.vocab for _, arm in arms.values()] == [300, 400]
