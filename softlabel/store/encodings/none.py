"""none: rows without labels, for stores of embeddings or attention alone."""

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Self

from softlabel.errors import UsageError
from softlabel.store.columns import Column, Columns
from softlabel.store.encodings.base import Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class NoLabels(Encoding):
    """No column."""

    name: ClassVar[str] = "none"
    labels: ClassVar[bool] = False

    @classmethod
    def offers(cls, *, num_classes: int, temperature: float) -> tuple[Self, ...]:
        return ()

    def row_columns(self, num_classes: int) -> tuple[Column, ...]:
        return ()

    def decode_rows(self, columns: Columns, **_: Any) -> NoReturn:
        raise UsageError("labels: expected a store with logits, found one of embeddings or attention alone")
