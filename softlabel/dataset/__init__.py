"""Sources of samples with stable string keys, and the one decoder of their images."""

from softlabel.dataset.base import IGNORE, RawImage, Sample, Source
from softlabel.dataset.decode import content_hash, decode_image, stack_images
from softlabel.dataset.findings import report_source
from softlabel.dataset.opening import open_source
from softlabel.dataset.reordered import ReorderedSource

__all__ = [
    "IGNORE",
    "RawImage",
    "ReorderedSource",
    "Sample",
    "Source",
    "content_hash",
    "decode_image",
    "open_source",
    "report_source",
    "stack_images",
]
