"""What the store asks an encoding, and what code asks that makes or reads its rows.

An encoding is a frozen dataclass: its fields are its parameters, which `manifest.json` has beside its name. A new one
is a subclass here, entered in the table of `registry`, and one in `softlabel.labels.encodings` that makes its columns.

B rows, C classes, M members, R = B * M, W elements of one column in one row.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from softlabel.common.activation import Activation
from softlabel.store.columns import Array, Column, Columns
from softlabel.store.strict_json import Tagged

# Which of R rows are wrong, bool (R,), and what is wrong with them.
Finding = tuple[Any, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastLayer:
    """What an encoding records of a teacher's last linear layer: how many numbers enter it, and c of c tanh(z / c),
    which its answers z go through; None where they are the logits themselves."""

    width: int
    softcap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding(Tagged, ABC):
    """How scaled logits are stored; FORMAT.md says what the columns mean.

    Attributes:
        exact: a row gives back the very float32 numbers that were encoded.
        drawn: a row is drawn at random, from a seed of its own: only its expectation is the teacher's.
        sparse: a row names some of the classes.
        sigmoid: a row may hold the logits of independent sigmoids, which are not relative to its maximum.
        from_hidden: a row is what enters the last linear layer of one teacher, not logits.
        labels: a row has labels at all.
        extra: name of the safetensors file that all shards share; None: there is none.
        scanned: the column that `is_clean` judges while a file is hashed, where it is the only one.
    """

    kinds: ClassVar[dict[str, type["Encoding"]]] = {}  # filled by `registry`
    exact: ClassVar[bool] = False
    drawn: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    sigmoid: ClassVar[bool] = False
    from_hidden: ClassVar[bool] = False
    labels: ClassVar[bool] = True
    extra: ClassVar[str | None] = None
    scanned: ClassVar[str | None] = None

    @abstractmethod
    def row_columns(self, num_classes: int) -> tuple[Column, ...]:
        """The columns of a row of one teacher."""

    @abstractmethod
    def decode_rows(self, columns: Columns, *, num_classes: int, temperature: float, extra: Columns | None) -> Array:
        """Scaled logits (R, C), float32, of columns (R, W)."""

    def check_rows(self, columns: Columns, num_classes: int) -> Iterator[Finding]:
        """What may not be in columns (R, W): findings, of which those without a wrong row say nothing."""
        yield from check_values(columns, num_classes)

    def check_sigmoid_rows(self, columns: Columns, num_classes: int) -> Iterator[Finding]:
        """The same of rows of independent sigmoids, of which every number is finite."""
        yield from check_values(columns, num_classes)

    def is_clean(self, rows_RW: Array) -> bool:
        """Whether `check_rows` would find nothing in these rows of the column `scanned`."""
        raise NotImplementedError

    @classmethod
    def from_options(cls, *_: Any, **options: Any) -> Self:
        """The encoding that the command line describes: the keyword-only parameters of a subclass are its options, but
        for `temperature`, the store's; its docstring has their help."""
        return cls(**{name: value for name, value in options.items() if name != "temperature"})

    @classmethod
    def offers(cls, *, num_classes: int, temperature: float) -> tuple[Self, ...]:
        """What `softlabel plan` shows of this encoding."""
        return (cls(),)

    @property
    def title(self) -> str:
        """The name with what sets several of one name apart."""
        return self.name

    def name_for(self, num_classes: int) -> str:
        """The title where rows have so many classes."""
        return self.title

    @property
    def declared(self) -> tuple[float, ...] | None:
        """The temperatures that rows know something of; None: all that follow from the store's."""
        return None

    @property
    def hidden_form(self) -> tuple[int, Literal["float16", "int8"]] | None:
        """How many numbers enter the last linear layer, and how they are stored; None where they are not."""
        return None

    def knows(self, temperature: float) -> bool:
        return self.declared is None or find_temperature(self.declared, temperature) is not None

    @classmethod
    def check_activation(cls, activation: Activation) -> None:
        """Raises ValueError where a row cannot hold the logits of such outputs."""
        if activation == "sigmoid" and not cls.sigmoid:
            possible = ", ".join(name for name, kind in cls.kinds.items() if kind.sigmoid)
            raise ValueError(
                f"encoding {cls.name!r}: stores a softmax over the classes, found independent sigmoids; take {possible}"
            )

    def fit(
        self, *, temperature: float, layer: Callable[[], LastLayer] | None = None, there: "Encoding | None" = None
    ) -> "Encoding":
        """The encoding with those parameters filled in that were left to the store's temperature, to the teacher's last
        `layer`, or to what a store that is continued has `there`."""
        return self

    def at_one_temperature(self, temperature: float) -> "Encoding":
        """The encoding, of rows that know one temperature alone."""
        return self

    def retemper(self, columns: Columns, factor: float) -> dict[str, Array] | None:
        """Columns whose scaled logits are `factor` times as large, before rounding to the columns' types; None: they
        have to be decoded and encoded again."""
        return None

    def extra_shapes(self, num_classes: int) -> dict[str, tuple[int, ...]]:
        """The arrays of the file `extra`."""
        return {}

    @functools.cache  # noqa: B019 - a handful of encodings, asked for with every batch
    def columns(self, *, num_classes: int, members: int = 1) -> tuple[Column, ...]:
        """The columns of a row of `members` teachers (1 unless the store keeps its members apart)."""
        if self.from_hidden and members != 1:
            raise ValueError(f"encoding {self.name!r} stores one teacher, it cannot keep several")
        return tuple(replace(one, width=one.width * members) for one in self.row_columns(num_classes))

    def decode(
        self,
        columns: Columns,
        *,
        num_classes: int,
        temperature: float,
        members: int = 1,
        kept: bool = False,
        extra: Columns | None = None,
    ) -> Array:
        """Scaled logits, float32, up to a constant per row: (B, C), or (B, M, C) when members are `kept` apart.

        temperature: the store's. extra: the arrays of the store's safetensors file.
        Where an encoding leaves something out: top-k spreads the tail evenly, unsampled classes are -inf.
        """
        flat = _by_member(columns, members)
        logits_RC = self.decode_rows(flat, num_classes=num_classes, temperature=temperature, extra=extra)
        return logits_RC.reshape(-1, members, num_classes) if kept else logits_RC

    def problem(
        self,
        columns: Columns,
        *,
        num_classes: int,
        members: int = 1,
        activation: Activation = "softmax",
        noun: str = "row",
    ) -> str | None:
        """What is wrong with stored values, None when nothing; `noun` is what one of them is called."""
        flat = _by_member(columns, members)
        check = self.check_rows if activation == "softmax" else self.check_sigmoid_rows
        if any(len(array) for array in flat.values()):
            for wrong_R, text in check(flat, num_classes):
                if wrong_R.any():
                    return f"{noun} {int(wrong_R.argmax()) // members} of a block: {text}"
        return None


