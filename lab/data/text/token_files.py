"""A corpus as a cached token file: written once, checked, memory-mapped."""

import json
import mmap
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lab.data import cache_folder, digest, log
from lab.data.building import built
from lab.data.text.files import Corpus, Documents, Survey, pieces
from lab.data.tokenizers import Fitted, Tokenizer
from lab.errors import UserError

FORMAT = 2  # version of the token folder; increment it to tokenise every corpus again
SPLITS = ("train", "validation")
AT_ONCE = 1 << 20  # characters per encoding call: few calls, with arrays of tens of megabytes
FULL_CHECK = 64 << 20  # checksum whole files up to this many bytes at each start (0.05 s), larger ones at both ends
END = 1 << 20


def token_files(corpus: Corpus, tokenizer: Tokenizer) -> tuple[Path, dict[str, Any]]:
    """The folder with train.bin, validation.bin, tokenizer.json and meta.json, and the content of meta.json.

    The folder's name is a fingerprint of the text, the split and the tokenizer. It is published atomically and rebuilt
    if damaged. UserError if the disk is full or the text changes during reading.
    """
    survey = corpus.survey()
    folder = _folder(corpus, survey, tokenizer)
    return folder, built(folder, _checked, lambda where: _build(corpus, survey, tokenizer, where),
                         "tokenising the same text")


def _folder(corpus: Corpus, survey: Survey, tokenizer: Tokenizer) -> Path:
    return cache_folder("tokens") / digest(FORMAT, survey.fingerprint, corpus.rule(survey), tokenizer.identity())


def _checked(folder: Path) -> dict[str, Any] | None:
    """The folder's meta.json if all files are undamaged; otherwise logs the damage and returns None."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        check = meta.pop("check")
        bad = [] if check == digest(meta) else ["meta.json"]
        bad += [name for name, want in meta["files"].items() if _sums(folder / name) != want]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        bad = ["meta.json"] if folder.exists() else []
        meta = None
    if bad:
        log.warning("the token cache %s is damaged: %s", folder, ", ".join(bad))
        return None
    return meta


def _sums(path: Path) -> list[int]:
    """Size and checksums, of the whole file if small, else of its first and last megabyte."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > FULL_CHECK:
                first = zlib.crc32(file.read(END))
                file.seek(-END, os.SEEK_END)
                return [size, first, zlib.crc32(file.read(END))]
            crc = 0
            while block := file.read(END):
                crc = zlib.crc32(block, crc)
            return [size, crc]
    except FileNotFoundError:
        return []


def _build(corpus: Corpus, survey: Survey, tokenizer: Tokenizer, folder: Path) -> None:
    """Fill a folder. UserError if the text changes meanwhile."""
    log.info("tokenising %s with %r (once; kept in %s)", corpus.title, tokenizer, folder.parent)
    begin, before = time.perf_counter(), corpus.identity()
    meta = _write(corpus, survey, tokenizer, folder)
    if corpus.identity() != before:
        raise UserError(f"{corpus.title} changed while it was read: run again when it is complete.")
    tokens, seconds = sum(meta[split]["tokens"] for split in SPLITS), time.perf_counter() - begin
    log.info("tokenised %d tokens in %.1f s", tokens, seconds)


