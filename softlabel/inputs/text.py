"""Texts, or pairs of them, as samples: each network splits them into tokens by its own tokenizer.

Legend: B batch, L positions.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import Fitted, InputKind, Inputs, Item, Raw, Sample, Text
from softlabel.inputs.buckets import BucketTransform
from softlabel.inputs.tokenizer import Tokenizer


class TextKind(InputKind):
    """A string, or a pair of strings; the content hash is of their UTF-8 bytes."""

    name: ClassVar[str] = "text"
    unit: ClassVar[str] = "text"
    noun: ClassVar[str] = "texts"
    view_steps: ClassVar[frozenset[str] | None] = frozenset()

    def decode(self, sample: Sample) -> tuple[Item, int]:
        """See `InputKind.decode`; a text that is not Unicode makes a sample bad."""
        raw = sample.raw
        if isinstance(raw, BadImageError):
            raise BadImageError(str(raw)) from raw
        text = _text_of(raw)
        try:
            encoded = _encode(text)
        except UnicodeEncodeError as error:
            raise BadImageError(f"not valid Unicode: {error.reason} at position {error.start}") from error
        return text, xxhash.xxh3_64_intdigest(encoded) or 1

    def content_hash(self, raw: Raw) -> int | None:
        """Of the UTF-8 bytes; of a pair, of both behind the length of the first."""
        if isinstance(raw, BadImageError):
            return None
        try:
            return xxhash.xxh3_64_intdigest(_encode(_text_of(raw))) or 1
        except UnicodeEncodeError:
            return None


TEXTS = TextKind()


def _text_of(raw: Raw) -> Text:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, tuple | list) and len(raw) == 2 and all(isinstance(one, str) for one in raw):
        return raw[0], raw[1]
    raise DataError(f"expected a text, or a pair of texts, found {type(raw).__name__}; let the dataset return strings")


def _encode(text: Text) -> bytes:
    if isinstance(text, str):
        return text.encode()
    first, second = (one.encode() for one in text)
    return b"%d:%b%b" % (len(first), first, second)


class _Tokens(dict[str, Tensor]):
    """The tensors of one sample, and whether its text was longer than they are."""

    truncated = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTransform(BucketTransform):
    """How a network takes texts: split into tokens, truncated and padded to a length.

    Attributes:
        fingerprint: SHA-256 of `tokenizer.json`.
        segments: whether the network takes the number of the segment that a token belongs to.
        truncation_side: where a longer text loses tokens, ``right`` or ``left``.
        tokenizer: absent in a transform out of a manifest, which is compared and not used.
    """

    kind: ClassVar[str] = "text"
    remedy: ClassVar[str] = "give the {network} texts"
    spec_options: ClassVar[str] = "tokenizer, max_length"

    fingerprint: str
    segments: bool = False
    truncation_side: str = "right"
    tokenizer: Tokenizer | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise SpecError(f"max_length: expected at least 4 tokens, found {self.max_length}")
        if self.truncation_side not in ("right", "left"):
            raise SpecError(f"truncation_side: expected right or left, found {self.truncation_side!r}")
        BucketTransform.__post_init__(self)

    @property
    def shape(self) -> Hashable:
        """Members with one tokenizer and the same lengths share one batch."""
        return (
            *(self.kind, self.fingerprint, self.max_length, self.pad_id, self.segments, self.lengths),
            self.truncation_side,
        )

    def fit(self, item: Item, *, fixed: bool = False) -> Fitted:
        """Token ids int32 (L,), padded to `max_length`, and which of them count, uint8 (L,): a cache of texts and a
        window of them are a quarter of what a network takes, see `finish`.

        Raises:
            DataError: it is no text.
        """
        if not isinstance(item, str | tuple):
            raise DataError("the network takes texts, found numbers; give it the data that it was made for")
        assert self.tokenizer is not None, "a transform out of a manifest"
        ids, segments, truncated = self.tokenizer.encode(item, self.max_length, self.truncation_side)
        found = _Tokens(
            input_ids=self._fill(ids, self.pad_id, np.int32), attention_mask=self._fill([1] * len(ids), 0, np.uint8)
        )
        if self.segments:
            found["token_type_ids"] = self._fill(segments, 0, np.uint8)
        found.truncated = truncated
        return found

    def collate(self, items: Sequence[Fitted]) -> Inputs:
        """Stacked, by name."""
        tokens = [item for item in items if isinstance(item, _Tokens)]
        assert len(tokens) == len(items)
        tensors = {name: torch.stack([one[name] for one in tokens]) for name in tokens[0]}
        return Inputs(tensors, sum(one.truncated for one in tokens))

    def example(self, rows: int) -> Inputs | None:
        """Made-up texts of one to four words."""
        if self.tokenizer is None:
            return None
        words = [" ".join(("one", "two", "three", "four")[: 1 + number % 4]) for number in range(rows)]
        return self.cut(self.collate([self.fit(word) for word in words]))

    def describe(self, shape: Sequence[Any]) -> str:
        """How many tokens."""
        sizes = {size for part in shape for size in (part[1:] if isinstance(part, tuple) else (part,))}
        return f"{' or '.join(map(str, sorted(sizes)))} tokens"

    @property
    def fit_in_words(self) -> str:
        """The tokenizer and its length."""
        return f"texts of {self.max_length} tokens of tokenizer {self.fingerprint[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it; `from_dict` is the inverse but for the tokenizer."""
        return {
            "kind": self.kind,
            "tokenizer": self.fingerprint,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "segments": self.segments,
            "buckets": list(self.lengths),
            # Left out where it is what nearly all have: stores of today keep their identity.
            **({} if self.truncation_side == "right" else {"truncation_side": self.truncation_side}),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "TextTransform":
        """Without its tokenizer. Raises SpecError where a field is of another kind."""
        try:
            return cls(
                fingerprint=str(found["tokenizer"]),
                max_length=int(found["max_length"]),
                pad_id=int(found["pad_id"]),
                segments=bool(found["segments"]),
                lengths=tuple(int(one) for one in found["buckets"]),
                truncation_side=str(found.get("truncation_side", "right")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(
                f"preprocessing: expected tokenizer, max_length, pad_id, segments and buckets, found {error!r}"
            ) from error
