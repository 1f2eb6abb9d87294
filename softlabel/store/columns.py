"""What an encoding stores for a row: its columns, their types and widths.

B rows, C classes, M members, K kept classes, S draws, D width of the teacher's last hidden layer, E temperatures with a
known tail, X exact classes of an int8 row, W elements of one column in one row.

A column is a named array of shape (B, W) and one little-endian dtype. Shards, stream and cache handle columns alike and
know no encoding; decode.py turns them into scaled logits. A store that keeps its members has each column M times as
wide, the members side by side.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from softlabel.store.strict_json import OMIT

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]
Dtype = Literal["<f2", "<f4", "|i1", "|u1", "<u2", "<i4", "<u8"]

ROW_NAMES = ("key", "view", "label", "content")  # taken by the row itself
EXACT = 8  # classes of an int8 row that are stored exactly
EXTRA_NAME = "head"  # the safetensors file of an encoding that needs one


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One array of a shard: `dtype` is numpy's little-endian name ("<f2"), `width` the elements per row."""

    name: str
    dtype: Dtype
    width: int

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        return self.numpy.itemsize * self.width


def index_dtype(num_classes: int) -> Dtype:
    """The smallest type that holds every class id: ids never wrap and never pass through a float."""
    if num_classes <= 1 << 8:
        return "|u1"
    if num_classes <= 1 << 16:
        return "<u2"
    assert num_classes <= 1 << 31
    return "<i4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How scaled logits are stored; FORMAT.md says what the columns mean.

    float32, float16: every class. int8: every class in a byte, the 8 largest exactly. topk: the `k` largest and the
    log-sum-exp of the others at each of `temperatures` (the store's is among them). sampled: `samples` draws from
    softmax(proposal * scaled logits) with importance weights. head: the teacher's last hidden layer, `width` numbers as
    `hidden`, and its last linear layer once per store.
    """

    name: Literal["float32", "float16", "int8", "topk", "sampled", "head"] = "float16"
    k: int | None = field(default=None, metadata=OMIT)
    temperatures: tuple[float, ...] = field(default=(), metadata=OMIT)
    samples: int | None = field(default=None, metadata=OMIT)
    proposal: float | None = field(default=None, metadata=OMIT)
    width: int | None = field(default=None, metadata=OMIT)
    hidden: Literal["float16", "int8"] | None = field(default=None, metadata=OMIT)

    def __post_init__(self) -> None:
        needs = {"topk": {"k", "temperatures"}, "sampled": {"samples"}, "head": {"width", "hidden"}}.get(
            self.name, set()
        )
        for one in ("k", "temperatures", "samples", "width", "hidden"):
            if bool(getattr(self, one)) != (one in needs):
                verb = "needs" if one in needs else "has no"
                raise ValueError(f"encoding {self.name!r} {verb} {one!r}")
        numbers = [number for number in (self.k, self.samples, self.width) if number is not None]
        if any(not 0 < number < 2**31 for number in numbers) or any(not 0 < t < 1e9 for t in self.temperatures):
            raise ValueError(f"encoding {self.name!r}: a number is out of range")
        if self.proposal is not None and not (self.name == "sampled" and 0 < self.proposal <= 1):
            raise ValueError(f"encoding {self.name!r}: proposal must lie in (0, 1] and belongs to 'sampled'")

    @functools.cache  # noqa: B019 - a handful of encodings, asked for with every batch
    def columns(self, *, num_classes: int, members: int = 1) -> tuple[Column, ...]:
        """The columns of a row of `members` teachers (1 unless the store keeps its members apart)."""
        parts: list[tuple[str, Dtype, int]]
        match self.name:
            case "float32" | "float16":
                parts = [("logits", "<f4" if self.name == "float32" else "<f2", num_classes)]
            case "int8":
                exact = min(EXACT, num_classes)
                parts = [("q", "|i1", num_classes), ("scale", "<f4", 1), ("offset", "<f4", 1)]
                parts += [("top_index", index_dtype(num_classes), exact), ("top_value", "<f2", exact)]
            case "topk":
                kept = self.kept(num_classes)
                parts = [("index", index_dtype(num_classes), kept), ("value", "<f2", kept)]
                parts += [("tail", "<f4", len(self.temperatures))]
            case "sampled":
                assert self.samples is not None
                parts = [("index", index_dtype(num_classes), self.samples), ("weight", "<f4", self.samples)]
            case "head":
                assert self.width is not None
                if members != 1:
                    raise ValueError("encoding 'head' stores one teacher, it cannot keep several")
                parts = [("hidden", "<f2" if self.hidden == "float16" else "|i1", self.width)]
                parts += [("hidden_scale", "<f4", 1)] if self.hidden == "int8" else []
        return tuple(Column(name=name, dtype=dtype, width=width * members) for name, dtype, width in parts)

    def kept(self, num_classes: int) -> int:
        """K: how many classes a top-k row has."""
        assert self.k is not None
        return min(self.k, num_classes)

    @property
    def extra(self) -> tuple[str, ...]:
        """Names of the safetensors files that the store shares."""
        return (EXTRA_NAME,) if self.name == "head" else ()
