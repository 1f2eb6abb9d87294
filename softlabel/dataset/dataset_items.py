"""Items of datasets in Python: which part is the sample, and which its label."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from softlabel.common.multi_hot import UNKNOWN
from softlabel.dataset.hard_labels import checked_labels, checked_multi_hot, choose_label
from softlabel.errors import DataError
from softlabel.inputs.base import IGNORE, InputKind
from softlabel.inputs.chat import CHATS
from softlabel.inputs.image_decode import IMAGES
from softlabel.inputs.tensor import TENSORS
from softlabel.inputs.text import TEXTS

# As Hugging Face datasets have them; a pair before its halves.
_TEXT_NAMES = (
    *(("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("question", "sentence"), ("question", "passage"), ("text",), ("sentence",)),
)
_IMAGE_NAMES = ("image", "img", "pixel_values")


class _NoLabel:
    """Marks an item without a label: None itself is an unknown label."""


NO_LABEL = _NoLabel()


def split_item(item: Any, name: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        chosen, _ = choose_item_label(tuple(item), name)
        label = NO_LABEL if chosen is None else item[chosen]
        holding = next((k for k in _IMAGE_NAMES if k in item), None)
        if holding is not None:
            return item[holding], label
        if texts := _find_texts(item):
            return item[texts[0]] if len(texts) == 1 else tuple(item[name] for name in texts), label
        if _is_chat(item.get("messages")):
            return item["messages"], NO_LABEL
        inputs = {key: value for key, value in item.items() if key != chosen}
        if not inputs or not all(_is_numbers(value) and not _is_pixels(value) for value in inputs.values()):
            raise DataError(
                f"{name}: expected items with 'image', 'text', 'messages', or arrays named like a network's inputs, "
                f"found {', '.join(map(str, item))}"
            )
        return inputs, label
    if isinstance(item, tuple | list):
        if not item:
            raise DataError(f"{name}: expected (image,) or (image, label), found an empty {type(item).__name__}")
        return item[0], item[1] if len(item) > 1 else NO_LABEL
    return item, NO_LABEL


def _find_texts(item: Mapping[Any, Any]) -> tuple[str, ...]:
    return next((names for names in _TEXT_NAMES if all(name in item for name in names)), ())


def find_unread_texts(first: Any, name: str) -> tuple[str, ...]:
    """Return a finding for each text of an item of texts that no teacher will see."""
    if not isinstance(first, Mapping) or any(image in first for image in _IMAGE_NAMES) or not _find_texts(first):
        return ()
    chosen, _ = choose_item_label(tuple(first), name)
    others = [
        key for key, value in first.items() if isinstance(value, str) and key not in (*_find_texts(first), chosen)
    ]
    return tuple(
        f"{other!r} of an item is not read; return it as 'text_pair' beside 'text' if it belongs to the text"
        for other in others
    )


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor | int | float | np.number)


def find_kind(value: Any) -> InputKind:
    """Return whether items are images, uint8 (H, W) or (H, W, C), texts or pairs of them, chats, or other numbers."""
    if _is_chat(value):
        return CHATS
    if isinstance(value, Mapping):
        return TENSORS
    if isinstance(value, str | tuple):
        return TEXTS
    if isinstance(value, np.ndarray | Tensor):
        return IMAGES if _is_pixels(value) else TENSORS
    return IMAGES


def _is_pixels(value: Any) -> bool:
    return str(getattr(value, "dtype", "")).removeprefix("torch.") == "uint8" and value.ndim in (2, 3)


@lru_cache(maxsize=16)  # items of one dataset have the same names
def choose_item_label(names: tuple[Any, ...], subject: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the name in a mapping that holds the label, and others that suggest labels."""
    remedy = "return (image, label) instead, or remove the others"
    return choose_label((name for name in names if isinstance(name, str)), subject=subject, remedy=remedy)


def count_flags(raw: Any) -> int | None:
    """Count the classes of a label that is 0 or 1 for each; None for a class number."""
    if not isinstance(raw, Tensor | np.ndarray | list | tuple):
        return None
    shape = np.shape(raw)
    return shape[0] if len(shape) == 1 and shape[0] else None


def parse_item_label(raw: Any, name: str, key: str, width: int | None) -> Any:
    if width is not None:
        found = np.full(width, UNKNOWN) if raw is NO_LABEL or raw is None else np.asarray(raw)
        if found.shape != (width,):
            raise DataError(
                f"{name}: sample {key!r}: expected a label of {width} numbers, 0 or 1 for each class, as the first one "
                f"has, found {type(raw).__name__} of shape {found.shape}; return such, or None where nothing is known"
            )
        return checked_multi_hot(found[None], name, f"sample {key!r}")[0]
    if raw is NO_LABEL or raw is None:
        return IGNORE
    try:
        value = np.asarray(raw)
        if value.ndim == 0 and value.dtype.kind in "iub":
            return int(checked_labels(value.astype(np.int64)[None], name, f"sample {key!r}")[0])
    except (TypeError, ValueError, RuntimeError):
        pass
    raise DataError(
        f"{name}: sample {key!r}: expected a class number, found {type(raw).__name__}; return one as the second part "
        "of the item (or 0 and 1 for every class, in the first item too), or ignore labels"
    )
