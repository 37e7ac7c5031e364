"""Labelled images: decoded and split on the host, normalised and augmented in the compiled step."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab.data import digest
from lab.data.dataset import Dataset, Incoming, Origin, class_names, no_ids, part, restored
from lab.data.folders import below, tree
from lab.data.images.augment import Augment, draw, middle
from lab.data.images.decode import MODES, Form, decoded, reshaped
from lab.data.images.idx import Idx, read_idx
from lab.data.images.records import Found, find
from lab.data.images.sources import ImageFiles, ImageFolder, Opened, Pixels, TfdsImages, is_image
from lab.data.order import fixed_order
from lab.data.pipeline import Arrays, Records
from lab.data.tables.bundled import Sklearn
from lab.errors import UserError
from lab.files import user_path

Source = Idx | ImageFolder | TfdsImages | Sklearn
LOOK = 1000  # training images to measure mean and standard deviation on, for display


@dataclass(frozen=True)
class Images:
    """Images for classification.

    A record is `inputs` uint8 (H + 2 border, W + 2 border, C), and `targets` int32 (), the class. The step augments
    inputs in training and normalises them, (x / 255 - mean) / std, to float32 (H, W, C). With mixup or cutmix, training
    targets become float32 (classes,).

    Splits are the source's own, if it has them. A single held-out split of any name is the test split; validation is
    then taken from training. A fixed shuffle, independent of the experiment's seed, chooses the held-out images.
    """

    source: Source
    """Where the images come from. The only scikit-learn data set of images is "digits": 1,797 of 8x8."""
    shape: tuple[int, int, int]
    """Height, width and channels (1: grey, 3: RGB) of the model's input."""
    augment: Augment = Augment()
    """Augmentation of training images."""
    validation: float | None = None
    """Training images held out for validation: a fraction below 1, else a number; 0: validate on the test split.
    Default: the source's own validation split if it also has a test split, else a tenth."""
    test: float | None = None
    """Training images held out for test, as `validation`, if the source has no test split; default: none."""
    classes: int | None = None
    """Number of classes. Required for mixup and cutmix; if given, it must equal the data's."""
    mean: tuple[float, ...] = (0.5,)
    """Mean of the training pixels, in [0, 1], per channel or for all; the measured mean is printed."""
    std: tuple[float, ...] = (0.5,)
    """Standard deviation of the training pixels, per channel or for all."""
    resize: bool = False
    """Convert images of any size and colour: the largest centre crop of the right aspect ratio, resized. If off, an
    image that does not have `shape` (plus border) is an error."""
    border: int = 0
    """Stored images are this many pixels larger on each side. crop and resized_crop use the whole image, everything
    else the centre. Shape 224 with border 16 is the usual ImageNet evaluation: resize to 256, centre crop."""
    skip_corrupt: bool = False
    """Leave out and count images that cannot be decoded; by default they are an error."""
    memory: float = 4.0
    """Splits up to this many gigabytes are decoded once into a cached file and kept in memory; larger splits are
    decoded batch by batch."""

    unit = "images"
    slow = True  # loading is slow, so --dry-run skips it
    units_per_record = 1

    def validate(self) -> None:
        """UserError for values out of range; nothing is read."""
        self.source.validate()
        height, width, channels = self.shape
        if min(height, width) < 2 or channels not in MODES:
            raise UserError(f"--data.shape is height, width (at least 2) and channels (1 or 3), not {self.shape}.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UserError(f"--data.{name} needs 1 number or {channels}, one a channel, not {len(values)}.")
        if min(self.std) <= 0 or not 0 <= min(self.mean) <= max(self.mean) <= 1:
            raise UserError(f"--data.mean must be in [0, 1] and --data.std positive, not {self.mean} and {self.std}: "
                            f"they are in units of white.")
        for name, share in (("validation", self.validation), ("test", self.test)):
            if share is not None and (share < 0 or share >= 1 and share != int(share)):
                raise UserError(f"--data.{name} is a part below 1, or a whole number of images, not {share}.")
        if self.border < 0 or self.memory < 0:
            raise UserError("--data.border and --data.memory must not be negative.")
        if self.classes is not None and self.classes < 2:
            raise UserError(f"--data.classes must be at least 2, not {self.classes}.")
        self.augment.validate(height, width)
        if self.augment.mixes and self.classes is None:
            raise UserError("mixup and cutmix make soft labels: set --data.classes to the number of classes.")

    def metadata(self) -> dict[str, int]:
        """The part of `Dataset.metadata` that is known without reading."""
        known = dict(zip(("height", "width", "channels"), self.shape, strict=True))
        return known if self.classes is None else known | {"classes": self.classes}

    @property
    def form(self) -> Form:
        """The form of a stored image."""
        height, width, channels = self.shape
        return Form(height + 2 * self.border, width + 2 * self.border, channels, self.resize)

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape, type) of the arrays of one record, without reading anything."""
        form = self.form
        return {"inputs": ((form.height, form.width, form.channels), np.uint8), "targets": ((), np.int32)}

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        """inputs uint8 -> float32 (B, H, W, C), normalised and, in training, augmented; pure JAX.

        64 grey images of 28x28 on two busy CPU cores (fastest to median): normalising 0.05 to 0.1 ms; crop, flip and
        cutout 0.2 to 0.3; rotate, shift, zoom and flip 0.3 to 0.6; mixup and cutmix 0.2 to 0.4; all together 2 to 4,
        because XLA for CPUs fuses the resampling into the mixing and computes it several times.
        """
        import jax.numpy as jnp

        images, size = batch["inputs"], self.shape[:2]
        numbers = draw(batch["key"]) if train and self.augment != Augment() else {}
        images = self.augment.move(images, numbers, size) if numbers else middle(images, size)
        mean, std = jnp.array(self.mean), jnp.array(self.std)
        images = images * (1 / (255 * std)) - mean / std
        if not numbers:
            return batch | {"inputs": images}
        images, targets = self.augment.mix(images, batch["targets"], numbers, self.classes)
        return batch | {"inputs": images, "targets": targets}

    def describe(self) -> dict[str, str | int | float]:
        """The source and its number of images, without decoding. UserError if it does not exist."""
        source = self._open()
        counts = {f"{name} images, as stored": len(split) for name, split in source.splits.items()}
        return {"source": source.title, "image": str(self.form), "classes": source.classes,
                **class_names(source.names), **counts, **source.notes}

    def load(self) -> "ImageData":
        """Find, decode (or read from the cache) and split the images.

        Raises:
          UserError: names what is missing, corrupt, of the wrong form or labelled with an invalid class.
        """
        self.validate()
        source = self._open()
        found = {name: find(split, self.form, source.classes, self.memory * 1e9, self.skip_corrupt)
                 for name, split in source.splits.items()}
        origins = {name: _origin(split, found[name]) for name, split in source.splits.items()}
        records, rule = self._split({name: split.records for name, split in found.items()}, source.title, origins)
        content = {name: [split.content, split.changes] if split.changes else split.content
                   for name, split in found.items()}
        known = {"height": self.shape[0], "width": self.shape[1], "channels": self.shape[2], "classes": source.classes}
        return ImageData(
            train=records["train"], validation=records["validation"], test=records.get("test"),
            fingerprint=digest("images", content, rule, self.record_spec()["inputs"][0], self.resize),
            metadata=known, unit=self.unit, units_per_record=1, classes=source.names, form=self.form,
            summary=self._summary(source, found, records, rule), origins=origins,
        )

    def restored(self, saved: dict[str, Any], tokenizer: str) -> "ImageData":
        """The result of a run's `load`, without records; see `Dataset.saved`."""
        return ImageData(**restored(saved), form=Form(**saved["form"]))

    def _open(self) -> Opened:
        """Opens the source; UserError if it does not exist or its number of classes is not `classes`."""
        source = _digits(self.source) if isinstance(self.source, Sklearn) else self.source.open()
        if self.classes not in (None, source.classes):
            raise UserError(f"{source.title} has {source.classes} classes, but --data.classes is {self.classes}.")
        return source

    def _split(self, found: dict[str, Records], title: str, origins: dict[str, Origin]) -> (
            tuple[dict[str, Records], str]):
        """The records of each split, and a sentence about the split; `origins` is changed likewise."""
        train, own = found["train"], "test" in found
        if own and self.test is not None:
            raise UserError(f"{title} has a test split of its own: leave out --data.test.")
        n = len(train)
        held = 0 if own else _count(self.test or 0, n)
        rule = ["test is the source's own"] if own else [f"test is {held:,} of its {n:,} images"] if held else []
        if self.validation is None and "validation" in found:
            count, rule = 0, [*rule, "validation is the source's own"]
        elif self.validation == 0:
            if not own and not held:
                raise UserError(f"{title} has no test split to validate on: set --data.validation or --data.test.")
            count, rule = 0, [*rule, "validation is the test split itself"]
        else:
            count = _count(0.1 if self.validation is None else self.validation, n - held)
            unused = ", not the source's own" if "validation" in found else ""
            rule = [*rule, f"validation is {count:,} of the {n - held:,} training images{unused}"]
        if n - held - count < 1:
            raise UserError(f"{title} has {n:,} images: {held:,} for test and {count:,} for validation leave none.")
        if held or count:
            rule.append("by a fixed shuffle that is the same for every seed")
            order, whole = fixed_order(n), origins["train"]
            parts = {"test": order[:held], "validation": order[held : held + count], "train": order[held + count :]}
            found = found | {name: part(train, np.sort(rows)) for name, rows in parts.items() if len(rows)}
            origins |= {name: whole.at(np.sort(rows)) for name, rows in parts.items() if len(rows)}
        if self.validation == 0:
            found = found | {"validation": found["test"]}
            origins["validation"] = origins["test"]
        return found, ", ".join(rule)

    def _summary(self, source: Opened, found: dict[str, Found], records: dict[str, Records],
                 rule: str) -> dict[str, str | int | float]:
        lines: dict[str, str | int | float] = {"source": source.title, "split": rule, "image": str(self.form)}
        lines |= {"classes": source.classes, **class_names(source.names), **source.notes}
        for name, split in found.items():
            if split.corrupt:
                some = ", ".join(split.corrupt[:3]) + (", ..." if len(split.corrupt) > 3 else "")
                lines[f"{name} images skipped, corrupt"] = f"{len(split.corrupt)}: {some}"
            lines |= {f"{name} images, {change}": n for change, n in split.changes.items()}
        lines |= {f"{name} images": len(records[name]) for name in ("train", "validation", "test") if name in records}
        if not isinstance(records["train"], Arrays):
            return lines | {"decoding": "batch by batch, see --data.memory"}
        few = records["train"].arrays["inputs"][:LOOK] / 255
        for what, values in (("mean", few.mean((0, 1, 2))), ("std", few.std((0, 1, 2)))):
            lines[f"train pixel {what}"] = " ".join(f"{value:.3f}" for value in values)
        return lines


