"""Images with captions in words, made of the names of their classes."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lab.data.dataset import class_names
from lab.data.images.images import ImageData, Images
from lab.data.images.sources import Opened
from lab.data.word_tokenizer import Words, words
from lab.errors import UserError

VOCAB = 100_000  # more words than captions of any classes have
CAPTION = 0x43415054  # folded into a record's key, so that augmentation and caption are independent


@dataclass(frozen=True)
class CaptionedImages(Images):
    """Images, each with a caption: a template with the name of its class. For `Contrastive`.

    A record is that of `Images`. The step adds `text` int32 (L,), the words of the caption, padded with id 0. Its
    template is drawn from a key of (seed, step, record) in training, of (seed, record) in evaluation, which also has
    `prompts` int32 (classes, templates, L), all captions. The vocabulary is the words of all captions; L is the
    longest.
    """

    names: tuple[str, ...] = ()
    """Names of the classes in words, in the order of their numbers; (): those of the source."""
    templates: tuple[str, ...] = ("a photo of a {}",)
    """Captions, with {} for the name."""

    def validate(self) -> None:
        """UserError for values out of range; nothing is read."""
        super().validate()
        if self.augment.mixes:
            raise UserError("mixup and cutmix make images of two classes, which no caption says: leave them out.")
        if not self.templates:
            raise UserError("--data.templates needs one caption or more, with {} for the name of the class.")
        for i, template in enumerate(self.templates):
            if template.count("{}") != 1:
                raise UserError(f"--data.templates: {template!r} must have {{}} once, for the name of the class.")
            if template in self.templates[:i]:
                raise UserError(f"--data.templates has {template!r} twice.")
        alike: dict[tuple[str, ...], str] = {}
        for name in self.names:
            if (known := tuple(words(name))) in alike or not known:
                same = f" is the same words as {alike[known]!r}" if known else " has no word in it"
                raise UserError(f"--data.names: {name!r}{same}, so its captions say no class.")
            alike[known] = name

    def metadata(self) -> dict[str, int]:
        """The part of `Dataset.metadata` that is known without reading."""
        known = super().metadata()
        if not self.names:
            return known
        captions, size = _captions(self.names, self.templates)
        return known | {"vocab": size, "text_length": captions.shape[-1]}

    def named(self) -> "CaptionedImages":
        """The same with the source's class names, if it has no `names`. UserError if the source has none, either."""
        if self.names:
            return self
        source = self._open()
        if not source.names:
            raise UserError(f"{source.title} has no class names to write captions with: give --data.names, one for "
                            f"each of its {source.classes} classes.")
        return replace(self, names=source.names)

    def transform(self, batch: dict[str, Any], train: bool) -> dict[str, Any]:
        """See `Images.transform`, and the class."""
        import jax

        found = super().transform(batch, train)
        if not self.names:  # `Contrastive.filled` sets them; other tasks need none
            return found
        captions_CTL = jax.numpy.asarray(_captions(self.names, self.templates)[0])
        if not train:
            found |= {"prompts": captions_CTL}
        if "targets" in batch:
            draw = lambda key: jax.random.randint(jax.random.fold_in(key, CAPTION), (), 0, len(self.templates))
            found |= {"text": captions_CTL[batch["targets"], jax.vmap(draw)(batch["key"])]}
        return found

    def describe(self) -> dict[str, str | int | float]:
        """See `Images.describe`."""
        return super().describe() | self.named()._lines()

    def load(self) -> ImageData:
        """See `Images.load`."""
        named = self.named()
        found = Images.load(named)
        return replace(found, classes=named.names, metadata=found.metadata | named.metadata(),
                       summary=found.summary | named._lines())

    def _open(self) -> Opened:
        """See `Images._open`. UserError also for another number of names than classes."""
        source = super()._open()
        if self.names and len(self.names) != source.classes:
            raise UserError(f"--data.names has {len(self.names)} names, and {source.title} has {source.classes} "
                            f"classes.")
        return source

    def _lines(self) -> dict[str, str]:
        known = _captions(self.names, self.templates)[1] - 2  # without padding and the unknown word
        return class_names(self.names) | {"captions": f"{len(self.templates)} templates, {known} words, such as "
                                                      f"{self.templates[0].replace('{}', self.names[-1])!r}"}


@functools.lru_cache(maxsize=8)
def _captions(names: tuple[str, ...], templates: tuple[str, ...]) -> tuple[np.ndarray, int]:
    """(word ids of all captions, int32 (names, templates, longest); the number of ids)."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    fitted = Words(VOCAB).fit(lambda split: iter(texts), 0)
    rows = fitted.encode_batch(texts)
    captions = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(captions, rows, strict=True):
        row[: len(ids)] = ids
    return captions.reshape(len(names), len(templates), -1), fitted.size
