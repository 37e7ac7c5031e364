"""The data sets of scikit-learn: part of its installation, or archives that are downloaded once.

scikit-learn caches its downloads as pickles (`*_py3.pkz`). Loading a pickle can run arbitrary code, and these differ
between machines, so a checksum cannot verify them: they are never opened. Only the published archives, with known
sha256, and plain text files are read.
"""

import contextlib
import difflib
import functools
import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.data import cache_folder
from lab.data.network import in_time
from lab.data.tables.columns import numbers
from lab.data.tables.csv_files import read_columns
from lab.errors import Absent, UserError
from lab.files import replace_file, user_path

BUNDLED = ("iris", "wine", "breast_cancer", "diabetes", "digits")
# name -> URL, file name and sha256 of the archive, all as in scikit-learn
FETCHED = {
    "california_housing": ("https://ndownloader.figshare.com/files/5976036", "cal_housing.tgz",
                           "aaa5c9a6afe2225cc2aed2723682ae403280c4a3695a2ddda4ffb5d8215ea681"),
    "20newsgroups": ("https://ndownloader.figshare.com/files/5975967", "20news-bydate.tar.gz",
                     "8f1b2514ca22a5ade8fbb9cfa5727df95fa587f4c87b786e15c759fa66d95610"),
}
PATIENCE = 5.0  # seconds to wait for an answer before the network counts as absent
SLOW = 30.0  # seconds without data after which a download fails
HOUSING = ("MedInc", "HouseAge", "AveRooms", "AveBedrms", "Population", "AveOccup", "Latitude", "Longitude")
ORIGINAL = ("longitude", "latitude", "housing_median_age", "total_rooms", "total_bedrooms", "population", "households",
            "median_income", "median_house_value")  # the columns of cal_housing.data, in order


@dataclass(frozen=True, eq=False)
class Bunch:
    """The result of `Sklearn.load`: n records in a fixed order."""

    title: str
    inputs: np.ndarray | list[str]
    """float64 (n, F), NaN for a missing value; or n texts."""
    targets: np.ndarray
    """int32 (n,) class, or float64 (n,) if `class_names` is empty (regression)."""
    feature_names: tuple[str, ...] = ()
    """The F columns of a table."""
    class_names: tuple[str, ...] = ()
    """Class names; () for regression."""
    test: "Bunch | None" = None
    """The data set's own test split, if any."""


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
    """A local copy of a downloaded data set. california_housing: cal_housing.tgz, its cal_housing.data, a folder with
    either, or a CSV file with the columns of scikit-learn or of the original. 20newsgroups: 20news-bydate.tar.gz or
    .tar.xz, or the folder with 20news-bydate-train and -test."""

    def validate(self) -> None:
        """UserError for an unknown name, or a path that does not exist or is not used."""
        names = (*BUNDLED, *FETCHED)
        if self.name not in names:
            near = difflib.get_close_matches(self.name, names, n=1, cutoff=0.5)
            perhaps = f"did you mean {near[0]!r}?" if near else "it is not one of those known here."
            raise UserError(f"Sklearn({self.name!r}): {perhaps} Known: {', '.join(names)}.")
        if self.path is not None and self.name in BUNDLED:
            raise UserError(f"Sklearn({self.name!r}) is part of scikit-learn's installation: leave out the path.")
        if self.path is not None and not user_path(self.path).exists():
            raise UserError(f"Sklearn({self.name!r}, path={self.path!r}): there is no such file or folder.")

    def load(self) -> Bunch:
        """The records (cached in memory). UserError if there is neither a copy nor a network."""
        self.validate()
        return _load(self, self.state())

    def state(self) -> tuple[int, ...]:
        """Changes when the local copy changes."""
        stat = user_path(self.path).stat() if self.path else None
        return (stat.st_size, stat.st_mtime_ns) if stat else ()


@functools.lru_cache(maxsize=4)
def _load(source: Sklearn, _state: tuple[int, ...]) -> Bunch:
    if source.name in BUNDLED:
        return _bundled(source.name)
    read = _housing if source.name == "california_housing" else _newsgroups
    return read(user_path(source.path) if source.path else _fetched(source.name))


def _bundled(name: str) -> Bunch:
    from sklearn import datasets

    # Unscaled diabetes: scikit-learn's default scaling uses the mean of the test rows too.
    options = {"scaled": False} if name == "diabetes" else {}
    raw = getattr(datasets, f"load_{name}")(**options)
    names = () if name == "diabetes" else tuple(str(c) for c in raw.target_names)
    targets = raw.target.astype(np.int32 if names else np.float64)
    inputs = np.asarray(raw.data, np.float64)
    return Bunch(f"scikit-learn {name}", inputs, targets, tuple(str(f) for f in raw.feature_names), names)


# ------------------------------------------------------------------------------------------------------ fetching


def _fetched(name: str) -> Path:
    """The published archive, downloaded into the cache folder once. UserError, within seconds, if that fails."""
    url, file, sha256 = FETCHED[name]
    path = cache_folder("sklearn") / file
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    trouble = _unreachable(url)
    if trouble is None:
        try:
            content = _download(url)
            if hashlib.sha256(content).hexdigest() == sha256:
                replace_file(path, content)
                return path
            trouble = "the download has a wrong checksum"
        except Exception as error:  # network or disk error: suggest a local copy
            trouble = f"the download failed ({error})"
    raise Absent(f"Sklearn({name!r}) is not on this machine and {trouble}: give path=, a copy of it "
                 f"({_LAYOUTS[name]}), or run once where there is a network.") from None


