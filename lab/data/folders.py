"""Labelled files in folders: tells split folders from class folders, and lists every real file once.

Two layouts are supported, for images and texts: ROOT/CLASS/FILE and ROOT/SPLIT/CLASS/FILE. Only this module interprets
folder names. An ambiguous layout is an error, which the source's field `splits` resolves.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from lab.errors import UserError

Splits = Literal["auto", "folders", "none"]
SPLITS = {"train": "train", "training": "train", "trn": "train", "test": "test", "testing": "test", "tst": "test",
          "holdout": "test", "heldout": "test", "hold-out": "test", "held-out": "test", "hold_out": "test",
          "held_out": "test", "validation": "validation", "valid": "validation", "val": "validation",
          "validate": "validation", "validating": "validation",
          "dev": "validation", "development": "validation", "eval": "validation", "evaluation": "validation"}
# Allowed suffixes of a split name: test_set, trainImages, val-split, Train_2.
_AFTER = (r"(?:[-_. ]*(?:sets?|data|datasets?|images?|imgs?|pics?|texts?|files?|folders?|dirs?|splits?"
          r"|samples?|examples?|records?|jpe?g|png|resized|cropped|\d+(?:x\d+)?))*")
_SPLIT = re.compile(rf"(?:.*[-_. ])?({'|'.join(sorted(SPLITS, key=len, reverse=True))}){_AFTER}", re.IGNORECASE)
# Kaggle's test sets: the public one is used while working, the private one once (FER2013).
_KAGGLE = re.compile(rf"(?:.*[-_. ])?(public|private)[-_. ]?test{_AFTER}", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_LISTED = 12  # names in a message


def split_of(name: str) -> str | None:
    """"train", "validation" or "test" for Training, test_set, seg_train, PublicTest; None for other names."""
    if kaggle := _KAGGLE.fullmatch(name):
        return "validation" if kaggle[1].lower() == "public" else "test"
    found = _SPLIT.fullmatch(name)
    return SPLITS[found[1].lower()] if found else None


# ------------------------------------------------------------------------------------------------------- files


@dataclass
class Tree:
    """The visible files and folders below `root`. Links are followed, and each real file is listed once."""

    root: Path
    files: dict[Path, list[str]] = field(default_factory=dict)
    """Folder -> names of its files."""
    folders: dict[Path, list[str]] = field(default_factory=dict)
    """Folder -> sorted names of its subfolders."""
    copies: int = 0
    """Number of links left out, because the target is listed already or contains the link itself."""
    special: int = 0
    """Number of pipes, sockets and devices left out: reading them may never end."""

    def below(self, folder: Path) -> list[Path]:
        """All files below a folder, sorted."""
        found, waiting = [], [folder]
        while waiting:
            here = waiting.pop()
            found += [here / name for name in self.files[here]]
            waiting += [here / name for name in self.folders[here]]
        return sorted(found)

    def notes(self) -> dict[str, str | int | float]:
        """Lines to print about what was left out."""
        counts = {"links to files already listed, left out": self.copies, "pipes and devices, left out": self.special}
        return {what: n for what, n in counts.items() if n}


def tree(root: Path) -> Tree:
    """The tree below a folder. A real file or folder takes precedence over a link to it. UserError if unreadable."""
    found = Tree(root)
    top = os.path.realpath(root)
    there: dict[str, Path] = {}  # real path of a folder -> its path here
    linked: set[str] = set()  # real paths of files reached by links
    folder_links: list[Path] = []
    file_links: list[Path] = []

    def walk(folder: Path, real: str) -> None:
        there[real] = folder
        files, folders = found.files.setdefault(folder, []), found.folders.setdefault(folder, [])
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                inner = os.path.join(real, entry.name)
                if entry.name[0] == "." or entry.name == "__MACOSX":  # __MACOSX: from macOS archives
                    continue
                if entry.is_symlink():
                    (folder_links if os.path.isdir(entry.path) else file_links).append(folder / entry.name)
                elif entry.is_file():
                    files.append(entry.name)
                elif not entry.is_dir():
                    found.special += 1
                elif inner in there:
                    found.copies += 1
                else:
                    folders.append(entry.name)
                    walk(folder / entry.name, inner)

    def follow_folder(link: Path) -> None:
        real = os.path.realpath(link)
        if real in there or (top + os.sep).startswith(real.rstrip(os.sep) + os.sep):
            found.copies += 1
        else:
            found.folders[link.parent] = sorted([*found.folders[link.parent], link.name])
            walk(link, real)

    def follow_file(link: Path) -> None:
        real = os.path.realpath(link)
        if real in linked or os.path.basename(real) in found.files.get(there.get(os.path.dirname(real)), []):
            found.copies += 1
        elif os.path.exists(real) and not os.path.isfile(real):
            found.special += 1
        else:  # also a broken link: reading it will raise
            linked.add(real)
            found.files[link.parent].append(link.name)

    try:
        walk(root, top)
        while folder_links:  # before file links, which may point into these folders
            follow_folder(folder_links.pop(0))
        for link in file_links:
            follow_file(link)
    except OSError as error:
        raise UserError(f"Cannot read the folder {error.filename or root}: {error.strerror}.") from None
    return found


# ------------------------------------------------------------------------------------------- splits and classes


def split_folders(found: Tree, splits: Splits) -> tuple[dict[str, Path], list[str]]:
    """({"train", "validation", "test"} -> folder, names of the folders left out).

    If no folder is named like a split, or with splits="none", the root is "train". With a training and a held-out
    folder, all other folders are left out, and so is a held-out folder without class folders (Kaggle's test sets have
    no labels). The splits may be one level down (ROOT/images/train), and a split may contain a folder of the same name
    (seg_train/seg_train).

    Raises:
      UserError: the splits are ambiguous; the message names the field that resolves it.
    """
    root = found.root if splits == "none" else _unwrapped(found)
    names = [] if splits == "none" else found.folders[root]
    kinds = {name: split_of(name) for name in names}
    if not any(kinds.values()):
        if splits != "none":
            _check_classes_first(found, root)
            _check_alike(found, root)
            _check_words(found, root)
        return {"train": root}, []
    chosen: dict[str, Path] = {}
    doubles = []
    for name in sorted(names, key=len):
        if kinds[name] and kinds[name] not in chosen:
            chosen[kinds[name]] = root / name
        elif kinds[name]:
            doubles.append(name)
    others = [name for name in names if kinds[name] is None]
    unclear = doubles or (others if splits == "auto" and len(chosen) < 2 else [])
    if unclear or "train" not in chosen:
        what = f"what {unclear[0]} is" if unclear else "which folder is for training"
        raise UserError(f"{root} has folders that are named like splits, each of which may be there once, but it is "
                        f"not clear {what}: it has {_some(names)}. Rename them, or set --data.source.splits: folders "
                        f"uses those named like splits and leaves out the others, none takes all of them for classes.")
    for kind, folder in chosen.items():
        while not found.files[folder] and len(inner := found.folders[folder]) == 1 and split_of(inner[0]) == kind:
            folder = chosen[kind] = folder / inner[0]
    bare = [kind for kind, folder in chosen.items() if kind != "train" and not found.folders[folder]]
    return chosen, [*others, *(f"{chosen.pop(kind).name} (no class folders)" for kind in bare)]


def _unwrapped(found: Tree) -> Path:
    """The root, or its only subfolder if that contains the splits."""
    folder = found.root
    while not any(map(split_of, found.folders[folder])):
        if len(found.folders[folder]) != 1:
            return found.root
        folder = folder / found.folders[folder][0]
    return folder


def _check_classes_first(found: Tree, root: Path) -> None:
    """UserError for the layout CLASS/SPLIT/FILE, which would silently merge the splits."""
    for name in found.folders[root]:
        inner = found.folders[root / name]
        if "train" in (kinds := [split_of(folder) for folder in inner]) and all(kinds) and len(kinds) > 1:
            raise UserError(f"{root / name} is named like a class but holds the splits {_some(inner)}: put the splits "
                            f"outside and the classes inside, as in {root / inner[0] / name}, or set "
                            f"--data.source.splits none to take all files of a class together.")


def _check_alike(found: Tree, root: Path) -> None:
    """UserError if all folders have the same subfolders: these may be splits, with the classes inside."""
    names = found.folders[root]
    inside = [found.folders[root / name] for name in names]
    if len(names) > 1 and len(inside[0]) > 1 and all(inner == inside[0] for inner in inside):
        raise UserError(f"It is not clear which folders of {root} are the classes: {_some(names)}, or "
                        f"{_some(inside[0])} in each of them. Name the outer ones like splits (train, test), or set "
                        f"--data.source.splits none to take them for the classes.")


def _check_words(found: Tree, root: Path) -> None:
    """UserError if folders are named like parts of splits: trainA and testB, or train (1) and test (1)."""
    kinds = {SPLITS.get(word.lower()) for name in found.folders[root] for word in _WORDS.findall(name)} - {None}
    if "train" in kinds and len(kinds) > 1:
        raise UserError(f"It is not clear whether the folders of {root} are splits or classes: "
                        f"{_some(found.folders[root])}. Name splits train, validation and test, or set "
                        f"--data.source.splits none to take the folders for the classes.")


def labelled(found: Tree, folder: Path, classes: list[str], wanted: Callable[[str], bool],
             noun: str) -> tuple[list[Path], np.ndarray, Counter[str]]:
    """(files of one split with a `wanted` name, their classes int32 (n,), suffixes of the other files).

    Raises:
      UserError: a folder is not one of the classes, or has no such files.
    """
    paths, labels, others = [], [], Counter()
    for name in found.folders[folder]:
        if name not in classes:
            raise UserError(f"{folder / name} is a class that the training folder lacks; it has {_some(classes)}.")
        inside = found.below(folder / name)
        kept = [path for path in inside if wanted(path.name)]
        rest = Counter(path.suffix.lower() or "without a suffix" for path in inside if not wanted(path.name))
        if not kept:
            what = f" but {suffixes(rest)}: convert them" if rest else ": add some"
            raise UserError(f"The class folder {folder / name} has no {noun} in it{what}, or remove the folder.")
        paths += kept
        labels += [classes.index(name)] * len(kept)
        others += rest
    return paths, np.array(labels, np.int32), others


def suffixes(count: Counter[str]) -> str:
    """The commonest suffixes, to print."""
    return ", ".join(f"{n} {printable(suffix)}" for suffix, n in count.most_common(5)) + ", ..." * (len(count) > 5)


def printable(name: str) -> str:
    """A file or folder name as printable text: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode(errors="replace")


def below(root: Path, paths: Sequence[Path]) -> Callable[[int], str]:
    """Index -> that path from `root` on, as printable text."""
    return lambda i: printable(paths[i].relative_to(root).as_posix())


def _some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:_LISTED])) + (", ..." if len(names) > _LISTED else "")
