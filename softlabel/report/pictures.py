"""Thumbnails: samples of a source, by key, as small as a page takes them.

Legend: C channels, H and W height and width.
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from softlabel.dataset import Source
from softlabel.errors import DataError
from softlabel.inputs.base import Item, Sample
from softlabel.inputs.tensor import BANDS

_SIDE = 96
_TEXT = 300
_CHUNK = 65536
_BATCH = 256
# Sides in pixels and qualities that are tried in turn until all images together fit.
_STEPS = ((96, 72), (80, 66), (64, 60), (48, 50), (32, 40))
# Dark to light in equal steps of lightness, so that it reads in grey and with every colour vision.
_MAP_STOPS = (
    (0.0, (0, 32, 76)),
    (0.25, (58, 77, 107)),
    (0.5, (124, 123, 120)),
    (0.75, (188, 175, 111)),
    (1.0, (255, 234, 70)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A sample as the page shows it.

    Attributes:
        kind: ``image``: `data` is a data URI of a JPEG; ``heat``: a data URI of a small PNG; ``text``: the text itself,
            shortened; ``none``: why there is none.
        width, height: of a picture, in pixels; 0 otherwise.
        note: what is shown, where that is not the whole sample, such as the channels of an image of many; else ''.
    """

    kind: Literal["image", "heat", "text", "none"]
    data: str
    width: int = 0
    height: int = 0
    note: str = ""


def make_pictures(source: Source, keys: Iterable[str], *, budget: int = 1_500_000) -> dict[str, Picture]:
    """Read samples by key and make a picture of each.

    Images are at most 96 pixels wide and high; smaller ones stay as they are. Texts are cut to 300 characters. Numbers
    become a heat map, from the smallest value (dark) to the largest (light).

    Args:
        source: where the samples are.
        keys: of the samples; those that the source lacks get a picture of kind ``none``, as those that cannot be
            decoded.
        budget: characters that all images together may take; above it they become smaller and coarser.

    Returns:
        A picture for each key, in the order of `keys`; the same bytes for the same samples.

    Raises:
        DataError: the source cannot be read.
    """
    wanted = dict.fromkeys(keys)
    places = _find_places(source, set(wanted))
    made = _Pictures()
    order = sorted(places.items(), key=lambda item: item[1])
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        for (key, _), sample in zip(part, source.read([place for _, place in part]), strict=True):
            made.add(key, source, sample)
    for key in wanted.keys() - places.keys():
        made.done[key] = Picture(kind="none", data=f"not in {source.name}")
    made.encode_images(budget)
    return {key: made.done[key] for key in wanted}


def _find_places(source: Source, wanted: set[str]) -> dict[str, int]:
    """Return the index of each key that the source has."""
    places: dict[str, int] = {}
    for start in range(0, len(source), _CHUNK):
        if len(places) == len(wanted):
            break
        for place, key in enumerate(source.keys(start, start + _CHUNK), start):
            if key in wanted:
                places[key] = place
    return places


@dataclass(frozen=True, slots=True, kw_only=True)
class _Thumbnail:
    """An RGB image of at most 96 pixels a side, before compression."""

    image: Image.Image
    note: str


class _Pictures:
    """Pictures by key; images wait in `waiting` until their quality is known."""

    def __init__(self) -> None:
        self.done: dict[str, Picture] = {}
        self.waiting: dict[str, _Thumbnail] = {}

    def add(self, key: str, source: Source, sample: Sample) -> None:
        try:
            item, _ = source.inputs.decode(sample)
            shown = _draw(item, bands=source.inputs is BANDS)
        except DataError as error:
            shown = Picture(kind="none", data=f"cannot be decoded: {error}"[:_TEXT])
        if isinstance(shown, _Thumbnail):
            self.waiting[key] = shown
        else:
            self.done[key] = shown

    def encode_images(self, budget: int) -> None:
        """Compress the images that wait, with the best of the qualities that keeps them within the budget."""
        for side, quality in _STEPS:
            made = {key: _encode_jpeg(one, side, quality) for key, one in self.waiting.items()}
            if sum(len(one.data) for one in made.values()) <= budget:
                break
        self.done |= made
        self.waiting = {}


