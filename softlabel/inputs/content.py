"""Content hashes: 64 bits of a sample as the source returned it, stored with its row to detect changed samples.

    encoded bytes                    their XXH3-64
    PIL image, array or tensor       XXH3-64 of type, shape and values, with a mark in its lower 16 bits
    text                             XXH3-64 of its UTF-8 bytes; see `TextKind`

The mark separates the two kinds: the hashes of one photo as a file and as pixels cannot be compared. One hash of a file
in 65,536 carries the mark by chance and counts as a hash of pixels.

Legend: B samples, H and W height and width, C channels.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from softlabel.inputs.base import Raw

_MARK = 0x7870
_MARKED = 0xFFFF
_PLAIN_MODES = ("L", "RGB", "RGBA", "I;16")  # defined by their array alone; the hash of other modes includes the name


def content_hash(image: Raw) -> int | None:
    """The hash of an image as a source gives it, not 0; None where there is none, because it could not be read.

    Equal pixels have equal hashes in every container: one channel counts as (H, W), a tensor (C, H, W) as (H, W, C), a
    palette as its colours.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return xxhash.xxh3_64_intdigest(image)
    if isinstance(image, Tensor):
        return _hash_tensor(image.detach().cpu())
    if isinstance(image, np.ndarray):
        return hash_array(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    if isinstance(image, Image.Image):
        try:
            return _hash_pil(image)
        except Exception:  # PIL cannot decode the file; `decode_image` reports the reason
            return None
    return None


def hash_values(values: Any, dtype: str, shape: tuple[int, ...], mode: str = "") -> int:
    """Return the marked XXH3-64 of `values` (a contiguous buffer), seeded with the hash of dtype, shape and mode."""
    return xxhash.xxh3_64_intdigest(values, _seed(dtype, shape, mode)) & ~_MARKED | _MARK


def comparable(now_B: NDArray[np.uint64], stored_B: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return bool (B,), whether two hashes (0 for none) are of the same kind and can be compared."""
    both_B = (now_B != 0) & (stored_B != 0)
    found: NDArray[np.bool_] = both_B & ((now_B == stored_B) | (_is_of_pixels(now_B) == _is_of_pixels(stored_B)))
    return found


def changed_content(now_B: NDArray[np.uint64], stored_B: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """bool (B,): where two hashes say that the image is another one than was labelled."""
    found: NDArray[np.bool_] = comparable(now_B, stored_B) & (now_B != stored_B)
    return found


def why_not_comparable(
    now_B: NDArray[np.uint64], stored_B: NDArray[np.uint64], *, kinds: tuple[str, str] | None = None
) -> str | None:
    """Return why the first incomparable pair of hashes (B,) is so; None if all readable samples can be compared.

    Args:
        now_B: hashes of samples that are given.
        stored_B: hashes of those that were labelled.
        kinds: names of the kinds of both, in this order, where they may differ.
    """
    places = np.flatnonzero((now_B != 0) & ~comparable(now_B, stored_B))
    if not len(places):
        return None
    if not stored_B[places[0]]:
        return "it was labelled without a content hash"
    if kinds is not None and kinds[0] != kinds[1]:
        return f"samples of kind {kinds[1]} were labelled, these are of kind {kinds[0]}"
    labelled, given = ("pixels", "files") if _is_of_pixels(stored_B[places[:1]])[0] else ("files", "pixels")
    return f"it was labelled from {labelled}, these are {given}"


def hashes_of(raws: Iterable[Raw], hash_one: Callable[[Raw], int | None] = content_hash) -> NDArray[np.uint64]:
    """uint64 (B,), 0 for none; `hash_one` is the kind's."""
    return np.array([hash_one(raw) or 0 for raw in raws], dtype=np.uint64)


@lru_cache(maxsize=4096)
def _seed(dtype: str, shape: tuple[int, ...], mode: str) -> int:
    text = f"{dtype} {'x'.join(map(str, shape))}{mode and ' '}{mode}"
    return xxhash.xxh3_64_intdigest(text.encode())


def _is_of_pixels(hashes_B: NDArray[np.uint64]) -> NDArray[np.bool_]:
    marked: NDArray[np.bool_] = (hashes_B & np.uint64(_MARKED)) == _MARK
    return marked


def hash_array(array: NDArray[Any], mode: str = "") -> int:
    """Of type, shape and values, in the byte order that files have."""
    plain = np.ascontiguousarray(array)
    plain = plain.astype(plain.dtype.newbyteorder("<"), copy=False)
    return hash_values(plain.reshape(-1).view(np.uint8), plain.dtype.str, array.shape, mode)


def _hash_tensor(tensor: Tensor) -> int:
    if tensor.dtype == torch.bfloat16:
        return hash_array(tensor.view(torch.int16).numpy(), "bfloat16")
    if tensor.dim() == 3:
        tensor = tensor[0] if tensor.shape[0] == 1 else tensor.permute(1, 2, 0)
    return hash_array(tensor.numpy())


def _hash_pil(image: Image.Image) -> int:
    if image.mode == "RGB":  # saves a copy
        return hash_values(image.tobytes(), "|u1", (image.height, image.width, 3))
    if image.mode in ("P", "PA", "La"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    mode = image.mode.partition(";")[0] + ";16" if image.mode.startswith("I;16") else image.mode
    return hash_array(np.asarray(image), "" if mode in _PLAIN_MODES else mode)