def _by_member(columns: Columns, members: int) -> dict[str, Array]:
    """Columns (B, M * W) as (R, W)."""
    return {name: array.reshape(len(array) * members, array.shape[1] // members) for name, array in columns.items()}


def check_values(columns: Columns, num_classes: int, *, masked: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Numbers are finite and ids (columns named `...index`) are classes. -inf is a masked class, in the columns that
    have one; NaN and +inf are always wrong."""
    for name, array in columns.items():
        if array.dtype.kind == "f":
            wrong = np.isnan(array) | (array == np.inf) | (False if name in masked else array == -np.inf)
            yield wrong.any(axis=1), f"`{name}` is not finite"
        elif name.endswith("index"):
            ids = array.astype(np.int64)
            yield ((ids >= num_classes) | (ids < 0)).any(axis=1), f"`{name}` is not a class"


def check_maximum(columns: Columns, name: str) -> Iterator[Finding]:
    yield columns[name].max(axis=1) != 0, f"the maximum of `{name}` is not 0"


def check_distinct(columns: Columns, name: str) -> Iterator[Finding]:
    index = np.sort(columns[name], axis=1)
    yield (index[:, 1:] == index[:, :-1]).any(axis=1), "a class occurs twice"


def find_temperature(known: tuple[float, ...], temperature: float) -> int | None:
    """Which of the known temperatures this is, to six digits; None: none of them."""
    return next((at for at, one in enumerate(known) if math.isclose(one, temperature, rel_tol=1e-6)), None)
