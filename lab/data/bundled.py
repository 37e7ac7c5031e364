"""The data sets of scikit-learn: some are part of its installation, some it fetches once from the network."""

import contextlib
import difflib
import functools
import os
import socket
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.data.columns import numbers, read_columns
from lab.errors import UserError

BUNDLED = ("iris", "wine", "breast_cancer", "diabetes", "digits")
# name -> where scikit-learn fetches it from, and the file it then keeps in its data_home
FETCHED = {
    "california_housing": ("https://ndownloader.figshare.com/files/5976036", "cal_housing_py3.pkz"),
    "20newsgroups": ("https://ndownloader.figshare.com/files/5975967", "20news-bydate_py3.pkz"),
}
PATIENCE = 5.0  # seconds until a network that does not answer counts as none
HOUSING = ("MedInc", "HouseAge", "AveRooms", "AveBedrms", "Population", "AveOccup", "Latitude", "Longitude")


@dataclass(frozen=True, eq=False)
class Bunch:
    """What `Sklearn.load` gives: n records in a fixed order."""

    title: str
    inputs: np.ndarray | list[str]
    """float64 (n, F), where NaN is a missing value, or n texts."""
    targets: np.ndarray
    """int32 (n,) class, or float64 (n,) where `class_names` is empty (regression)."""
    feature_names: tuple[str, ...] = ()
    """The F columns of a table."""
    class_names: tuple[str, ...] = ()
    """Empty for regression."""
    test: "Bunch | None" = None
    """The test split that the data set itself has, if any."""


@dataclass(frozen=True)
class Sklearn:
    """A data set of scikit-learn (Pedregosa et al., "Scikit-learn: Machine Learning in Python", JMLR 2011).

    Part of its installation: iris (150 rows, 3 classes), wine (178, 3), breast_cancer (569, 2), diabetes (442,
    regression, in its raw units), digits (1,797 images of 8x8 as 64 columns, 10). Fetched once: california_housing
    (20,640 rows, regression in units of 100,000 dollars) and 20newsgroups (11,314 + 7,532 messages with headers,
    "bydate" split, ordered by group and file name).
    """

    name: str
    """iris, wine, breast_cancer, diabetes, digits, california_housing or 20newsgroups."""
    path: str | None = None
    """A local copy of a fetched one: scikit-learn's data_home; or, for california_housing, a CSV file with the columns
    of either scikit-learn or the original; for 20newsgroups, the folder that holds 20news-bydate-train and
    20news-bydate-test, or the archive 20news-bydate.tar.xz or .tar.gz."""

    def validate(self) -> None:
        """UserError for an unknown name, or a path that does not exist or has no use."""
        names = (*BUNDLED, *FETCHED)
        if self.name not in names:
            near = difflib.get_close_matches(self.name, names, n=1, cutoff=0.5)
            perhaps = f"did you mean {near[0]!r}?" if near else "it is not one of those known here."
            raise UserError(f"Sklearn({self.name!r}): {perhaps} Known: {', '.join(names)}.")
        if self.path is not None and self.name in BUNDLED:
            raise UserError(f"Sklearn({self.name!r}) is part of scikit-learn's installation: leave out the path.")
        if self.path is not None and not Path(self.path).expanduser().exists():
            raise UserError(f"Sklearn({self.name!r}, path={self.path!r}): there is no such file or folder.")

    def load(self) -> Bunch:
        """The records (kept in memory for the next call). UserError where there is neither a copy nor a network."""
        self.validate()
        return _load(self, self.state())

    def state(self) -> tuple[int, ...]:
        """Changes when the local copy changes."""
        stat = Path(self.path).expanduser().stat() if self.path else None
        return (stat.st_size, stat.st_mtime_ns) if stat else ()


@functools.lru_cache(maxsize=4)
def _load(source: Sklearn, _state: tuple[int, ...]) -> Bunch:
    if source.name in BUNDLED:
        return _bundled(source.name)
    read = _housing if source.name == "california_housing" else _newsgroups
    if source.path is None:
        home = Path(os.environ.get("SCIKIT_LEARN_DATA") or "~/scikit_learn_data").expanduser()
        if not (home / FETCHED[source.name][1]).exists():
            _fetch(source.name)
        return read(home)
    return read(Path(source.path).expanduser())


def _bundled(name: str) -> Bunch:
    from sklearn import datasets

    # Diabetes as measured: what scikit-learn scales by default, it scales with the mean of the test rows too.
    options = {"scaled": False} if name == "diabetes" else {}
    raw = getattr(datasets, f"load_{name}")(**options)
    names = () if name == "diabetes" else tuple(str(c) for c in raw.target_names)
    targets = raw.target.astype(np.int32 if names else np.float64)
    inputs = np.asarray(raw.data, np.float64)
    return Bunch(f"scikit-learn {name}", inputs, targets, tuple(str(f) for f in raw.feature_names), names)


# ------------------------------------------------------------------------------------------------------ fetching


def _fetch(name: str) -> None:
    """Let scikit-learn download a data set into its data_home. UserError, within seconds, where it cannot."""
    from sklearn import datasets

    url, _ = FETCHED[name]
    trouble = _unreachable(url)
    if trouble is None:
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30.0)  # scikit-learn sets none: a connection that dies would hang for ever
        try:
            getattr(datasets, f"fetch_{name}")(n_retries=1)
        except Exception as error:  # network, disk or checksum: in every case a local copy is the way out
            trouble = f"the download failed ({error})"
        finally:
            socket.setdefaulttimeout(before)
    if trouble is not None:
        raise UserError(
            f"Sklearn({name!r}) is not on this machine and {trouble}: give path=, a copy of it "
            f"({_LAYOUTS[name]}), or run once where there is a network."
        ) from None


