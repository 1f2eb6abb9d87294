"""Embeddings and maps of attention of stored rows, as a batch has them; read only where a loop asks for them.

Legend: B batch, D width of an embedding, M members, S numbers of all maps of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.store.features import ATTENTION, EMBEDDING, FeatureName, decode_attention, decode_embedding
from softlabel.store.manifest import Run
from softlabel.store.reader import Store


def check_also(also: Sequence[FeatureName], store: Store | None) -> tuple[FeatureName, ...]:
    """The features that a batch has.

    Raises:
        UsageError: a name that is none, or no store.
        MismatchError: the rows do not have one.
    """
    for name in also:
        if name not in get_args(FeatureName):
            raise UsageError(f"also: expected {' or '.join(get_args(FeatureName))}, found {name!r}")
        if store is None:
            raise UsageError(f"also: {name}: expected a store that has it, found none")
        if (store.run.embedding if name == EMBEDDING else store.run.attention) is None:
            raise MismatchError(
                f"{store.url}: expected rows with {name}, found none; label again with 'softlabel generate "
                f"--also {name}'"
            )
    return tuple(dict.fromkeys(also))


def list_columns(run: Run, also: Sequence[FeatureName]) -> list[str]:
    """Names of the columns to read for them, beside those of labels."""
    labels = {column.name for column in run.label_columns}
    return [name for feature in also for name in run.names_of(feature) if name not in labels]


def decode_features(run: Run, also: Sequence[FeatureName], columns: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """What a batch has of them: float32, embedding (B, D) and attention (B, S), or (B, M, D) and (B, M, S) of kept
    members."""
    found = {}
    if EMBEDDING in also:
        assert run.embedding is not None
        found[EMBEDDING] = decode_embedding(run.embedding, {name: columns[name] for name in run.names_of(EMBEDDING)})
    if ATTENTION in also:
        assert run.attention is not None
        found[ATTENTION] = decode_attention(run.attention, {name: columns[name] for name in run.names_of(ATTENTION)})
    return {name: torch.from_numpy(array) for name, array in found.items()}
