"""The data of a task from files on this machine, in the layouts in which such data is passed on.

In a folder with the last part of the data set's name (blimp for nyu-mll/blimp): files .jsonl, .json, .csv or .parquet,
also in .tar archives, also compressed (.gz, .xz). A file is named after the configuration of the data set that it
holds, as in BLiMP (`adjunct_island.jsonl`), or after a split (`test.jsonl.xz`, `test-00000-of-00001.parquet`).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lab.errors import UserError

Rows = list[dict[str, Any]]
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation",
          "dev": "validation"}
UNPACK = {".gz": gzip.decompress, ".xz": lzma.decompress}


def read_local(folder: Path, path: str, name: str | None) -> dict[str, Rows] | None:
    """Split -> rows of the data set `path` (nyu-mll/blimp) and its configuration `name`; None: it is not there.

    Where a file is a whole configuration, without splits, the split is "".

    Raises:
      UserError: a file is damaged, or of no known kind.
    """
    last = path.rsplit("/", 1)[-1]
    place = next((p for p in (folder / last, folder) if p.is_dir() and p.name == last), None)
    if place is None:
        return None
    files = dict(_files(place))
    own = [file for file in files if name and _stem(file) == name]
    if own:
        return {"": _rows(own[0], files[own[0]])}
    inside = [file for file in files if name and name in file.parts[:-1]]
    if not inside:  # other folders are other configurations
        inside = [file for file in files if name is None or file.parts[:-1] in ((), ("data",))]
    found: dict[str, Rows] = {}
    for file in sorted(inside):
        split = re.split(r"[^a-z]", _stem(file).lower())[0]
        if split in SPLITS:
            found.setdefault(split, []).extend(_rows(file, files[file]))
    # A set may have both dev and validation, as MMLU has.
    return {SPLITS[split]: rows for split, rows in found.items() if SPLITS[split] not in found} | found or None


def _stem(file: PurePosixPath) -> str:
    return file.name.split(".")[0]


def _files(place: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    """(path, how to read it) of all files, and of those inside archives."""
    for path in sorted(place.rglob("*")):
        if path.is_file() and ".tar" in path.suffixes:
            yield from _members(path)
        elif path.is_file():
            yield PurePosixPath(path.relative_to(place).as_posix()), path.read_bytes


def _members(archive: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    try:
        with tarfile.open(archive) as file:
            names = [member.name for member in file if member.isfile()]
    except (tarfile.TarError, OSError, EOFError, lzma.LZMAError) as e:
        raise UserError(f"{archive} is damaged ({e}).") from None

    def read(name: str) -> bytes:
        with tarfile.open(archive) as file:
            return file.extractfile(name).read()

    for name in names:
        yield PurePosixPath(name), lambda name=name: read(name)


def _rows(path: PurePosixPath, read: Callable[[], bytes]) -> Rows:
    try:
        content, suffixes = read(), list(path.suffixes)
        while suffixes and suffixes[-1] in UNPACK:
            content = UNPACK[suffixes.pop()](content)
        kind = suffixes[-1] if suffixes else ""
        if kind == ".jsonl":
            return [json.loads(line) for line in content.decode().split("\n") if line.strip()]
        if kind == ".json":
            return json.loads(content)
        if kind == ".csv":
            return list(csv.DictReader(io.StringIO(content.decode())))
        if kind == ".parquet":
            import pyarrow.parquet  # `datasets` brings it

            return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (ValueError, OSError, EOFError, lzma.LZMAError, tarfile.TarError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {str(e)[:100]}).") from None
    raise UserError(f"{path} is none of .jsonl, .json, .csv and .parquet, also as .gz or .xz.")