def _write(corpus: Corpus, survey: Survey, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    def texts(split: str) -> Iterator[str]:
        return (piece for document in corpus.documents(split, survey) for piece in pieces(document))

    fitted = tokenizer.fit(texts, survey.bytes)
    dtype = "uint16" if fitted.size <= 1 << 16 else "uint32"
    meta: dict[str, Any] = {"title": corpus.title, "rule": corpus.rule(survey), "source": survey.fingerprint}
    meta |= {"tokenizer": tokenizer.identity(), "vocab": fitted.size, "dtype": dtype, "skipped": len(survey.skipped)}
    meta |= {"encodings": ", ".join(survey.encodings)} if survey.encodings else {}
    with (folder / "tokenizer.json").open("wb") as file:
        file.write(fitted.state.encode())
    for split in SPLITS:
        with (folder / f"{split}.bin").open("wb") as file:
            meta[split] = {"documents": 0, "bytes": 0, "tokens": 0}
            for documents, ids in _encoded(corpus.documents(split, survey), fitted):
                file.write(ids.astype(dtype).data)  # ndarray.tofile does not report a full disk
                meta[split]["documents"] += documents
                meta[split]["tokens"] += len(ids)
                meta[split]["bytes"] += int(fitted.byte_counts.take(ids).sum())
            file.flush()
            os.fsync(file.fileno())
    meta["files"] = {name: _sums(folder / name) for name in ("train.bin", "validation.bin", "tokenizer.json")}
    meta["check"] = digest(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
    return meta


def _encoded(documents: Documents, fitted: Fitted) -> Iterator[tuple[int, np.ndarray]]:
    """(number of documents begun, ids) for blocks of a few megabytes of text, end-of-text ids between documents."""
    separator = np.array([] if fitted.eot is None else [fitted.eot], np.int32)
    texts: list[str] = []
    begins: set[int] = set()  # indices of `texts` that start a document and need a separator before it
    count = size = 0
    started = False

    def flush() -> tuple[int, np.ndarray]:
        parts = []
        for i, ids in enumerate(fitted.encode_batch(texts)):
            parts += [separator, ids] if i in begins else [ids]
        return count, np.concatenate(parts)

    for document in documents:
        for i, piece in enumerate(pieces(document)):
            if i == 0:
                count += 1
                if started:
                    begins.add(len(texts))
                started = True
            texts.append(piece)
            size += len(piece)
            if size >= AT_ONCE:
                yield flush()
                texts, begins, count, size = [], set(), 0, 0
    if texts:
        yield flush()


def _mapped(path: Path, dtype: str) -> np.ndarray:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return np.empty(0, dtype)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def read_ahead(tokens: np.ndarray, begins: np.ndarray, width: int) -> None:
    """Asks the kernel to read exactly the pages of these windows of `width` tokens from a large token file (madvise).

    Otherwise a file outside the page cache is read one page fault at a time, each with the kernel's readahead. The
    first batch of gpt_small's size then read 558 MB (0.4-107 s), now 3 MB (0.01-0.06 s); costs 0.6 ms when cached.
    """
    file = _large_file(tokens)
    if file is None:
        return
    bytes_before = np.clip(begins, 0, len(tokens) - width) * tokens.itemsize
    pages = bytes_before // mmap.PAGESIZE * mmap.PAGESIZE
    lengths = bytes_before + width * tokens.itemsize - pages
    for page, length in zip(pages.tolist(), lengths.tolist(), strict=True):
        file.madvise(mmap.MADV_WILLNEED, page, length)


def _large_file(tokens: np.ndarray) -> mmap.mmap | None:
    """The file mapped by a split's tokens; None if the checksum at the start has read it whole."""
    file = getattr(tokens.base, "obj", None)
    return file if tokens.nbytes > FULL_CHECK and isinstance(file, mmap.mmap) else None


def decoded(tokens: np.ndarray, fitted: Fitted, limit: int | None) -> bytes:
    """The first `limit` bytes of the text of a split's tokens (None: all), without separators."""
    found, done = [], 0
    for start in range(0, len(tokens), END):
        ids = tokens[start : start + END]
        found.append(fitted.decode_bytes(ids if fitted.eot is None else ids[ids != fitted.eot]))
        done += len(found[-1])
        if limit is not None and done >= limit:
            break
    return b"".join(found)[:limit]


def corpus_sizes(meta: dict[str, Any]) -> dict[str, str | int | float]:
    """Sizes in the meta.json of a token folder, to print."""
    lines = {"vocabulary": meta["vocab"], "skipped documents": meta["skipped"]}
    lines |= {"encodings": meta["encodings"]} if "encodings" in meta else {}
    for split in SPLITS:
        lines |= {f"{split} {what}": meta[split][what] for what in ("documents", "bytes", "tokens")}
    tokens = sum(meta[split]["tokens"] for split in SPLITS)
    return lines | {"bytes per token": round(sum(meta[split]["bytes"] for split in SPLITS) / tokens, 3)}
