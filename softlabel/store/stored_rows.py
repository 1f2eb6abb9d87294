"""Rows read from a store. B rows, L tokens and P labelled positions, W elements of a column, C classes, M members."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from softlabel.common.keys import Keys, PickedKeys
from softlabel.common.multi_hot import MULTI_HOT, UNKNOWN, Labels
from softlabel.errors import DataError, UsageError
from softlabel.store.columns import Array
from softlabel.store.features import ATTENTION, EMBEDDING, decode_attention, decode_embedding
from softlabel.store.manifest import Run
from softlabel.store.token_rows import LENGTH, MASK, POSITIONS, RowSpans, list_counts

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredRows:
    """Rows of a store: views int32 (B,), labels int64 (B,), -100 for none, content uint64 (B,), 0 for none, columns of
    the encoding (B, W). Arrays may be read-only.

    Rows of tokens have columns per token (L, W) and per labelled position (P, W), one row's after another's; `spans`
    says where each row's begin.

    Raises:
        UsageError: an attribute was not read.
    """

    run: Run
    views: npt.NDArray[np.int32]
    key_data: PickedKeys | None
    label_data: npt.NDArray[np.int64] | None
    content_data: npt.NDArray[np.uint64] | None
    columns: dict[str, Array]
    extra: Mapping[str, Array] | None = None

    def __len__(self) -> int:
        return len(self.views)

    @property
    def keys(self) -> list[str]:
        return require_read(self.key_data, "key").get().to_list()

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return require_read(self.label_data, "label")

    @property
    def hard_labels(self) -> Labels:
        """int64 (B,) as `labels`, or int8 (B, C) of a run of independent sigmoids: 1, 0, or -1 where unknown."""
        if self.run.activation == "softmax":
            return self.labels
        if not self.run.dataset.has_labels:
            return np.full((len(self), self.run.num_classes), UNKNOWN, np.int8)
        return require_read(self.columns.get(MULTI_HOT), MULTI_HOT)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, int64 (B,)."""
        return require_read(self.columns.get(LENGTH), LENGTH).reshape(-1).astype(np.int64)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Labelled positions of each document, int64 (B,)."""
        return require_read(self.columns.get(POSITIONS), POSITIONS).reshape(-1).astype(np.int64)

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """Which of its document's tokens each labelled position is the last one that was seen at, int64 (P,)."""
        tokens, spans = self.run.tokens, self.spans
        assert tokens is not None
        if tokens.positions == "masked":
            labelled = np.flatnonzero(require_read(self.columns.get(MASK), MASK).reshape(-1))
            return labelled - np.repeat(spans.offsets["token"][:-1], self.positions)
        return np.arange(spans.total("position")) - np.repeat(spans.offsets["position"][:-1], self.positions)

    @property
    def spans(self) -> RowSpans:
        """Where the elements of each row begin in the columns that were read."""
        counts = {name: self.columns[name] for name in list_counts(self.run.columns) if name in self.columns}
        return RowSpans.of(len(self), counts)

    def slice(self, start: int, stop: int) -> "StoredRows":
        """Return the rows `start` to `stop`, sharing their memory."""
        spans, per = self.spans, {column.name: column.per for column in self.run.columns}
        return replace(
            self,
            views=self.views[start:stop],
            key_data=None if self.key_data is None else PickedKeys(self.key_data.get().slice(start, stop)),
            label_data=None if self.label_data is None else self.label_data[start:stop],
            content_data=None if self.content_data is None else self.content_data[start:stop],
            columns={name: array[slice(*spans.cut(per[name], start, stop))] for name, array in self.columns.items()},
        )

    @property
    def content(self) -> npt.NDArray[np.uint64]:
        return require_read(self.content_data, "content")

    @property
    def embedding(self) -> Array:
        """The teacher's embedding, float32 (B, D), or (B, M, D) of kept members.

        Raises:
            UsageError: it was not read, or rows have none.
        """
        found = require_read(self.run.embedding, EMBEDDING)
        return decode_embedding(found, self._pick(self.run.names_of(EMBEDDING)))

    @property
    def attention(self) -> Array:
        """The teacher's maps of attention, float32 (B, S), or (B, M, S) of kept members; errors as `embedding`."""
        found = require_read(self.run.attention, ATTENTION)
        return decode_attention(found, self._pick(self.run.names_of(ATTENTION)))

    def _pick(self, names: Iterable[str]) -> dict[str, Array]:
        return {name: require_read(self.columns.get(name), name) for name in names}

    @property
    def scaled_logits(self) -> Array:
        """Logits / temperature, of a softmax up to a constant per row: float32 (B, C), or (B, M, C) of kept members; of
        tokens (P, C) or (P, M, C)."""
        run = self.run
        return run.encoding.decode(
            self._pick(column.name for column in run.label_columns),
            num_classes=run.num_classes,
            temperature=run.temperature,
            members=run.members_stored,
            kept=run.kept,
            extra=self.extra,
        )


def require_read(value: T | None, name: str) -> T:
    """Return the value of a column.

    Raises:
        UsageError: it was not read.
    """
    if value is None:
        raise UsageError(f"column {name!r} was not read; add it to `columns`")
    return value


def parse_keys(keys: Any, where: str) -> Keys:
    """Convert a caller's keys: strings, or integers, which stand for their decimal digits.

    Raises:
        UsageError: `keys` is a single string.
        DataError: a key is neither.
    """
    if isinstance(keys, str | bytes):
        raise UsageError(f"keys of {where}: expected a list of keys, found the string {keys!r}; pass [{keys!r}]")
    try:
        return Keys.of(keys)
    except DataError:
        listed = keys.tolist() if isinstance(keys, np.ndarray) else keys
        if not isinstance(listed, Sequence) or not any(map(_is_whole, listed)):
            raise
        return Keys.of([str(int(key)) if _is_whole(key) else key for key in listed])


def _is_whole(key: object) -> bool:
    return isinstance(key, int | np.integer) and not isinstance(key, bool)
