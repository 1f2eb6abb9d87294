"""Rows as a store gives them out.

B rows, W elements of a column in one row, C classes, M members.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from softlabel.common.keys import Keys, PickedKeys
from softlabel.errors import DataError, UsageError
from softlabel.store.columns import Array
from softlabel.store.manifest import Run

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredRows:
    """Rows as they were stored: views int32 (B,), labels int64 (B,) with -100 for none, content uint64 (B,) with 0 for
    none, columns of the encoding (B, W). Arrays may be read-only. What was not asked for raises UsageError."""

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
        return asked(self.key_data, "key").get().to_list()

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return asked(self.label_data, "label")

    @property
    def content(self) -> npt.NDArray[np.uint64]:
        return asked(self.content_data, "content")

    @property
    def scaled_logits(self) -> Array:
        """float32, logits / temperature up to a constant per row: (B, C), or (B, M, C) when members are kept."""
        run = self.run
        names = [column.name for column in run.label_columns]
        if missing := [name for name in names if name not in self.columns]:
            raise UsageError(f"column {missing[0]!r} was not read; ask for it too")
        return run.encoding.decode(
            {name: self.columns[name] for name in names},
            num_classes=run.num_classes,
            temperature=run.temperature,
            members=run.members_stored,
            kept=run.kept,
            extra=self.extra,
        )


def asked(value: T | None, name: str) -> T:
    """The value of a column. Raises UsageError when it was not read."""
    if value is None:
        raise UsageError(f"column {name!r} was not read; ask for it too")
    return value


def asked_keys(keys: Any, where: str) -> Keys:
    """Keys as a caller asks for them: texts, or whole numbers, which stand for their decimal digits.

    Raises UsageError for a single text, which would be taken apart into its characters.
    """
    if isinstance(keys, str | bytes):
        raise UsageError(f"keys of {where}: expected a list of keys, found the text {keys!r}; write [{keys!r}]")
    try:
        return Keys.of(keys)
    except DataError:
        listed = keys.tolist() if isinstance(keys, np.ndarray) else keys
        if not isinstance(listed, Sequence) or not any(map(_is_whole, listed)):
            raise
        return Keys.of([str(int(key)) if _is_whole(key) else key for key in listed])


def _is_whole(key: object) -> bool:
    return isinstance(key, int | np.integer) and not isinstance(key, bool)
