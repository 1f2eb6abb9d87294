"""What a row holds of a teacher beside its logits: an embedding, and maps of attention.

B rows, M members, D width of an embedding, K width of what it was projected from, S numbers of all maps of a row.

The columns follow those of the sample: `embedding` (B, M * D) and, where it is int8, `embedding_scale` (B, M); then
`attention` (B, M * S). FORMAT.md says what they mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Self

import numpy as np

from softlabel.common.random import draw_bits, stream_key
from softlabel.store.columns import Array, Column, Columns
from softlabel.store.strict_json import OMIT

EMBEDDING: Final = "embedding"
ATTENTION: Final = "attention"
SCALE = "embedding_scale"
EmbeddingType = Literal["float16", "int8"]
FeatureName = Literal["embedding", "attention"]
_PROJECTION = 4000  # number of the stream of random signs


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """Where a member's embedding is taken.

    Attributes:
        module: of its network, by name; of an ONNX file an output; empty: what the network answers.
        side: what enters the module, or what it gives.
        width: K, numbers of one sample, before any projection.
        pool: what they are the mean over: nothing, the pixels of (B, K, H, W) or of (B, H, W, K), or the tokens of
            (B, L, K).
    """

    module: str
    side: Literal["input", "output"] = "output"
    width: int
    pool: Literal["none", "pixels", "last-pixels", "tokens"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """The embedding that each row has.

    Attributes:
        width: D.
        type: float16, or int8 with a scale for each row and member.
        taps: of each member; empty in a store of encoding `head`, whose embedding enters the last linear layer.
        projection: seed of the random signs by which it was projected to D; None: it is as it was taken.
        kept: whether a row has one for each member, (B, M, D), or that of the only one, (B, D).
    """

    width: int
    type: EmbeddingType = "float16"
    taps: tuple[Tap, ...] = ()
    projection: int | None = field(default=None, metadata=OMIT)
    kept: bool = field(default=False, metadata=OMIT)

    def __post_init__(self) -> None:
        if not 0 < self.width < 2**31 or any(not 0 < tap.width < 2**31 for tap in self.taps):
            raise ValueError(f"embedding: expected a width of at least 1, found {self.width}")
        if self.type not in ("float16", "int8"):
            raise ValueError(f"embedding: type: expected float16 or int8, found {self.type!r}")
        if self.projection is None and any(tap.width != self.width for tap in self.taps):
            raise ValueError(
                f"embedding: expected taps of width {self.width}, found {[tap.width for tap in self.taps]}"
            )

    def columns(self, members: int) -> tuple[Column, ...]:
        if self.type == "float16":
            return (Column(name=EMBEDDING, dtype="<f2", width=members * self.width),)
        return (
            Column(name=EMBEDDING, dtype="|i1", width=members * self.width),
            Column(name=SCALE, dtype="<f4", width=members),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The maps of attention that each row has, one after another, each row by row.

    Attributes:
        heights, widths: of each map.
        modules: of each member, the module whose output each map is of.
        kept: whether a row has those of each member, (B, M, S), or those of the only one, (B, S).
    """

    heights: tuple[int, ...]
    widths: tuple[int, ...]
    modules: tuple[tuple[str, ...], ...]
    kept: bool = field(default=False, metadata=OMIT)

    def __post_init__(self) -> None:
        sizes = (*self.heights, *self.widths)
        counts = {len(self.heights), len(self.widths), *map(len, self.modules)}
        if not sizes or any(not 0 < size < 2**15 for size in sizes) or len(counts) != 1:
            raise ValueError(f"attention: expected a height, a width and a module of each map, found {sizes}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of each map."""
        return tuple(height * width for height, width in zip(self.heights, self.widths, strict=True))

    @property
    def width(self) -> int:
        """S."""
        return sum(self.sizes)

    def columns(self, members: int) -> tuple[Column, ...]:
        return (Column(name=ATTENTION, dtype="<f2", width=members * self.width),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What rows hold beside logits: at least one of both."""

    embedding: Embedding | None = field(default=None, metadata=OMIT)
    attention: Attention | None = field(default=None, metadata=OMIT)

    def __post_init__(self) -> None:
        if self.embedding is None and self.attention is None:
            raise ValueError("features: expected an embedding or attention, found neither")

    @property
    def names(self) -> tuple[FeatureName, ...]:
        """Of those that there are."""
        both: tuple[tuple[FeatureName, object], ...] = ((EMBEDDING, self.embedding), (ATTENTION, self.attention))
        return tuple(name for name, one in both if one is not None)

    def columns(self, members: int) -> tuple[Column, ...]:
        """The columns of a row of `members` teachers (1 unless the store keeps its members apart)."""
        parts = [one.columns(members) for one in (self.embedding, self.attention) if one is not None]
        return tuple(column for part in parts for column in part)

    def check_run(self, members: int, *, kept: bool, of_tokens: bool) -> None:
        """Raises ValueError unless a run of so many members can have them."""
        if of_tokens:
            raise ValueError("features: expected rows of one answer each, found documents")
        counts = {len(one) for one in (self._taps, self._modules) if one is not None}
        marks = {one.kept for one in (self.embedding, self.attention) if one is not None}
        if counts != {members} or marks != {kept} or (members > 1 and not kept):
            raise ValueError(f"features: expected those of {members} members, kept apart, found {sorted(counts)}")

    @property
    def _taps(self) -> tuple[Tap, ...] | None:
        return None if self.embedding is None else self.embedding.taps

    @property
    def _modules(self) -> tuple[tuple[str, ...], ...] | None:
        return None if self.attention is None else self.attention.modules

    def of_members(self, numbers: Sequence[int], *, kept: bool) -> Self:
        """Those of some members, in this order."""
        embedding, attention = self.embedding, self.attention
        if embedding is not None:
            embedding = replace(embedding, taps=tuple(embedding.taps[number] for number in numbers), kept=kept)
        if attention is not None:
            attention = replace(attention, modules=tuple(attention.modules[number] for number in numbers), kept=kept)
        return replace(self, embedding=embedding, attention=attention)

    def joined(self, other: "Features") -> Self:
        """Those of other members behind them. Raises ValueError where the others have something else."""
        if self.of_members((), kept=True) != other.of_members((), kept=True):
            raise ValueError("features: expected the embeddings and attention of the other members")
        embedding, attention = self.embedding, self.attention
        if embedding is not None and other.embedding is not None:
            embedding = replace(embedding, taps=embedding.taps + other.embedding.taps)
        if attention is not None and other.attention is not None:
            attention = replace(attention, modules=attention.modules + other.attention.modules)
        return replace(self, embedding=embedding, attention=attention)

    def find_problem(self, columns: Columns) -> str | None:
        """What is wrong with stored values, None when nothing."""
        for name, array in columns.items():
            if array.dtype.kind == "f" and (wrong_B := ~np.isfinite(array).all(axis=1)).any():
                return f"row {int(wrong_B.argmax())} of a block: `{name}` is not finite"
            if name == SCALE and (wrong_B := (array <= 0).any(axis=1)).any():
                return f"row {int(wrong_B.argmax())} of a block: `{name}` is not above 0"
        return None


def decode_embedding(embedding: Embedding, columns: Columns) -> Array:
    """float32 (B, D), or (B, M, D) of kept members, of its columns, in their order."""
    values, *scales = columns.values()
    found = values.astype(np.float32, copy=False).reshape(len(values), -1, embedding.width)
    if scales:
        found *= scales[0][:, :, None]
    return found if embedding.kept else found[:, 0]


def decode_attention(attention: Attention, columns: Columns) -> Array:
    """float32 (B, S), or (B, M, S) of kept members."""
    (values,) = columns.values()
    found = values.astype(np.float32, copy=False).reshape(len(values), -1, attention.width)
    return found if attention.kept else found[:, 0]


def make_projection(seed: int, rows: int, width: int) -> Array:
    """The matrix of random signs, float32 (K, D), by which K numbers are projected to D: each is 1 or -1, divided by
    the root of D. Inner products keep their values in expectation, within about 1 / sqrt(D) of the norms."""
    words_KD = draw_bits(np.array([stream_key(seed, _PROJECTION)]), 0, rows * width).reshape(rows, width)
    signs_KD = 1 - 2 * (words_KD >> np.uint64(63)).astype(np.float32)
    return signs_KD / np.float32(np.sqrt(width))
