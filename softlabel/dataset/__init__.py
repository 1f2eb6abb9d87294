"""Sources of samples with stable string keys, and the one decoder of their images."""

from softlabel.dataset.base import IGNORE, RawImage, Sample, Source, require_samples
from softlabel.dataset.content import comparable, content_hash, hashes_of, why_not_comparable
from softlabel.dataset.decode import decode_hashed, decode_image, decode_sample, stack_images
from softlabel.dataset.decoded import settle_decoding
from softlabel.dataset.findings import report_source
from softlabel.dataset.huggingface import stored_bytes
from softlabel.dataset.opening import open_source
from softlabel.dataset.reordered import ReorderedSource
from softlabel.dataset.wrapped import listed_labels

__all__ = [
    "IGNORE",
    "RawImage",
    "ReorderedSource",
    "Sample",
    "Source",
    "comparable",
    "content_hash",
    "decode_hashed",
    "decode_image",
    "decode_sample",
    "hashes_of",
    "listed_labels",
    "open_source",
    "report_source",
    "require_samples",
    "settle_decoding",
    "stack_images",
    "stored_bytes",
    "why_not_comparable",
]
