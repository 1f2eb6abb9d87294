"""sampled: classes drawn from the teacher, with importance weights.

R rows, C classes, S draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np

from softlabel.store.columns import Array, Column, Columns, index_dtype
from softlabel.store.encodings.base import Encoding, Finding, check_values
from softlabel.store.strict_json import ABSENT, OMIT

Draw = Literal["independent", "systematic"]

_OFFERED = (10, 50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Encoding):
    """`samples` draws from softmax(proposal * scaled logits), equal ones merged; unused places have weight 0.

    draw: how the points of a row lie in [0, 1): at equal distances from one random start (systematic), or each by
    itself (independent). Left out: as in the store that is continued, else systematic. Stores that do not record it are
    of independent draws.
    """

    name: ClassVar[str] = "sampled"
    drawn: ClassVar[bool] = True
    sparse: ClassVar[bool] = True

    samples: int
    proposal: float | None = field(default=None, metadata=OMIT)
    draw: Draw | None = field(default=None, metadata={ABSENT: "independent"})

    def __post_init__(self) -> None:
        if not 0 < self.samples < 2**31:
            raise ValueError(f"encoding 'sampled': samples: expected at least 1, found {self.samples}")
        if self.proposal is not None and not 0 < self.proposal <= 1:
            raise ValueError(f"encoding 'sampled': proposal: expected above 0 and at most 1, found {self.proposal}")
        if self.draw is not None and self.draw not in get_args(Draw):
            raise ValueError(f"encoding 'sampled': draw: expected independent or systematic, found {self.draw!r}")

    @classmethod
    def from_options(cls, *, temperature: float, samples: int = 50, draw: Draw | None = None) -> Self:
        """The options of `softlabel generate`.

        Args:
            temperature: the store's.
            samples: draws that encoding sampled keeps of a row; 50 when absent.
            draw: how encoding sampled draws, systematic (equally spaced from one random start, the smaller variance) or
                independent; when absent, as the store that is continued, else systematic.
        """
        return cls(samples=samples, draw=draw)

    @classmethod
    def offers(cls, *, num_classes: int, temperature: float) -> tuple[Self, ...]:
        return tuple(cls(samples=samples) for samples in _OFFERED if samples < num_classes)

    @property
    def title(self) -> str:
        return f"{self.name} {self.samples}" + (" independent" if self.draw == "independent" else "")

    def fit(self, *, there: Encoding | None = None, **_: Any) -> "Sampled":
        if self.draw is not None:
            return self
        return replace(self, draw=there.draw if isinstance(there, Sampled) else "systematic")

    def row_columns(self, num_classes: int) -> tuple[Column, ...]:
        if self.draw is None:
            raise ValueError("encoding 'sampled' needs 'draw'")
        return (
            Column(name="index", dtype=index_dtype(num_classes), width=self.samples),
            Column(name="weight", dtype="<f4", width=self.samples),
        )

    def decode_rows(self, columns: Columns, *, num_classes: int, **_: Any) -> Array:
        weights_RC = np.zeros((len(columns["index"]), num_classes), np.float64)
        rows = np.arange(len(weights_RC))[:, None]
        np.add.at(weights_RC, (rows, columns["index"].astype(np.int64)), columns["weight"])
        with np.errstate(divide="ignore"):
            return np.log(weights_RC).astype(np.float32)

    def check_rows(self, columns: Columns, num_classes: int) -> Iterator[Finding]:
        yield from check_values(columns, num_classes)
        weight_RS = columns["weight"]
        yield (weight_RS < 0).any(axis=1) | ~(weight_RS > 0).any(axis=1), "`weight` is negative or all 0"
