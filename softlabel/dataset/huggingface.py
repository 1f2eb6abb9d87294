"""Hugging Face datasets as they are stored: encoded images, which have a content hash that a file of them has too."""

import sys
from collections.abc import Mapping
from typing import Any

import fsspec
from torch.utils.data import Subset

from softlabel.errors import BadImageError


def undecoded(dataset: Any) -> Any:
    """A Hugging Face `Dataset`, or a torch `Subset` of one, whose images come as bytes; anything else as it is.

    Images stay decoded where decoding does more than that: a transform of the user's, a mode that they are brought to.
    """
    if type(dataset) is Subset:
        inner = undecoded(dataset.dataset)
        return dataset if inner is dataset.dataset else Subset(inner, dataset.indices)
    library = sys.modules.get("datasets")  # whoever hands one over has imported it
    if library is None or not isinstance(dataset, library.Dataset) or dataset.format["type"] == "custom":
        return dataset
    images = [
        name
        for name, feature in dataset.features.items()
        if isinstance(feature, library.Image) and feature.decode and feature.mode is None
    ]
    if not images:
        return dataset
    stored = dataset.with_format(None, columns=dataset.format["columns"])
    for name in images:
        stored = stored.cast_column(name, library.Image(decode=False))
    return stored


def stored_bytes(image: Any) -> Any:
    """The bytes of an image that was not decoded, out of the row itself or the file that it names; or what it is."""
    if not isinstance(image, Mapping) or set(image) != {"bytes", "path"}:
        return image
    if image["bytes"] is not None or image["path"] is None:
        return image["bytes"]
    try:
        with fsspec.open(image["path"], "rb") as file:
            return file.read()
    except (OSError, ValueError, ImportError) as error:
        return BadImageError(f"{image['path']}: the dataset cannot read it: {error}")
