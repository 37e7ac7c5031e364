"""Encoded images to records: decoded once into a cached file if they fit in memory, else per batch in Grain threads."""

import hashlib
import json
import os
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab.data import cache_folder, digest, log
from lab.data.building import built
from lab.data.images.decode import (
    Decoded,
    Form,
    Problem,
    check_labels,
    complain,
    decode,
    in_threads,
    read_bytes,
    reshaped,
)
from lab.data.images.sources import Encoded, Pixels
from lab.data.pipeline import Arrays, Batch, Records
from lab.errors import UserError

FORMAT = 2  # version of the cached files; increment it to decode all images again
AT_ONCE = 1024  # images read and decoded together: at most a few hundred MB if small


@dataclass(frozen=True)
class Found:
    """The records of one split. `content`: hash of the files read; `corrupt`: names of the images left out; `changes`:
    conversion -> number of images."""

    records: Records
    content: str
    corrupt: tuple[str, ...] = ()
    changes: dict[str, int] = field(default_factory=dict)


def find(split: Pixels | Encoded, form: Form, classes: int, memory: float, skip_corrupt: bool) -> Found:
    """The records of a split, in memory if they take at most `memory` bytes there.

    Raises:
      UserError: names images of the wrong form, with an invalid label, or corrupt (except with `skip_corrupt`).
    """
    if isinstance(split, Pixels):
        check_labels(split, np.arange(len(split)), split.labels, classes)
        return Found(Arrays({"inputs": reshaped(split, form), "targets": split.labels}),
                     digest(split.images.shape, *(hashlib.sha256(a.tobytes()).hexdigest()
                                                  for a in (split.images, split.labels))))
    key = digest(FORMAT, split.identity(), asdict(form), classes, skip_corrupt)
    folder = cache_folder("images") / key
    found = _cached(folder, form)
    count = len(split if found is None else found.records)  # len() of a TFDS split takes seconds
    if count * form.height * form.width * form.channels > memory:
        return Found(Lazy(split, form, classes, skip_corrupt), digest(split.outline()))
    return built(folder, lambda where: _cached(where, form),
                 lambda where: _build(split, form, classes, skip_corrupt, where), "decoding the same images",
                 ", or --data.memory 0 to decode batch by batch")


# ------------------------------------------------------------------------------------------------------- cache


def _cached(folder: Path, form: Form) -> Found | None:
    """The files of `_build`, memory-mapped; None if missing or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        labels = np.fromfile(folder / "labels.bin", np.int32)
        images = np.memmap(folder / "images.bin", np.uint8, "r").reshape(-1, form.height, form.width, form.channels)
        if len(labels) == len(images) == meta["count"] and _sums(images, labels) == meta["sums"]:
            # A plain array view: indexing np.memmap itself creates a subclass instance each time.
            return Found(Arrays({"inputs": np.asarray(images), "targets": labels}), meta["content"],
                         tuple(meta["corrupt"]), meta["changes"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _sums(images: np.ndarray, labels: np.ndarray) -> list[int]:
    """Checksums of all images if they are small (0.05 s), else of some at both ends."""
    few = images if images.nbytes <= 64 << 20 else np.concatenate([images[:64], images[-64:]])
    return [zlib.crc32(np.ascontiguousarray(few)), zlib.crc32(labels)]


def _build(split: Encoded, form: Form, classes: int, skip_corrupt: bool, folder: Path) -> None:
    """Decode a split into images.bin (n, H, W, C), labels.bin and meta.json in `folder`."""
    begin = time.perf_counter()
    log.info("decoding %d images (once; kept in %s)", len(split), folder.parent)
    meta = _write(split, form, classes, skip_corrupt, folder)
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    log.info("decoded %d images in %.1f s", len(split), time.perf_counter() - begin)


def _write(split: Encoded, form: Form, classes: int, skip_corrupt: bool, folder: Path) -> dict[str, Any]:
    content, kept, misfits, corrupt, changes = hashlib.sha256(), [], [], [], Counter()

    def work(item: bytes | Path) -> tuple[bytes, Decoded | Problem]:
        raw = read_bytes(item)
        return hashlib.sha256(raw).digest(), decode(raw, form)

    with (folder / "images.bin").open("wb") as file:
        for start in range(0, len(split), AT_ONCE):
            indices = np.arange(start, min(start + AT_ONCE, len(split)))
            items, labels = split.read(indices)
            check_labels(split, indices, labels, classes)
            for i, (label, (hashed, result)) in enumerate(zip(labels, in_threads(work, items), strict=True), start):
                content.update(hashed + label.tobytes())
                if isinstance(result, Decoded):
                    kept.append(label)
                    file.write(np.ascontiguousarray(result.pixels))
                    changes.update(result.changes)
                elif result.corrupt:
                    corrupt.append((split.name(i), result.text))
                else:
                    misfits.append((split.name(i), result))
            complain(misfits, [], "")
        file.flush()
        os.fsync(file.fileno())
    complain([], [] if skip_corrupt else [f"{name} ({text})" for name, text in corrupt],
              ", or skip such images with --data.skip-corrupt")
    if not kept and not corrupt:
        raise UserError("There is no image to decode.")
    if not kept:
        raise UserError(f"None of the {len(split)} images can be decoded, {corrupt[0][0]} first ({corrupt[0][1]}).")
    labels = np.array(kept, np.int32)
    (folder / "labels.bin").write_bytes(labels.tobytes())
    images = np.memmap(folder / "images.bin", np.uint8, "r").reshape(-1, form.height, form.width, form.channels)
    return {"count": len(kept), "sums": _sums(images, labels), "content": content.hexdigest(),
            "corrupt": [name for name, _ in corrupt], "changes": changes}


# -------------------------------------------------------------------------------------------- batch by batch


class Lazy:
    """Records that are read and decoded per batch: one read, then decoding in Grain's 16 threads.

    A corrupt image raises UserError, or with `skip_corrupt` is replaced by the next one and logged once. On two busy
    cores 64 JPEGs of 375x500, resized, took 0.15 to 0.3 s; Python's own thread pool was not faster.
    """

    def __init__(self, split: Encoded, form: Form, classes: int, skip_corrupt: bool):
        import grain  # takes 3 to 4 s; import here, not in the prefetch thread

        self._threads = lambda items: list(
            grain.MapDataset.source(items).map(lambda item: decode(item, form)).to_iter_dataset())
        self._split, self._classes, self._skip, self._bad = split, classes, skip_corrupt, set()
        self._said: set[str] = set()

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        items, labels = self._split.read(indices)
        check_labels(self._split, indices, labels, self._classes)
        results = self._threads(items)
        for place, i in enumerate(indices):
            while isinstance(results[place], Problem):
                problem = results[place]
                name = self._split.name(int(i))
                complain([] if problem.corrupt else [(name, problem)],
                          [] if self._skip else [f"{name} ({problem.text})"], ", or set --data.skip-corrupt")
                if int(i) not in self._bad:
                    self._bad.add(int(i))
                    log.warning("%s is corrupt (%s): the next image takes its place", name, problem.text)
                if len(self._bad) == len(self):
                    raise UserError(f"None of the {len(self)} images can be decoded, {name} for one ({problem.text}).")
                i = (i + 1) % len(self)
                again, own = self._split.read(np.array([i]))
                results[place], labels[place] = self._threads(again)[0], own[0]
        for change in {change for result in results for change in result.changes} - self._said:
            self._said.add(change)
            log.warning("some images are %s", change)
        return {"inputs": np.stack([result.pixels for result in results]), "targets": labels}
