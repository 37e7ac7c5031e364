"""Text to token ids and back. All tokenizers except `Words` are lossless.

A *tokenizer* is part of an experiment's config (`Bytes`, `Chars`, `BPE`, `GPT2`, `Words`, or saved.py's `Saved`).
Fitting it on a corpus gives a `Fitted`:

    fit(texts, size) -> Fitted     texts("train"), texts("validation") stream pieces of text; size: about their bytes
    restore(state) -> Fitted       the result of `fit`, from the string Fitted.state
    identity() -> str              cache key of the result, together with the corpus' fingerprint
    vocab_size_hint                the vocabulary size if known before fitting, else None
"""

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lab.data.word_memory import EncodeBatch, WordMemory
from lab.errors import UserError
from lab.files import user_path

EOT = "<|endoftext|>"
SAMPLE = 50_000_000  # bytes of training text to learn a BPE vocabulary from
DISTINCT = 6_000_000  # bytes of distinct words among them; the library takes about 110 bytes of memory per word
Texts = Callable[[str], Iterator[str]]


class Fitted:
    """A tokenizer with its vocabulary.

    `size`: number of ids. `byte_counts`: int32 (size,), UTF-8 bytes per id, 0 for end-of-text, so that bits per byte
    can be compared across tokenizers. `eot`: the end-of-text id or None. `state`: the argument of `restore`.
    """

    def __init__(self, pieces: Sequence[bytes], encode_batch: EncodeBatch, eot: int | None = None, state: str = ""):
        self.pieces, self.eot, self.state = list(pieces), eot, state
        self.size = len(self.pieces)
        self.byte_counts = np.array([0 if i == eot else len(p) for i, p in enumerate(self.pieces)], np.int32)
        self._encode_batch = encode_batch

    @property
    def pads(self) -> bool:
        """Whether text never encodes to id 0 (end-of-text or unused), so that it can be padding."""
        return self.eot == 0 or not self.pieces[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 array of ids per text; never with end-of-text, even if a text contains its spelling."""
        return self._encode_batch(texts)

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, int32 (n,). UserError for text that is not valid UTF-8 (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"The text has no UTF-8 form: character {error.start} is a lone surrogate.") from None
        return self.encode_batch([text])[0]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of the ids. An id beyond the vocabulary (of a padded model) becomes U+FFFD."""
        pieces, size = self.pieces, self.size
        return b"".join([pieces[i] if i < size else b"\xef\xbf\xbd" for i in np.asarray(ids).tolist()])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; bytes that are not UTF-8 (a sample cut inside a character) become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")


class Tokenizer(Protocol):
    """A tokenizer config; see the module docstring."""

    @property
    def vocab_size_hint(self) -> int | None: ...
    def validate(self) -> None: ...
    def identity(self) -> str: ...
    def fit(self, texts: Texts, size: int) -> Fitted: ...
    def restore(self, state: str) -> Fitted: ...


# -------------------------------------------------------------------------------------------- bytes, characters


@dataclass(frozen=True)
class Bytes:
    """The 256 byte values, without an end-of-text token."""

    @property
    def vocab_size_hint(self) -> int:
        return 256

    def validate(self) -> None:
        """There are no fields to check."""

    def identity(self) -> str:
        return "bytes"

    def fit(self, texts: Texts, size: int) -> Fitted:
        return self.restore("")

    def restore(self, state: str) -> Fitted:
        def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

        return Fitted([bytes([i]) for i in range(256)], encode_batch)


@dataclass(frozen=True)
class Chars:
    """The distinct characters of the corpus (both splits), sorted; no end-of-text token. Tiny Shakespeare has 65."""

    @property
    def vocab_size_hint(self) -> None:
        return None

    def validate(self) -> None:
        """There are no fields to check."""

    def identity(self) -> str:
        return "chars"

    def fit(self, texts: Texts, size: int) -> Fitted:
        seen = np.zeros(0x110000, bool)
        for split in ("train", "validation"):
            for text in texts(split):
                seen[_codepoints(text)] = True
        return self.restore(json.dumps("".join(map(chr, np.flatnonzero(seen)))))

    def restore(self, state: str) -> Fitted:
        characters = json.loads(state)
        table = np.full(0x110000, -1, np.int32)
        table[_codepoints(characters)] = np.arange(len(characters))

        def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
            found = [table[_codepoints(text)] for text in texts]
            for text, ids in zip(texts, found, strict=True):
                if ids.size and ids.min() < 0:
                    raise UserError(
                        f"The character {text[int(ids.argmin())]!r} is not among the {len(characters)} of the training "
                        f"data: leave it out, or train with Bytes() or BPE()."
                    )
            return found

        return Fitted([c.encode() for c in characters], encode_batch, state=state)


def _codepoints(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


# -------------------------------------------------------------------------------------------------- byte-level BPE


def _alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte value, in GPT-2's order of ids: character -> byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True)
class BPE:
    """Byte-level byte-pair encoding with GPT-2's splitting pattern, cached with the tokens.

    Learned from at most about 50 MB of the training split, evenly spaced; for text whose words hardly repeat (Chinese,
    base64), from its beginning. Id 0 is `<|endoftext|>`. A small corpus may give fewer ids than `vocab`.
    """

    vocab: int = 4096
    """Number of ids: `<|endoftext|>`, the 256 bytes, and the merges."""

    @property
    def vocab_size_hint(self) -> int:
        return self.vocab

    def validate(self) -> None:
        """UserError if `vocab` is too small for the bytes."""
        if self.vocab < 257:
            raise UserError(f"BPE(vocab={self.vocab}) is too small: 256 bytes and {EOT} need 257. Or use Bytes().")

    def identity(self) -> str:
        return f"bpe {self.vocab} {SAMPLE} {DISTINCT}"

    def fit(self, texts: Texts, size: int) -> Fitted:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all bytes, so any text can be encoded
            show_progress=False,
        )
        every = -(-size // SAMPLE)
        sample = (text for i, text in enumerate(texts("train")) if i % max(every, 1) == 0)
        tokenizer.train_from_iterator(_bounded(sample), trainer)
        return self.restore(tokenizer.to_str())

    def restore(self, state: str) -> Fitted:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(state)
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is encoded as text
        alphabet = _alphabet()
        names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        pieces = [name.encode() if name == EOT else bytes(alphabet[c] for c in name) for name in names]

        def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
            found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(one.ids, np.int32) for one in found]

        return _remembering(Fitted(pieces, encode_batch, tokenizer.token_to_id(EOT), state))


def _bounded(texts: Iterator[str]) -> Iterator[str]:
    """The texts until `DISTINCT` is reached: the library's memory grows with the distinct words."""
    seen: set[str] = set()
    size = 0
    for text in texts:
        yield text
        new = set(_WORD.findall(text)) - seen
        seen |= new
        size += len("".join(new).encode())
        if size > DISTINCT:
            return


def _remembering(fitted: Fitted) -> Fitted:
    """The same tokenizer, much faster on long texts. It must split as GPT-2's pattern does."""
    encode_batch = WordMemory(fitted.encode_batch, fitted.byte_counts)
    return Fitted(fitted.pieces, encode_batch, fitted.eot, fitted.state)


# ---------------------------------------------------------------------------------------------------------- GPT-2


_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
DOWNLOAD_SECONDS = 20.0


@dataclass(frozen=True)
class GPT2:
    """GPT-2's 50,257 tokens, through the `tiktoken` extra; `<|endoftext|>` is id 50256.

    Without a folder, tiktoken downloads and caches the vocabulary.
    """

    folder: str | None = None
    """A folder with OpenAI's vocab.bpe or Hugging Face's merges.txt, for a machine without network access."""

    @property
    def vocab_size_hint(self) -> int:
        return 50257

    def validate(self) -> None:
        """Nothing can be checked without reading."""

    def identity(self) -> str:
        """Key of the merges in use; UserError if the folder has none."""
        return "gpt2 " + hashlib.sha256(_merges_file(self.folder).read_bytes()).hexdigest() if self.folder else "gpt2"

    def fit(self, texts: Texts, size: int) -> Fitted:
        return self.restore("")

    def restore(self, state: str) -> Fitted:
        """UserError if tiktoken or its vocabulary is missing."""
        try:
            import tiktoken
        except ImportError:
            raise UserError("GPT2() needs tiktoken: LAB_EXTRAS=tiktoken ./launch.sh ...") from None
        encoding = _gpt2_from(self.folder, tiktoken) if self.folder else _gpt2_downloaded(tiktoken)
        pieces = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
        threads = os.cpu_count() or 1

        def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
            if len(texts) == 1:  # a prompt: skip the thread pool
                return [np.array(encoding.encode_ordinary(texts[0]), np.int32)]
            return [np.array(ids, np.int32) for ids in encoding.encode_ordinary_batch(list(texts), num_threads=threads)]

        return _remembering(Fitted(pieces, encode_batch, encoding.eot_token))


def _merges_file(folder: str) -> Path:
    where = user_path(folder)
    for name in ("vocab.bpe", "merges.txt"):
        if (where / name).is_file():
            return where / name
    raise UserError(f"GPT2(folder={folder!r}) finds neither vocab.bpe nor merges.txt in {where.absolute()}.")


def _gpt2_from(folder: str, tiktoken: Any) -> Any:
    """GPT-2's encoding from its list of merges: 256 bytes in GPT-2's order, then one token per merge."""
    path, alphabet = _merges_file(folder), _alphabet()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        # The first line is "#version: ..."; a later "#" is a token.
        pairs = [line.split() for i, line in enumerate(lines) if line and not (i == 0 and line.startswith("#version"))]
        merges = [bytes(alphabet[c] for c in left + right) for left, right in pairs]
    except (ValueError, KeyError):
        raise UserError(f"{path} is not a list of byte-level BPE merges (one pair a line, UTF-8).") from None
    ranks = {token: rank for rank, token in enumerate([bytes([b]) for b in alphabet.values()] + merges)}
    if len(ranks) != 50256:
        raise UserError(f"{path} gives {len(ranks)} tokens where GPT-2 has 50256: it is not GPT-2's, or cut short.")
    return tiktoken.Encoding("gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 50256})


def _gpt2_downloaded(tiktoken: Any) -> Any:
    """tiktoken's own encoding. Its download has no timeout, so one is set here."""
    result: list[Any] = []

    def get() -> None:
        try:
            result.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # raised below as one sentence
            result.append(error)

    if all(_tiktoken_has(name) for name in ("vocab.bpe", "encoder.json")):
        get()
    else:
        thread = threading.Thread(target=get, daemon=True)
        thread.start()
        thread.join(DOWNLOAD_SECONDS)
    if not result or isinstance(result[0], Exception):
        reason = type(result[0]).__name__ if result else f"no answer in {DOWNLOAD_SECONDS:.0f} s"
        raise UserError(
            f"GPT-2's vocabulary is not on this machine and cannot be downloaded ({reason}): copy vocab.bpe or "
            f"merges.txt into a folder and give GPT2(folder), or use BPE()."
        )
    return result[0]


def _tiktoken_has(name: str) -> bool:
    env = os.environ
    folder = env.get("TIKTOKEN_CACHE_DIR") or env.get("DATA_GYM_CACHE_DIR")
    folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return os.path.exists(os.path.join(folder, hashlib.sha1((_GPT2_FILES + name).encode()).hexdigest()))


# ----------------------------------------------------------------------------------------------------------- words


UNKNOWN = "<unk>"
_WORD = re.compile(r"\w+(?:'\w+)*")  # letters, digits and _, with apostrophes inside: don't


def with_padding(fitted: Fitted) -> Fitted:
    """The same tokenizer with id 0 reserved for padding: shifts all ids up by one if needed."""
    if fitted.pads:
        return fitted
    eot = None if fitted.eot is None else fitted.eot + 1
    moved = lambda texts: [ids + 1 for ids in fitted.encode_batch(texts)]
    return Fitted([b"", *fitted.pieces], moved, eot, fitted.state)