_LAYOUTS = {
    "california_housing": "scikit-learn's data_home or a CSV file",
    "20newsgroups": "scikit-learn's data_home, the folder of 20news-bydate-train and -test, or 20news-bydate.tar.xz",
}


def _unreachable(url: str) -> str | None:
    """Why nothing can be fetched from `url`, or None; takes PATIENCE seconds at most, also when name lookup hangs."""
    import urllib.error
    import urllib.request

    result = ["there is no network (no answer from the server)"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE):
                result[:] = []
        except urllib.error.HTTPError:
            result[:] = []  # somebody answered: the download itself will say more
        except Exception as error:  # no route, no name, a proxy that speaks another language, ...
            result[:] = [f"there is no network ({getattr(error, 'reason', error)})"]

    thread = threading.Thread(target=ask, name="network", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return next(iter(result), None)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise, as one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"Cannot read {path} ({type(error).__name__}: {error}): copy it again.") from None


# ------------------------------------------------------------------------------------------- california_housing


def _housing(path: Path) -> Bunch:
    """From scikit-learn's data_home, or from a CSV file."""
    if path.is_file():
        inputs, targets = _housing_csv(path)
    else:
        name = FETCHED["california_housing"][1]
        if not (path / name).exists():
            raise UserError(f"{path} has no {name}: give scikit-learn's data_home or a CSV file.")
        from sklearn import datasets

        with _damage(path / name):
            raw = datasets.fetch_california_housing(data_home=path, download_if_missing=False)
        inputs, targets = raw.data, raw.target
    return Bunch("scikit-learn california_housing", np.asarray(inputs, np.float64), np.asarray(targets), HOUSING)


def _housing_csv(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The columns of scikit-learn, or those of the original data, from which scikit-learn makes its own."""
    table = read_columns(path)
    if "MedHouseVal" in table.names:
        return np.stack([numbers(table, name) for name in HOUSING], 1), numbers(table, "MedHouseVal")
    original = ("median_income", "housing_median_age", "total_rooms", "total_bedrooms", "population", "households",
                "latitude", "longitude", "median_house_value")
    if missing := [name for name in original if name not in table.names]:
        raise UserError(f"{path} has no column {missing[0]!r}: as california_housing it needs {', '.join(original)}, "
                        f"or the columns of scikit-learn with MedHouseVal.")
    income, age, rooms, bedrooms, people, homes, north, east, value = (numbers(table, name) for name in original)
    inputs = [income, age, rooms / homes, bedrooms / homes, people, people / homes, north, east]
    return np.stack(inputs, 1), value / 100_000


# ------------------------------------------------------------------------------------------------- 20newsgroups

Messages = list[tuple[str, str, str]]  # (group, file name, text)


def _newsgroups(path: Path) -> Bunch:
    """From scikit-learn's data_home, the two folders, or the archive. Equal content gives equal records."""
    cache = path / FETCHED["20newsgroups"][1]
    if path.is_file():
        with _damage(path):
            splits = _archive(path)
    elif cache.exists():
        with _damage(cache):
            splits = {split: _cached(path, split) for split in ("train", "test")}
    else:
        splits = {split: _folder(path / f"20news-bydate-{split}") for split in ("train", "test")}
    if not all(splits.values()):
        raise UserError(f"{path} is no copy of 20newsgroups: it may be {_LAYOUTS['20newsgroups']}.")
    names = tuple(sorted({group for group, _, _ in splits["train"]}))
    if strange := {group for group, _, _ in splits["test"]} - set(names):
        raise UserError(f"{path}: the test messages have a group that the training messages lack: {min(strange)}.")

    def bunch(messages: Messages, test: Bunch | None = None) -> Bunch:
        messages = sorted(messages)
        targets = np.array([names.index(group) for group, _, _ in messages], np.int32)
        return Bunch("20 Newsgroups (bydate)", [text for _, _, text in messages], targets, (), names, test)

    return bunch(splits["train"], bunch(splits["test"]))


def _cached(home: Path, split: str) -> Messages:
    from sklearn import datasets

    raw: Any = datasets.fetch_20newsgroups(data_home=home, subset=split, download_if_missing=False, shuffle=False)
    paths = [str(name).replace("\\", "/").rsplit("/", 1)[-1] for name in raw.filenames]
    groups = [str(raw.target_names[target]) for target in raw.target]
    return list(zip(groups, paths, raw.data, strict=True))


def _folder(folder: Path) -> Messages:
    """Latin-1 files in one folder per group; [] where there are none."""
    files = [file for file in folder.glob("*/*") if file.is_file() and not file.name.startswith(".")]
    return [(file.parent.name, file.name, file.read_bytes().decode("latin-1")) for file in files]


def _archive(path: Path) -> dict[str, Messages]:
    splits: dict[str, Messages] = {"train": [], "test": []}
    with tarfile.open(path) as archive:
        for member in archive:
            parts = member.name.split("/")
            if member.isfile() and len(parts) >= 3 and parts[-3] in ("20news-bydate-train", "20news-bydate-test"):
                file = archive.extractfile(member)
                assert file is not None  # as for every regular file
                splits[parts[-3].rpartition("-")[2]].append((parts[-2], parts[-1], file.read().decode("latin-1")))
    return splits
