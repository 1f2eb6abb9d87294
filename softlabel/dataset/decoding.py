"""Decoding options of a source: requested, recorded in a store, or detected.

A 16-bit grey image does not record how many of its bits are in use, and a dark image uses few. So the number of bits is
detected for the whole source at once, from images of all its parts.
"""

import dataclasses
import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from softlabel.dataset.source import Source
from softlabel.dataset.subset import PartSource
from softlabel.errors import MismatchError, SpecError
from softlabel.inputs.base import Decoding, Raw, Sample
from softlabel.inputs.image_decode import IMAGES

log = logging.getLogger("softlabel")

_SAMPLED, _MEASURED = 4, 64  # images whose mode is read; whose pixels are, if one of those has 16 bits
_BITS = (8, 12, 16)


class DecodedSource(PartSource):
    """The whole of another source, with its own decoding."""

    def __init__(self, base: Source, decoding: Decoding) -> None:
        super().__init__(base)
        self.decoding = decoding
        self.maybe_repeated_keys, self.repeated_keys_remedy = base.maybe_repeated_keys, base.repeated_keys_remedy

    def count_labelled(self) -> int | None:
        return self.base.count_labelled()

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        return [dataclasses.replace(sample, decoding=self.decoding) for sample in self.base.read(indices)]

    def fingerprint(self) -> str:
        return self.base.fingerprint()


def read_decoding(options: dict[str, str], *, subject: str) -> Decoding:
    """Remove ``exif=upright|ignore`` and ``bits=N`` from the options of a SOURCE and parse them.

    Raises:
        SpecError: `exif` is another word, or `bits` is not 8 to 16.
    """
    exif, bits = options.pop("exif", "upright"), options.pop("bits", None)
    if exif not in ("upright", "ignore"):
        raise SpecError(f"{subject}: exif: expected upright (apply the EXIF orientation) or ignore, found {exif!r}")
    if bits is not None and bits not in map(str, range(8, 17)):
        raise SpecError(f"{subject}: bits: expected the bits used by 16-bit images, 8 to 16, found {bits!r}")
    return Decoding(upright=exif == "upright", bits=None if bits is None else int(bits))


def detect_decoding(source: Source, recorded: Mapping[str, Any] | None = None) -> Source:
    """Determine the bits of a source's 16-bit images: as requested, as a store recorded, or from its images.

    Args:
        source: the source.
        recorded: `manifest.recorded` of the store of its labels, if there is one.

    Returns:
        The source with its decoding set.

    Raises:
        MismatchError: the requested decoding differs from that of the store.
    """
    if source.inputs != IMAGES:
        return source
    if recorded:
        then = Decoding.of(recorded.get("decoding", {}))
        if source.decoding.upright != then.upright or source.decoding.bits not in (None, then.bits or 16):
            raise MismatchError(
                f"{source.name}: expected decoding {then.options()} as when the store was labelled, found "
                f"{source.decoding.options()}; use the same options"
            )
        if then.bits is None and _has_wide(source):  # a store without recorded bits used all 16
            then = dataclasses.replace(then, bits=16)
        return source if then == source.decoding else DecodedSource(source, then)
    if source.decoding.bits is not None or not _has_wide(source):
        return source
    return DecodedSource(source, dataclasses.replace(source.decoding, bits=_find_bits(source)))


def _has_wide(source: Source) -> bool:
    return any(_is_wide(sample.raw) for sample in source.read(_spread_indices(source, _SAMPLED)))


def _find_bits(source: Source) -> int:
    picked = _spread_indices(source, _MEASURED)
    values = [_find_largest(sample.raw) for sample in source.read(picked)]
    largest = max(values, default=0)
    bits = next((bits for bits in _BITS if largest < 1 << bits), 16)
    few = sum(0 < value < 1 << 8 for value in values) if bits > 8 else 0
    log.warning(
        "warning: %s: 16-bit images with a largest value of %d (%d of %d sampled): assumed to use %d bits%s; %s",
        source.name,
        largest,
        len(picked),
        len(source),
        bits,
        f"; {few} of the samples use at most 8 and become nearly black" if few else "",
        "to change this, let the dataset return 8 bits"
        if source.kind == "dataset"
        else "to change this, use '?bits=N'",
    )
    return bits


def _spread_indices(source: Source, count: int) -> list[int]:
    return np.unique(np.linspace(0, len(source) - 1, count).astype(np.int64)).tolist() if len(source) else []


def _is_wide(image: Raw) -> bool:
    """Whether an image is grey with more than 8 bits; reads only its header."""
    if isinstance(image, Image.Image):
        return image.mode.startswith("I")
    if not isinstance(image, bytes | bytearray | memoryview):
        return False
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.mode.startswith("I")
    except Exception:  # decoding reports damaged images with their keys
        return False


def _find_largest(image: Raw) -> int:
    if not _is_wide(image):
        return 0
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image))  # type: ignore[arg-type]
        return int(np.asarray(opened).max())
    except Exception:  # decoding reports damaged images with their keys
        return 0
