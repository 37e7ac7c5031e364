"""Text to token ids and back. All tokenizers except `Words` are lossless.

A *tokenizer* is part of an experiment's config (`Bytes`, `Chars`, `BPE`, `GPT2`, `Words`, saved.py's `Saved`, or
hugging_face.py's `HuggingFaceTokenizer`). Fitting it on a corpus gives a `Fitted`:

    fit(texts, size) -> Fitted     texts("train"), texts("validation") stream pieces of text; size: about their bytes
    restore(state) -> Fitted       the result of `fit`, from the string Fitted.state
    identity() -> str              cache key of the result, together with the corpus' fingerprint
    vocab_size_hint                the vocabulary size if known before fitting, else None
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from lab.data.gpt2 import alphabet, downloaded, merges_file, read_merges
from lab.data.word_memory import EncodeBatch, WordMemory
from lab.errors import UserError

EOT = "<|endoftext|>"
SAMPLE = 50_000_000  # bytes of training text to learn a BPE vocabulary from
DISTINCT = 6_000_000  # bytes of distinct words among them; the library takes about 110 bytes of memory per word
Texts = Callable[[str], Iterator[str]]


class Fitted:
    """A tokenizer with its vocabulary.

    `size`: number of ids. `byte_counts`: int32 (size,), UTF-8 bytes per id, 0 for end-of-text, so that bits per byte
    can be compared across tokenizers. `eot`: the end-of-text id or None. `state`: the argument of `restore`.
    """

    pad = 0
    """The id of padding, which a mask hides."""

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

    def cut(self, ids: np.ndarray, length: int, side: Literal["end", "start"]) -> np.ndarray:
        """At most `length` of a text's ids, cut at a side."""
        return ids[:length] if side == "end" else ids[-length:]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of the ids. An id beyond the vocabulary (of a padded model) becomes U+FFFD."""
        pieces, size = self.pieces, self.size
        return b"".join([pieces[i] if i < size else b"\xef\xbf\xbd" for i in np.asarray(ids).tolist()])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; bytes that are not UTF-8 (a sample cut inside a character) become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def continuation(self, before: Sequence[int] | np.ndarray, ids: Sequence[int] | np.ndarray) -> str:
        """The text that `ids` add to the ids before."""
        return self.decode(ids)


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

        return _byte_level(Tokenizer.from_str(state), state)


def _byte_level(tokenizer: Any, state: str) -> Fitted:
    """`tokenizer`: a byte-level BPE with GPT-2's splitting pattern, of the tokenizers library."""
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is encoded as text
    byte = alphabet()
    names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    pieces = [name.encode() if name == EOT else bytes(byte[c] for c in name) for name in names]

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in found]

    fitted = Fitted(pieces, encode_batch, tokenizer.token_to_id(EOT), state)
    fitted._encode_batch = WordMemory(encode_batch, fitted.byte_counts)  # much faster on long texts
    return fitted


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


# ---------------------------------------------------------------------------------------------------------- GPT-2


@dataclass(frozen=True)
class GPT2:
    """GPT-2's 50,257 tokens; `<|endoftext|>` is id 50256.

    Without a folder, the list of merges is downloaded once from Hugging Face, into its cache (`HF_HOME`).
    """

    folder: str | None = None
    """A folder with GPT-2's merges.txt (OpenAI's name: vocab.bpe) or tokenizer.json."""

    @property
    def vocab_size_hint(self) -> int:
        return 50257

    def validate(self) -> None:
        """Nothing can be checked without reading."""

    def identity(self) -> str:
        """Key of the merges in use; UserError if the folder has none."""
        return "gpt2 " + hashlib.sha256(merges_file(self.folder).read_bytes()).hexdigest() if self.folder else "gpt2"

    def fit(self, texts: Texts, size: int) -> Fitted:
        return self.restore("")

    def restore(self, state: str) -> Fitted:
        """UserError if the list of merges is missing or not GPT-2's."""
        path = merges_file(self.folder) if self.folder else downloaded()
        merges = read_merges(path)
        if (size := len(set(map("".join, merges)) | alphabet().keys())) != 50256:
            raise UserError(f"{path} gives {size} tokens where GPT-2 has 50256: it is not GPT-2's, or cut short.")
        return _from_merges(merges)


def _from_merges(merges: Sequence[tuple[str, str]]) -> Fitted:
    """Ids are GPT-2's: 256 bytes in the alphabet's order, one token per merge (as in vocab.json), end-of-text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {name: i for i, name in enumerate([*alphabet(), *map("".join, merges), EOT])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([EOT])
    return _byte_level(tokenizer, "")


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