def _draw(item: Item, *, bands: bool) -> "Picture | _Thumbnail":
    if isinstance(item, dict):
        name, first = next(iter(item.items()))
        shown = _draw(first, bands=False)
        assert isinstance(shown, Picture)
        note = f"input {name}" if len(item) == 1 else f"input {name}, the first of {len(item)}"
        return Picture(kind="heat", data=shown.data, width=shown.width, height=shown.height, note=note)
    if not isinstance(item, torch.Tensor):
        return _shorten_text(item)
    if bands:
        return _draw_bands(item.numpy())
    if item.dtype == torch.uint8 and item.dim() == 3 and len(item) == 3:
        return _shrink(Image.fromarray(np.ascontiguousarray(item.numpy().transpose(1, 2, 0))), "")
    return _draw_heat(item.numpy())


def _shorten_text(text: str | tuple[str, str]) -> Picture:
    whole = text if isinstance(text, str) else " ⏎ ".join(text)
    note = "" if isinstance(text, str) else "a pair of texts"
    if len(whole) <= _TEXT:
        return Picture(kind="text", data=whole, note=note)
    note = f"{note}, the first" if note else "the first"
    return Picture(kind="text", data=whole[: _TEXT - 1] + "…", note=f"{note} {_TEXT - 1} of {len(whole):,} characters")


def _draw_bands(values_CHW: NDArray[np.generic]) -> _Thumbnail:
    """The first three channels as red, green and blue, or the mean of one or two as grey, from least to largest."""
    channels = len(values_CHW)
    if channels >= 3:
        note = "" if channels == 3 else f"channels 1, 2, 3 of {channels}"
        shown = values_CHW[:3].transpose(1, 2, 0)
    else:
        note = "" if channels == 1 else "mean of 2 channels"
        shown = np.repeat(values_CHW.mean(axis=0)[..., None], 3, axis=2)
    pixels = shown if shown.dtype == np.uint8 else (_scale(shown) * 255).round().astype(np.uint8)
    return _shrink(Image.fromarray(np.ascontiguousarray(pixels)), note)


def _scale(values: NDArray[np.generic]) -> NDArray[np.float64]:
    """Bring values to 0..1; all equal ones to 0.5."""
    numbers = values.astype(np.float64)
    low, high = numbers.min(), numbers.max()
    return (numbers - low) / (high - low) if high > low else np.full(numbers.shape, 0.5)


def _shrink(image: Image.Image, note: str) -> _Thumbnail:
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX if max(image.size) > 8 * _SIDE else Image.Resampling.LANCZOS)
    return _Thumbnail(image=image, note=note)


def _encode_jpeg(thumbnail: _Thumbnail, side: int, quality: int) -> Picture:
    image = thumbnail.image
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return Picture(
        kind="image", data=_data_uri("image/jpeg", buffer), width=image.width, height=image.height, note=thumbnail.note
    )


def _draw_heat(values: NDArray[np.generic]) -> Picture:
    """A tensor as rows and columns: a number as one cell, a vector wrapped into rows, of more axes the first plane."""
    shape = "x".join(str(length) for length in values.shape) or "one number"
    if not values.size:
        return Picture(kind="none", data=f"no numbers, shape {shape}")
    note = shape
    if values.ndim > 2:
        values = values.reshape(-1, *values.shape[-2:])
        note += f", the first of {len(values)} planes" if len(values) > 1 else ""
        values = values[0]
    scaled = _scale(values)
    if scaled.ndim < 2:
        columns = scaled.size if scaled.size <= 16 else int(np.ceil(np.sqrt(2 * scaled.size)))
        cells = np.full(-(-scaled.size // columns) * columns, np.nan)
        cells[: scaled.size] = scaled.ravel()
        scaled = cells.reshape(-1, columns)
    scaled = _average_cells(scaled)
    # The last colour of the palette is for the cells that no number fills.
    indices = np.where(np.isnan(scaled), 255, (np.nan_to_num(scaled) * 254).round()).astype(np.uint8)
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(_make_palette())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, transparency=255)
    return Picture(kind="heat", data=_data_uri("image/png", buffer), width=image.width, height=image.height, note=note)


def _make_palette() -> list[int]:
    positions = [position for position, _ in _MAP_STOPS]
    channels = [
        np.interp(np.arange(256) / 254, positions, [colour[one] for _, colour in _MAP_STOPS]) for one in range(3)
    ]
    return np.stack(channels, axis=1).round().astype(int).ravel().tolist()


def _average_cells(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bring a matrix to at most 48 rows and columns, each the mean of those that it stands for."""
    for axis in (0, 1):
        length = values.shape[axis]
        if length > _SIDE // 2:
            edges = np.linspace(0, length, _SIDE // 2 + 1).round().astype(np.int64)
            values = np.add.reduceat(values, edges[:-1], axis=axis)
            widths = np.diff(edges)
            values = values / (widths[:, None] if axis == 0 else widths)
    return values


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