def _download(url: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(url, timeout=SLOW) as answer:
        return answer.read()


_LAYOUTS = {
    "california_housing": "cal_housing.tgz, the cal_housing.data in it, or a CSV file",
    "20newsgroups": "20news-bydate.tar.gz or .tar.xz, or the folder of 20news-bydate-train and -test",
}


def _unreachable(url: str) -> str | None:
    """Why `url` cannot be reached, or None; takes PATIENCE seconds at most, even if the name lookup hangs."""
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, method="HEAD")
    try:
        in_time(lambda: urllib.request.urlopen(request, timeout=PATIENCE).close(), PATIENCE)
    except urllib.error.HTTPError:
        pass  # the host answered; the download raises any further error
    except TimeoutError:
        return "there is no network (no answer from the server)"
    except Exception as error:  # no route, unknown host, proxy error, ...
        return f"there is no network ({getattr(error, 'reason', error)})"
    return None


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Converts the exceptions of a damaged file's reader to one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"Cannot read {path} ({type(error).__name__}: {error}): copy it again.") from None


# ------------------------------------------------------------------------------------------- california_housing


def _no_copy(path: Path, name: str) -> UserError:
    """The error for a folder or file without a supported form of the data set."""
    pickles = [path] if path.suffix == ".pkz" else sorted(path.glob("*.pkz"))
    if pickles:
        return UserError(f"{pickles[0]} is a pickle, which may run any code when it is opened, so it is not. Give "
                         f"path=, {_LAYOUTS[name]}, or leave path out to download the archive.")
    return UserError(f"{path} is not a copy of {name}: it may be {_LAYOUTS[name]}.")


def _housing(path: Path) -> Bunch:
    """Reads the archive, the file in it, a folder with either, or a CSV file."""
    places = [path / place for place in (FETCHED["california_housing"][1], "cal_housing.data",
                                         "CaliforniaHousing/cal_housing.data")]
    file = path if path.is_file() else next((place for place in places if place.is_file()), None)
    if file is None or file.suffix == ".pkz":
        raise _no_copy(path, "california_housing")
    if file.suffix in (".csv", ".gz") and not file.name.endswith(".tar.gz"):
        inputs, targets = _housing_csv(file)
    else:
        with _damage(file):
            inputs, targets = _housing_columns(dict(zip(ORIGINAL, _cal_housing(file).T, strict=True)))
    return Bunch("scikit-learn california_housing", np.asarray(inputs, np.float64), np.asarray(targets), HOUSING)


def _cal_housing(file: Path) -> np.ndarray:
    """cal_housing.data, plain or in its archive: float64 (n, 9)."""
    content = file.read_bytes()
    if file.suffix != ".data":
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            content = archive.extractfile("CaliforniaHousing/cal_housing.data").read()
    return np.loadtxt(io.BytesIO(content), delimiter=",", ndmin=2)


def _housing_csv(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a CSV file with scikit-learn's columns or those of the original data."""
    table = read_columns(path)
    if "MedHouseVal" in table.names:
        return np.stack([numbers(table, name) for name in HOUSING], 1), numbers(table, "MedHouseVal")
    if missing := [name for name in ORIGINAL if name not in table.names]:
        raise UserError(f"{path} has no column {missing[0]!r}: as california_housing it needs {', '.join(ORIGINAL)}, "
                        f"or the columns of scikit-learn with MedHouseVal.")
    return _housing_columns({name: numbers(table, name) for name in ORIGINAL})


def _housing_columns(column: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Computes scikit-learn's features (n, 8) and target (n,) from the original columns."""
    north, east, age, rooms, bedrooms, people, homes, income, value = (
        column[name] for name in ("latitude", "longitude", *ORIGINAL[2:]))
    inputs = [income, age, rooms / homes, bedrooms / homes, people, people / homes, north, east]
    return np.stack(inputs, 1), value / 100_000


# ------------------------------------------------------------------------------------------------- 20newsgroups

Messages = list[tuple[str, str, str]]  # (group, file name, text)


def _newsgroups(path: Path) -> Bunch:
    """Reads the two folders or the archive. Equal content gives equal records."""
    if path.is_file() and path.suffix != ".pkz":
        with _damage(path):
            splits = _archive(path)
    else:
        splits = {split: _folder(path / f"20news-bydate-{split}") for split in ("train", "test")}
    if not all(splits.values()):
        raise _no_copy(path, "20newsgroups")
    names = tuple(sorted({group for group, _, _ in splits["train"]}))
    if strange := {group for group, _, _ in splits["test"]} - set(names):
        raise UserError(f"{path}: the test messages have a group that the training messages lack: {min(strange)}.")

    def bunch(messages: Messages, test: Bunch | None = None) -> Bunch:
        messages = sorted(messages)
        targets = np.array([names.index(group) for group, _, _ in messages], np.int32)
        return Bunch("20 Newsgroups (bydate)", [text for _, _, text in messages], targets, (), names, test)

    return bunch(splits["train"], bunch(splits["test"]))


def _folder(folder: Path) -> Messages:
    """Latin-1 files in one folder per group; [] if there are none."""
    files = [file for file in folder.glob("*/*") if file.is_file() and not file.name.startswith(".")]
    return [(file.parent.name, file.name, file.read_bytes().decode("latin-1")) for file in files]


def _archive(path: Path) -> dict[str, Messages]:
    splits: dict[str, Messages] = {"train": [], "test": []}
    with tarfile.open(path) as archive:
        for member in archive:
            parts = member.name.split("/")
            if member.isfile() and len(parts) >= 3 and parts[-3] in ("20news-bydate-train", "20news-bydate-test"):
                file = archive.extractfile(member)
                assert file is not None  # never None for a regular file
                splits[parts[-3].rpartition("-")[2]].append((parts[-2], parts[-1], file.read().decode("latin-1")))
    return splits
