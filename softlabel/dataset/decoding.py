"""How the images of a source are decoded, where that is not the usual way: asked for, recorded, or found in the images.

A 16-bit grey image does not say how many of its bits a camera or scanner has filled. One image cannot tell (a dark one
looks like few bits), so the whole source is decided at once, over images from all parts of it.
"""

import dataclasses
import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from softlabel.common.keys import Keys
from softlabel.dataset.source import Source
from softlabel.errors import MismatchError, SpecError
from softlabel.inputs.base import Decoding, Raw, Sample
from softlabel.inputs.image_decode import IMAGES

log = logging.getLogger("softlabel")

_GLANCES, _LOOKED_AT = 4, 64  # images whose mode is read at all; whose pixels are, once one of those has 16 bits
_BITS = (8, 12, 16)


class DecodedSource(Source):
    """Another source whose samples say how they are decoded."""

    def __init__(self, base: Source, decoding: Decoding) -> None:
        self.base, self.decoding, self.inputs = base, decoding, base.inputs
        self.kind, self.name, self.findings = base.kind, base.name, base.findings
        self.class_names, self.has_labels = base.class_names, base.has_labels
        self.doubtful_keys, self.against_equal_keys = base.doubtful_keys, base.against_equal_keys

    def __len__(self) -> int:
        return len(self.base)

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        return self.base.keys(start, stop)

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        return self.base.key_table(start, stop)

    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        return self.base.labels(start, stop)

    def count_labelled(self) -> int | None:
        return self.base.count_labelled()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        return [dataclasses.replace(sample, decoding=self.decoding) for sample in self.base.read(indices)]

    def blocks(self) -> list[tuple[int, int]]:
        return self.base.blocks()

    def fingerprint(self) -> str:
        return self.base.fingerprint()


def read_decoding(options: dict[str, str], *, subject: str) -> Decoding:
    """Take ``exif=upright|ignore`` and ``bits=N`` out of the options of a SOURCE.

    Raises:
        SpecError: another word, or a number of bits that is not 8 to 16.
    """
    exif, bits = options.pop("exif", "upright"), options.pop("bits", None)
    if exif not in ("upright", "ignore"):
        raise SpecError(
            f"{subject}: exif: expected upright (turn images as their EXIF data says) or ignore, found {exif!r}"
        )
    if bits is not None and bits not in map(str, range(8, 17)):
        raise SpecError(f"{subject}: bits: expected how many bits 16-bit images use, 8 to 16, found {bits!r}")
    return Decoding(upright=exif == "upright", bits=None if bits is None else int(bits))


def settle_decoding(source: Source, recorded: Mapping[str, Any] | None = None) -> Source:
    """The source, with the bits of its 16-bit images decided: as asked for, as a store recorded, or by what they hold.

    Args:
        recorded: `manifest.recorded` of the store that its images belong to; absent or empty where there is none.

    Raises:
        MismatchError: the source is decoded in another way than the images of that store were.
    """
    if source.inputs is not IMAGES:
        return source
    if recorded:
        then = Decoding.of(recorded.get("decoding", {}))
        if source.decoding.upright != then.upright or source.decoding.bits not in (None, then.bits or 16):
            raise MismatchError(
                f"{source.name}: its images are decoded with {source.decoding.options()}, those that were "
                f"labelled with {then.options()}; give the data with the same options"
            )
        if then.bits is None and _glance(source):  # labelled before bits were decided: all 16 were taken
            then = dataclasses.replace(then, bits=16)
        return source if then == source.decoding else DecodedSource(source, then)
    if source.decoding.bits is not None or not _glance(source):
        return source
    return DecodedSource(source, dataclasses.replace(source.decoding, bits=_find_bits(source)))


def _glance(source: Source) -> bool:
    return any(_is_wide(sample.raw) for sample in source.read(_spread(source, _GLANCES)))


def _find_bits(source: Source) -> int:
    picked = _spread(source, _LOOKED_AT)
    values = [_largest(sample.raw) for sample in source.read(picked)]
    largest = max(values, default=0)
    bits = next((bits for bits in _BITS if largest < 1 << bits), 16)
    few = sum(0 < value < 1 << 8 for value in values) if bits > 8 else 0
    log.warning(
        "warning: %s: has 16-bit images, whose largest value is %d (%d of %d looked at): taken to use %d bits%s; %s",
        source.name,
        largest,
        len(picked),
        len(source),
        bits,
        f", of which {few} of those looked at use 8 at most and become nearly black" if few else "",
        "let the dataset return 8 bits to have it otherwise"
        if source.kind == "dataset"
        else "'?bits=N' says otherwise",
    )
    return bits


def _spread(source: Source, count: int) -> list[int]:
    return np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64)).tolist() if len(source) else []


def _is_wide(image: Raw) -> bool:
    """Whether an image is grey in more than 8 bits; only its header is read."""
    if isinstance(image, Image.Image):
        return image.mode.startswith("I")
    if not isinstance(image, bytes | bytearray | memoryview):
        return False
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.mode.startswith("I")
    except Exception:  # no image, or a damaged one: decoding says so, with its key
        return False


def _largest(image: Raw) -> int:
    if not _is_wide(image):
        return 0
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image))  # type: ignore[arg-type]
        return int(np.asarray(opened).max())
    except Exception:  # damaged: decoding says so, with its key
        return 0
