"""head: what enters the last linear layer of the teacher, and this layer once per store.

R rows, C classes, D width of the teacher's last hidden layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from softlabel.store.columns import Array, Column, Columns
from softlabel.store.encodings.base import Encoding, LastLayer
from softlabel.store.strict_json import OMIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Head(Encoding):
    """`width` numbers of type `hidden`, from which logits at temperature 1 follow: the layer's answers z, or with a
    `softcap` c, c tanh(z / c). Both are the teacher's, when left out."""

    name: ClassVar[str] = "head"
    sigmoid: ClassVar[bool] = True
    from_hidden: ClassVar[bool] = True
    extra: ClassVar[str | None] = "head"

    width: int | None = None
    hidden: Literal["float16", "int8"] = "float16"
    softcap: float | None = field(default=None, metadata=OMIT)

    def __post_init__(self) -> None:
        if self.width is not None and not 0 < self.width < 2**31:
            raise ValueError(f"encoding 'head': width: expected at least 1, found {self.width}")
        if self.hidden not in ("float16", "int8"):
            raise ValueError(f"encoding 'head': hidden: expected float16 or int8, found {self.hidden!r}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"encoding 'head': softcap: expected a number above 0, found {self.softcap}")

    @classmethod
    def from_options(cls, *, temperature: float, hidden: Literal["float16", "int8"] = "float16") -> Self:
        """The options of `softlabel generate`.

        Args:
            temperature: the store's.
            hidden: type in which encoding head stores the teacher's last hidden layer; float16 when absent.
        """
        return cls(hidden=hidden)

    def fit(self, *, layer: Callable[[], LastLayer] | None = None, **_: Any) -> "Head":
        if layer is None:
            return self
        found = layer()
        return replace(self, width=found.width if self.width is None else self.width, softcap=found.softcap)

    @property
    def hidden_form(self) -> tuple[int, Literal["float16", "int8"]] | None:
        return None if self.width is None else (self.width, self.hidden)

    def row_columns(self, num_classes: int) -> tuple[Column, ...]:
        if self.width is None:
            raise ValueError("encoding 'head' needs 'width'")
        if self.hidden == "float16":
            return (Column(name="hidden", dtype="<f2", width=self.width),)
        return (Column(name="hidden", dtype="|i1", width=self.width), Column(name="hidden_scale", dtype="<f4", width=1))

    def decode_rows(self, columns: Columns, *, temperature: float, extra: Columns | None, **_: Any) -> Array:
        assert extra is not None, "a head store needs its safetensors file"
        hidden_RD = columns["hidden"].astype(np.float32) * columns.get("hidden_scale", np.float32(1))
        logits_RC = hidden_RD @ extra["weight"].T.astype(np.float32) + extra["bias"]
        if self.softcap is not None:
            logits_RC = np.float32(self.softcap) * np.tanh(logits_RC / np.float32(self.softcap))
        return logits_RC / np.float32(temperature)

    def retemper(self, columns: Columns, factor: float) -> dict[str, Array]:
        return dict(columns)  # they hold the logits before any temperature

    def extra_shapes(self, num_classes: int) -> dict[str, tuple[int, ...]]:
        assert self.width is not None
        return {"weight": (num_classes, self.width), "bias": (num_classes,)}
