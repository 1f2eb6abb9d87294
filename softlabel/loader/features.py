"""What rows have beside labels, as a batch has it: embeddings, maps of attention, and the differences of the logits of
noisy copies; read only where a loop asks for it.

Legend: B batch, C classes, D width of an embedding, K directions, M members, S numbers of all maps of a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.store.features import ATTENTION, EMBEDDING, FeatureName, decode_attention, decode_embedding
from softlabel.store.manifest import Run
from softlabel.store.reader import Store
from softlabel.store.view_columns import DIFFERENCE

BatchFeature = FeatureName | Literal["difference"]
_NAMES = (*get_args(FeatureName), DIFFERENCE)


def check_also(also: Sequence[BatchFeature], store: Store | None) -> tuple[BatchFeature, ...]:
    """The features that a batch has.

    Raises:
        UsageError: a name that is none, or no store.
        MismatchError: the rows do not have one.
    """
    for name in also:
        if name not in _NAMES:
            raise UsageError(f"also: expected {', '.join(_NAMES[:-1])} or {_NAMES[-1]}, found {name!r}")
        if store is None:
            raise UsageError(f"also: {name}: expected a store that has it, found none")
        if not _has(store.run, name):
            option = "--augment noise-pair" if name == DIFFERENCE else f"--also {name}"
            raise MismatchError(
                f"{store.url}: expected rows with {name}, found none; label again with 'softlabel generate {option}'"
            )
    return tuple(dict.fromkeys(also))


def _has(run: Run, name: BatchFeature) -> bool:
    if name == DIFFERENCE:
        return run.views.directions > 0
    return (run.embedding if name == EMBEDDING else run.attention) is not None


def list_columns(run: Run, also: Sequence[BatchFeature]) -> list[str]:
    """Names of the columns to read for them, beside those of labels."""
    labels = {column.name for column in run.label_columns}
    names = [name for feature in also if feature != DIFFERENCE for name in run.names_of(feature)]
    return [name for name in names if name not in labels] + [name for name in also if name == DIFFERENCE]


def decode_features(run: Run, also: Sequence[BatchFeature], columns: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """What a batch has of them: float32, embedding (B, D) and attention (B, S), or (B, M, D) and (B, M, S) of kept
    members; difference (B, K, C)."""
    found = {}
    if EMBEDDING in also:
        assert run.embedding is not None
        stored = {name: _widen(columns[name]) for name in run.names_of(EMBEDDING)}
        found[EMBEDDING] = decode_embedding(run.embedding, stored)
    if ATTENTION in also:
        assert run.attention is not None
        stored = {name: _widen(columns[name]) for name in run.names_of(ATTENTION)}
        found[ATTENTION] = decode_attention(run.attention, stored)
    if DIFFERENCE in also:
        shape = (len(columns[DIFFERENCE]), run.views.directions, run.num_classes)
        found[DIFFERENCE] = columns[DIFFERENCE].astype(np.float32).reshape(shape)
    return {name: torch.from_numpy(array) for name, array in found.items()}


def _widen(column: NDArray[Any]) -> NDArray[Any]:
    """float16 as float32: torch does it in a tenth of NumPy's time."""
    if column.dtype != np.float16:
        return column
    own = column if column.flags.writeable else column.copy()
    widened: NDArray[Any] = torch.from_numpy(own).float().numpy()
    return widened
