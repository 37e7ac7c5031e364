"""Finds and describes data sets prepared by TFDS on this disk, without TFDS, TensorFlow or the network."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.errors import Absent, UserError
from lab.files import user_path


def described(name: str, data_dir: str | None) -> tuple[Path, dict[str, dict[str, Any]], dict[str, Any]]:
    """Folder, splits and features of a prepared data set. UserError if it does not exist as ArrayRecord."""
    folder = prepared_folder(name, data_dir)
    try:
        info = json.loads((folder / "dataset_info.json").read_bytes())
        if info.get("fileFormat") != "array_record":
            raise UserError(f"{folder} was prepared as {info.get('fileFormat')}, which needs TensorFlow to read: "
                            f"run ./launch.sh prepare {name}")
        types = json.loads((folder / "features.json").read_bytes())
        if strange := next(_foreign_classes(types), None):
            raise UserError(f"{folder}/features.json names the class {strange!r}, which is not TFDS's own and which "
                            f"reading would import, so nothing is read: run ./launch.sh prepare {name}")
        features = types.get("featuresDict", {}).get("features", {})
        languages = dict.fromkeys(types.get("translation", {}).get("languages", []), {})  # of a Translation
        return folder, {s["name"]: s for s in info.get("splits", [])}, features or languages
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"The descriptions in {folder} are damaged ({error}): run ./launch.sh prepare {name}") from None


def _foreign_classes(value: Any) -> Iterator[str]:
    """The classes in features.json, at any depth, that are not TFDS's own: TFDS would import their modules."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list):
            yield from _foreign_classes(inner)
        elif key == "json":  # features that TFDS serialises as plain JSON
            yield from _foreign_classes(json.loads(inner))
        elif key in ("pythonClassName", "python_class_name", "type") and "." in str(inner) and \
                not re.fullmatch(r"tensorflow_datasets(\.\w+)+", str(inner)):
            yield str(inner)


def prepared_folder(name: str, data_dir: str | None) -> Path:
    """The folder of the newest prepared version of a data set, found without TFDS and without the network."""
    root = user_path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    path, _, version = name.partition(":")
    found = [
        info.parent
        for info in [*(root / path).glob("*/dataset_info.json"), *(root / path).glob("*/*/dataset_info.json")]
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name) and version in ("", info.parent.name)
    ]
    if not found:
        beside = sorted({info.parents[1].relative_to(root).as_posix()
                         for info in (root / path).parent.glob("*/*/dataset_info.json") if "/" in path})
        there = f", but {', '.join(beside)}" if beside else ""
        raise Absent(f"The data set {name} is not prepared under {root}{there}: run ./launch.sh prepare {name}")
    kinds = sorted({folder.parent.relative_to(root).as_posix() for folder in found})
    if len(kinds) > 1:
        raise UserError(f"{name} is prepared in several configurations under {root}: name one of {', '.join(kinds)}.")
    return max(found, key=lambda folder: [int(part) for part in folder.name.split(".")])
