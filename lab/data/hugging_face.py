"""Tokenizers of pretrained models: a `tokenizer.json`, or the vocabulary of a .gguf file."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lab.data.gguf_vocabulary import from_gguf
from lab.data.gpt2 import alphabet
from lab.data.tokenizers import Fitted, Texts
from lab.errors import UserError

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GAPS = 1 << 20  # ids without a token, at most
BESIDE = ("special_tokens_map.json", "tokenizer_config.json")  # what the latter says, counts


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """The tokenizer of a pretrained model: byte-level BPE, WordPiece or Unigram, by the `tokenizers` library.

    Ids are the model's own and are never shifted. Padding has the id of the tokenizer's padding token, else of its
    end-of-text token, else 0; a mask hides it. Text that spells a special token is encoded as text.
    """

    location: str
    """A folder with tokenizer.json, a .gguf file, hf:ORG/NAME or package:NAME/PATH: see lab/weights/README.md."""
    special_tokens: bool = False
    """Whether each text gets the tokens that the tokenizer adds by itself, such as [CLS] and [SEP]."""

    @property
    def vocab_size_hint(self) -> int | None:
        try:
            return _loaded(self._state(), self.location).size
        except UserError:  # `identity` raises it
            return None

    def validate(self) -> None:
        """UserError without a location."""
        if not self.location.strip():
            raise UserError('HuggingFaceTokenizer needs a location, such as "hf:openai-community/gpt2".')

    def identity(self) -> str:
        """Hash of the content; UserError if there is none."""
        return "hugging face " + hashlib.sha256(self._state().encode()).hexdigest()

    def fit(self, texts: Texts, size: int) -> "FittedHuggingFace":
        """Reads the files and ignores the text; UserError if they are missing or hold no tokenizer."""
        return self.restore(self._state())

    def restore(self, state: str) -> "FittedHuggingFace":
        """`state`: JSON with tokenizer.json ("tokenizer") and the fields of tokenizer_config.json in use ("config")."""
        return FittedHuggingFace(_loaded(state, self.location), self.special_tokens, state)

    def _state(self) -> str:
        from lab.weights.location import locate  # imports JAX

        place = locate(self.location)
        file = place / "tokenizer.json" if place.is_dir() else place
        if not file.exists():
            raise UserError(f"{place} has no tokenizer.json. Where transformers can read its tokenizer, "
                            f"AutoTokenizer.from_pretrained(...).save_pretrained(DIR) writes one.")
        sources = [file] if file.suffix == ".gguf" else [
            file, *(path for name in (*BESIDE, "chat_template.jinja") if (path := file.with_name(name)).exists())]
        return _read(file, tuple((path, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in sources))


@functools.lru_cache(maxsize=2)
def _read(file: Path, sources: tuple[tuple[Path, int, int], ...]) -> str:
    """The state of the tokenizer of a file. `sources`: the files read, with time and size."""
    if file.suffix == ".gguf":
        from lab.weights.gguf_files import GGUF

        tokenizer, config = from_gguf(GGUF(file).metadata, str(file))
    else:
        tokenizer, config = _text(file), {}
        for path in (path for path, *_ in sources if path.name in BESIDE):
            config |= _object(path)
        if (own := file.with_name("chat_template.jinja")).exists():
            config["chat_template"] = _text(own)
        config = {name: text for name in (*SPECIAL, "chat_template") if (text := _content(config.get(name)))}
    return json.dumps({"tokenizer": tokenizer, "config": config})


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path} is not readable UTF-8 text.") from None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object.")
    return found


def _content(value: Any) -> str | None:
    """A token may be written with its options, and a template as one of several with names; None: it is none."""
    if isinstance(value, list):
        value = next((x.get("template") for x in value if isinstance(x, dict) and x.get("name") == "default"), None)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


class _Loaded:
    """A tokenizer of the library, and what its description says: `size`, `pieces` (bytes per id), `special` ids."""

    def __init__(self, state: str, title: str):
        from tokenizers import Tokenizer

        found = json.loads(state)
        self.file, self.config = found["tokenizer"], found["config"]
        try:
            self.tokenizer = Tokenizer.from_str(self.file)
            described = json.loads(self.file)
        except Exception as e:  # the library raises no other class
            reason = (str(e).splitlines() or [""])[0][:120]
            raise UserError(f"{title}: tokenizer.json is none of the tokenizers library ({reason}).") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        names = {i: name for name, i in self.tokenizer.get_vocab(with_added_tokens=True).items()}
        self.size = max(names, default=-1) + 1
        if self.size > len(names) + GAPS:
            raise UserError(f"{title}: its {len(names):,} tokens have ids up to {self.size - 1:,}: tokenizer.json is "
                            f"damaged.")
        added = self.tokenizer.get_added_tokens_decoder()  # the file's ids may be others
        self.special = [i for i, token in added.items() if token.special]
        self.byte_level = "ByteLevel" in {*_kinds(described.get("pre_tokenizer")), *_kinds(described.get("decoder"))}
        spell = functools.partial(_piece, described["model"], self.byte_level, alphabet())
        self.pieces = [names[i].encode() if i in added else spell(names[i]) if i in names else b""
                       for i in range(self.size)]

    def id(self, *names: str) -> int | None:
        """The id of the first of these special tokens that there is."""
        found = [self.tokenizer.token_to_id(self.config[name]) for name in names if self.config.get(name)]
        return next((i for i in found if i is not None), None)


@functools.lru_cache(maxsize=2)
def _loaded(state: str, title: str) -> _Loaded:
    return _Loaded(state, title)


def _kinds(part: dict[str, Any] | None) -> Iterator[str]:
    """The types of a pre-tokenizer or decoder and of its parts."""
    if part:
        yield part["type"]
        for inner in (*part.get("pretokenizers", ()), *part.get("decoders", ())):
            yield from _kinds(inner)


def _piece(model: dict[str, Any], byte_level: bool, byte: dict[str, int], name: str) -> bytes:
    """The bytes of text that a token stands for. WordPiece drops spaces, so they count nowhere."""
    if byte_level:
        return bytes(byte[c] for c in name) if set(name) <= byte.keys() else name.encode()
    if model.get("byte_fallback") and len(name) == 6 and name.startswith("<0x"):
        return bytes.fromhex(name[3:5])
    return name.removeprefix(model.get("continuing_subword_prefix") or "").replace("\u2581", " ").encode()


class FittedHuggingFace(Fitted):
    """A tokenizer of the library. `decode` is the library's. `begin`: the id of its begin-of-text token, or None."""

    pads = True  # its ids stay

    def __init__(self, found: _Loaded, special_tokens: bool, state: str):
        self._tokenizer, self._adds, self._byte_level = found.tokenizer, special_tokens, found.byte_level
        self._file, self.config = found.file, found.config  # special tokens and chat_template
        super().__init__(found.pieces, self._ids, found.id("eos_token"), state)
        self.byte_counts[found.special] = 0
        self.begin = found.id("bos_token")
        pad = found.id("pad_token", "eos_token")
        self.pad = 0 if pad is None else pad

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=self._adds)
        return [np.array(one.ids, np.int32) for one in found]

    def encode_plain(self, text: str) -> np.ndarray:
        """The ids of one text without the tokens that the tokenizer adds, int32 (n,)."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids of a rendered chat, int32 (n,): spelled special tokens are special, and none is added."""
        self._tokenizer.encode_special_tokens = False
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode_messages(self, messages: Sequence[Mapping[str, str]], answers: bool, title: str) -> np.ndarray:
        """The ids of a conversation by the chat template, int32 (n,). `answers`: ends with what opens the assistant's
        turn; `title`: names the tokenizer in errors.

        Raises:
          UserError: the template is wrong or refuses the messages, see `lab.weights.chat.render`.
        """
        from lab.weights.chat import render  # the package imports JAX

        return self.encode_prompt(render(self.config["chat_template"], messages, add_generation_prompt=answers,
                                         special=self.config, title=title))

    def encode_pairs(self, pairs: Sequence[tuple[str, str]],
                     length: int | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, segments), int32 (n,) each, of two texts as one, with special tokens: [CLS] a [SEP] b [SEP] in BERT.

        `length`: cuts the longer of the two at its end first, until both fit.
        """
        (before, between, behind), (s, t) = self._frame
        own = self._tokenizer.num_special_tokens_to_add(True)
        if length is not None:
            self._check_room(length, own)
        texts = self._tokenizer.encode_batch_fast([text for pair in pairs for text in pair], add_special_tokens=False)
        found = []
        for a, b in zip(texts[::2], texts[1::2], strict=True):
            room = len(a) + len(b) if length is None else length - own
            less = min(len(a), len(b), room // 2)  # the library's own cut takes memory for all that is cut off, squared
            keep_a, keep_b = (less, room - less) if len(a) <= len(b) else (room - less, less)
            rows = [*before, *((i, s) for i in a.ids[:keep_a]), *between, *((i, t) for i in b.ids[:keep_b]), *behind]
            found.append(tuple(np.array(rows, np.int32).reshape(-1, 2).T))
        return found

    @functools.cached_property
    def _frame(self) -> tuple[list[list[tuple[int, int]]], tuple[int, int]]:
        """(id, segment) of the special tokens before, between and behind two texts; the segments of the two."""
        one = self._tokenizer.encode("a", "a", add_special_tokens=True)
        rows, which = list(zip(one.ids, one.type_ids, strict=True)), one.sequence_ids  # None: a special token
        middle = which.index(1)
        parts = slice(which.index(0)), slice(which.index(0), middle), slice(middle, None)
        special = [[row for row, text in zip(rows[part], which[part], strict=True) if text is None] for part in parts]
        return special, (rows[which.index(0)][1], rows[middle][1])

    def cut(self, ids: np.ndarray, length: int, side: Literal["end", "start"]) -> np.ndarray:
        """The ids, or `length` of them: cuts the text and keeps the special tokens around it."""
        if len(ids) <= length or not self._adds:
            return super().cut(ids, length, side)
        first, last = self._around
        self._check_room(length, first + last)
        room, text = length - first - last, ids[first : len(ids) - last]
        return np.concatenate([ids[:first], text[:room] if side == "end" else text[-room:], ids[len(ids) - last :]])

    @functools.cached_property
    def _around(self) -> tuple[int, int]:
        """How many special tokens a text gets in front and behind."""
        mask = self._tokenizer.encode("a", add_special_tokens=True).special_tokens_mask
        first = mask.index(0) if 0 in mask else len(mask)
        return first, sum(mask) - first

    def _check_room(self, length: int, own: int) -> None:
        if length <= own:
            raise UserError(f"A length of {length} has no room for text beside the {own} special tokens.")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of the ids."""
        return super().decode_bytes(ids) if self._byte_level else self.decode(ids).encode()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids, with special tokens. What is no UTF-8 becomes U+FFFD; ids beyond the vocabulary are
        left out."""
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def continuation(self, before: Sequence[int] | np.ndarray, ids: Sequence[int] | np.ndarray) -> str:
        """The text that `ids` add to the ids before. Decoded alone, they could lose a leading space."""
        start, whole = self.decode(before), self.decode([*before, *ids])
        return whole.removeprefix(start) if whole.startswith(start) else self.decode(ids)

    def described(self) -> tuple[str, dict[str, Any]]:
        """(tokenizer.json, fields of tokenizer_config.json with the ids of begin and end): the files it came from."""
        ids = {f"{name}_id": self._tokenizer.token_to_id(token) for name, token in self.config.items()
               if name in ("bos_token", "eos_token")}
        return self._file, self.config | ids
