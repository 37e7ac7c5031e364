"""Labelled images: decoded and split on the host, normalised and augmented inside the compiled step."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab.data import digest
from lab.data.dataset import Dataset, Incoming, class_names, no_ids, restored
from lab.data.folders import printable, tree
from lab.data.images.augment import Augment, draw, middle
from lab.data.images.decode import MODES, Form, decoded, reshaped
from lab.data.images.idx import Idx, read_idx
from lab.data.images.records import Found, ShardPart, find
from lab.data.images.sources import ImageFiles, ImageFolder, Opened, Pixels, TfdsImages, is_image
from lab.data.order import fixed_order
from lab.data.pipeline import Arrays, Records
from lab.data.tables.bundled import Sklearn
from lab.errors import UserError
from lab.files import user_path

Source = Idx | ImageFolder | TfdsImages | Sklearn
LOOK = 1000  # training images whose mean and standard deviation the screen shows


@dataclass(frozen=True)
class Images:
    """Images with a class each.

    A record is `inputs` uint8 (H + 2 border, W + 2 border, C), and `targets` int32 (), the class. In the step, inputs
    become float32 (H, W, C), augmented in training, and (x / 255 - mean) / std; with mixup or cutmix the targets of
    training become float32 (classes,).

    Splits: the source's own where it has them. A held-out split of any name is the test split; validation is then taken
    out of training. What is taken out is decided by one fixed shuffle, never by an experiment's seed.
    """

    source: Source
    """Where the images come from. Of scikit-learn's data sets, "digits" has images: 1,797 of 8x8."""
    shape: tuple[int, int, int]
    """Height, width and channels (1: grey, 3: RGB) of what the model gets."""
    augment: Augment = Augment()
    """Random changes to training images."""
    validation: float | None = None
    """Training images held out for validation: a part of them, or from 1 on their number; 0: validate on the test
    split. Default: the source's own validation split beside a test split, else a tenth."""
    test: float | None = None
    """The same for the test split of a source that has none; default: no test split."""
    classes: int | None = None
    """Number of classes: mixup and cutmix need it, and where it is given the data must agree."""
    mean: tuple[float, ...] = (0.5,)
    """Of the training pixels, in [0, 1], for each channel or for all; the screen shows the measured one."""
    std: tuple[float, ...] = (0.5,)
    """Standard deviation, likewise."""
    resize: bool = False
    """Make images of any size and colour fit: the largest middle part of the right aspect ratio, resized. Without, any
    other image than `shape` (with border) is an error."""
    border: int = 0
    """Stored images are this many pixels larger on each side: crop and resized_crop use all of them, everything else
    the middle. Shape 224 with border 16 is the usual evaluation on ImageNet: resize to 256, take the middle."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded, and count them; they are an error otherwise."""
    memory: float = 4.0
    """Splits of up to this many gigabytes are decoded once into a cached file and kept in memory; larger ones are
    decoded batch by batch."""

    unit = "images"
    slow = True  # to load: --dry-run leaves that out
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
        for name, part in (("validation", self.validation), ("test", self.test)):
            if part is not None and (part < 0 or part >= 1 and part != int(part)):
                raise UserError(f"--data.{name} is a part below 1, or a whole number of images, not {part}.")
        if self.border < 0 or self.memory < 0:
            raise UserError("--data.border and --data.memory must not be negative.")
        if self.classes is not None and self.classes < 2:
            raise UserError(f"--data.classes must be at least 2, not {self.classes}.")
        self.augment.validate(height, width)
        if self.augment.mixes and self.classes is None:
            raise UserError("mixup and cutmix make soft labels: set --data.classes to the number of classes.")

    def metadata(self) -> dict[str, int]:
        """What is known of `Dataset.metadata` without reading."""
        known = dict(zip(("height", "width", "channels"), self.shape, strict=True))
        return known if self.classes is None else known | {"classes": self.classes}

    @property
    def form(self) -> Form:
        """What a stored image is."""
        height, width, channels = self.shape
        return Form(height + 2 * self.border, width + 2 * self.border, channels, self.resize)

    def record_spec(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape, type) of the arrays of one record, without reading anything."""
        form = self.form
        return {"inputs": ((form.height, form.width, form.channels), np.uint8), "targets": ((), np.int32)}

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        """inputs uint8 -> float32 (B, H, W, C), normalised and, in training, augmented; pure JAX.

        64 grey images of 28x28 on two busy CPU cores (fastest to median): normalising 0.05 to 0.1 ms; crop, flip and
        cutout 0.2 to 0.3; rotate, shift, zoom and flip 0.3 to 0.6; mixup and cutmix 0.2 to 0.4; everything together 2
        to 4, because XLA for CPUs fuses the resampling into the mixing and so computes it several times.
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
        """What the source is and how many images it has, without decoding. UserError where it is not there."""
        source = self._open()
        counts = {f"{name} images, as stored": len(split) for name, split in source.splits.items()}
        return {"source": source.title, "image": str(self.form), "classes": source.classes,
                **class_names(source.names), **counts, **source.notes}

    def load(self) -> "ImageData":
        """Find, decode (or find decoded) and split the images.

        Raises:
          UserError: names what is missing, corrupt, of another form or labelled with a class that does not exist.
        """
        self.validate()
        source = self._open()
        found = {name: find(split, self.form, source.classes, self.memory * 1e9, self.skip_corrupt)
                 for name, split in source.splits.items()}
        records, rule = self._split({name: split.records for name, split in found.items()}, source.title)
        content = {name: [split.content, split.changes] if split.changes else split.content
                   for name, split in found.items()}
        known = {"height": self.shape[0], "width": self.shape[1], "channels": self.shape[2], "classes": source.classes}
        return ImageData(
            train=records["train"], validation=records["validation"], test=records.get("test"),
            fingerprint=digest("images", content, rule, self.record_spec()["inputs"][0], self.resize),
            metadata=known, unit=self.unit, units_per_record=1, classes=source.names, form=self.form,
            summary=self._summary(source, found, records, rule),
        )

    def restored(self, saved: dict[str, Any], tokenizer: str) -> "ImageData":
        """What `load` gave to a run, without records; see `Dataset.saved`."""
        return ImageData(**restored(saved), form=Form(**saved["form"]))

    def _open(self) -> Opened:
        """The source; UserError when it is not there or has another number of classes than `classes`."""
        source = _digits(self.source) if isinstance(self.source, Sklearn) else self.source.open()
        if self.classes not in (None, source.classes):
            raise UserError(f"{source.title} has {source.classes} classes, but --data.classes is {self.classes}.")
        return source

    def _split(self, found: dict[str, Records], title: str) -> tuple[dict[str, Records], str]:
        """The records of each split, and the rule in words."""
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
            order = fixed_order(n)
            parts = {"test": order[:held], "validation": order[held : held + count], "train": order[held + count :]}
            found = found | {name: _part(train, np.sort(rows)) for name, rows in parts.items() if len(rows)}
        if self.validation == 0:
            found = found | {"validation": found["test"]}
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
    """The 1,797 digits that come with scikit-learn: 17 greys, stretched to 0..255."""
    if source.name != "digits":
        raise UserError(f'Sklearn({source.name!r}) has no images; "digits" has.')
    bunch = source.load()
    images = np.round(np.asarray(bunch.inputs).reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    pixels = Pixels(bunch.title, images, bunch.targets.astype(np.int32))
    return Opened(bunch.title, {"train": pixels}, len(bunch.class_names), bunch.class_names)


def _count(part: float, n: int) -> int:
    """How many of n: a part of them, at least one if it is not 0, or from 1 on the number itself."""
    return int(part) if part >= 1 or part == 0 else max(math.floor(part * n + 0.5), 1)


def _part(records: Records, rows: np.ndarray) -> Records:
    return Arrays(records[rows]) if isinstance(records, Arrays) else ShardPart(records, rows)


@dataclass
class ImageData(Dataset):
    """What `Images.load` gives."""

    form: Form = field(default=Form(0, 0, 0), kw_only=True)

    def saved(self) -> dict[str, Any]:
        """See `Dataset.saved`."""
        return super().saved() | {"form": asdict(self.form)}

    def read(self, path: Path, id_column: str | None = None, strict: bool = False) -> Incoming:
        """An image, all images below a folder, or an IDX file of images. In a folder of classes' folders, these are the
        truth.

        Raises:
          UserError: names images that are corrupt or of another form than those of training.
        """
        if id_column is not None:
            raise no_ids(id_column)
        path = user_path(path)
        if path.is_file() and path.name.removesuffix(".gz").endswith("ubyte"):
            images = read_idx(path)
            images = images[..., None] if images.ndim == 3 else images
            if images.ndim != 4:
                raise UserError(f"{path} holds an array of shape {images.shape}, which are no images.")
            pixels = Pixels(path.name, images, np.zeros(len(images), np.int32))
            return Incoming(Arrays({"inputs": reshaped(pixels, self.form)}), list(range(len(images))),
                            [f"{path.name} {i}" for i in range(len(images))])
        paths = [p for p in tree(path).below(path) if is_image(p.name)] if path.is_dir() else [path]
        if not paths or not path.exists():
            raise UserError(f"{path} " + ("has no PNG or JPEG file in it." if paths == [] else "does not exist."))
        root = path if path.is_dir() else path.parent
        files = ImageFiles(root, paths, np.zeros(len(paths), np.int32))
        names = [printable(p.relative_to(root).as_posix()) for p in paths]
        known = [next((part for part in name.split("/")[:-1] if part in self.classes), "") for name in names]
        return Incoming(Arrays({"inputs": decoded(files, self.form)}), list(range(len(names))), names, {"file": names},
                        known if any(known) else None)