def _digits(source: Sklearn) -> Opened:
    """The 1,797 digits of scikit-learn: 17 grey levels, scaled to 0..255."""
    if source.name != "digits":
        raise UserError(f'Sklearn({source.name!r}) has no images; "digits" has.')
    bunch = source.load()
    images = np.round(np.asarray(bunch.inputs).reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    pixels = Pixels(bunch.title, images, bunch.targets.astype(np.int32))
    return Opened(bunch.title, {"train": pixels}, len(bunch.class_names), bunch.class_names)


def _count(part: float, n: int) -> int:
    """Number of images: `part` is a fraction of n (at least one image if not 0), or from 1 on the number."""
    return int(part) if part >= 1 or part == 0 else max(math.floor(part * n + 0.5), 1)


def _origin(split: Any, found: Found) -> Origin:
    corrupt = set(found.corrupt)
    rows = np.array([i for i in range(len(split)) if split.name(i) not in corrupt]) if corrupt else np.arange(
        len(found.records))
    return Origin(rows, file=below(split.root, split.paths) if isinstance(split, ImageFiles) else None)


@dataclass
class ImageData(Dataset):
    """The result of `Images.load`."""

    form: Form = field(default=Form(0, 0, 0), kw_only=True)

    def saved(self) -> dict[str, Any]:
        """See `Dataset.saved`."""
        return super().saved() | {"form": asdict(self.form)}

    def read(self, path: Path, id_column: str | None = None, strict: bool = False) -> Incoming:
        """An image, all images below a folder, or an IDX image file. Class folders give the true targets.

        Raises:
          UserError: names images that are corrupt or not of the training images' form.
        """
        if id_column is not None:
            raise no_ids(id_column)
        path = user_path(path)
        if path.is_file() and path.name.removesuffix(".gz").endswith("ubyte"):
            images = read_idx(path)
            images = images[..., None] if images.ndim == 3 else images
            if images.ndim != 4:
                raise UserError(f"{path} holds an array of shape {images.shape}, which is not a batch of images.")
            pixels = Pixels(path.name, images, np.zeros(len(images), np.int32))
            return Incoming(Arrays({"inputs": reshaped(pixels, self.form)}), list(range(len(images))),
                            [f"{path.name} {i}" for i in range(len(images))])
        paths = [p for p in tree(path).below(path) if is_image(p.name)] if path.is_dir() else [path]
        if not paths or not path.exists():
            raise UserError(f"{path} " + ("has no PNG or JPEG file in it." if paths == [] else "does not exist."))
        root = path if path.is_dir() else path.parent
        files = ImageFiles(root, paths, np.zeros(len(paths), np.int32))
        names = list(map(below(root, paths), range(len(paths))))
        known = [next((part for part in name.split("/")[:-1] if part in self.classes), "") for name in names]
        return Incoming(Arrays({"inputs": decoded(files, self.form)}), list(range(len(names))), names, {"file": names},
                        known if any(known) else None)
