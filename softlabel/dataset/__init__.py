"""Sources of samples with stable string keys, and the one decoder of their images."""

from softlabel.dataset.base import IGNORE, RawImage, Sample, Source
from softlabel.dataset.decode import content_hash, decode_image, stack_images
from softlabel.dataset.opening import open_source

__all__ = [
    "IGNORE",
    "RawImage",
    "Sample",
    "Source",
    "content_hash",
    "decode_image",
    "open_source",
    "stack_images",
]
