"""Encoded images of Hugging Face datasets, whose content hashes equal those of files."""

import sys
from collections.abc import Mapping
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch.utils.data import Subset

from softlabel.errors import BadImageError
from softlabel.inputs.base import IGNORE


def undecoded(dataset: Any) -> Any:
    """Make a Hugging Face `Dataset`, or a torch `Subset` of one, return images as bytes; return others unchanged.

    Images stay decoded if the dataset applies a transform or converts their mode.
    """
    if type(dataset) is Subset:
        inner = undecoded(dataset.dataset)
        return dataset if inner is dataset.dataset else Subset(inner, dataset.indices)
    library = sys.modules.get("datasets")  # imported if the dataset is one of its
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
    """Return the bytes of an encoded image, from its row or the file that the row names; else the value itself."""
    if not isinstance(image, Mapping) or set(image) != {"bytes", "path"}:
        return image
    if image["bytes"] is not None or image["path"] is None:
        return image["bytes"]
    try:
        with fsspec.open(image["path"], "rb") as file:
            return file.read()
    except (OSError, ValueError, ImportError) as error:
        return BadImageError(f"{image['path']}: the dataset cannot read it: {error}")


def read_integers(dataset: Any, name: str | None) -> NDArray[np.int64] | None:
    """Read a column of integers of a Hugging Face `Dataset`, or a torch `Subset` of one, without its other columns.

    Args:
        dataset: the dataset.
        name: of the column; None: none.

    Returns:
        int64 (N,), `IGNORE` for null; None for other datasets, columns of another type, and items that a transform
        makes.
    """
    if type(dataset) is Subset:
        found = read_integers(dataset.dataset, name)
        return None if found is None else found[np.asarray(dataset.indices, dtype=np.int64)]
    library = sys.modules.get("datasets")
    if library is None or not isinstance(dataset, library.Dataset) or dataset.format["type"] == "custom":
        return None
    if name not in dataset.features:
        return None
    column = dataset.with_format("arrow", columns=[name])[:].column(name)
    if not pa.types.is_integer(column.type) or pa.types.is_uint64(column.type):
        return None
    values = column.cast(pa.int64()).to_numpy()  # floats with NaN where there are nulls
    return np.where(np.isnan(values), IGNORE, values).astype(np.int64)
