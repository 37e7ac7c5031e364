"""Images and their labels."""

from lab.data.images.augment import Augment
from lab.data.images.captions import CaptionedImages
from lab.data.images.idx import Idx
from lab.data.images.images import Images
from lab.data.images.sources import ImageFolder, TfdsImages

__all__ = ["Augment", "CaptionedImages", "Idx", "Images", "ImageFolder", "TfdsImages"]
