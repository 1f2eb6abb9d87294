"""Texts, or pairs of them, as samples: each network splits them into tokens by its own tokenizer.

Legend: B batch, L positions.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import Fitted, InputKind, Inputs, InputTransform, Item, Raw, Sample, Text


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


class Tokenizer:
    """What `tokenizer.json` says, as Hugging Face's tokenizers library runs it. It can be pickled.

    Attributes:
        content: the bytes of the file.
        fingerprint: their SHA-256.
    """

    def __init__(self, content: bytes) -> None:
        self.content, self.fingerprint = content, hashlib.sha256(content).hexdigest()
        # By length and side of truncation: threads share them, so that none is changed after it was made.
        self._loaded: dict[tuple[int, str], Any] = {}

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.content,)

    def _load(self, max_length: int, side: str) -> Any:
        try:
            import tokenizers
        except ImportError as error:
            raise SpecError(f"texts need the tokenizers library ({error}); pip install 'softlabel[hf]'") from error
        try:
            loaded = tokenizers.Tokenizer.from_str(self.content.decode())
        except Exception as error:  # the library raises plain Exception
            raise SpecError(f"tokenizer.json: cannot be used: {error}") from error
        # Lengths are those of the transform, whatever the file was saved with.
        loaded.no_padding()
        loaded.enable_truncation(max_length, strategy="longest_first", direction=side)
        return loaded

    @property
    def truncation_side(self) -> str:
        """Where the file says that texts lose their end: ``right`` or ``left``."""
        return str((json.loads(self.content).get("truncation") or {}).get("direction", "right")).lower()

    def encode(self, text: Text, max_length: int, side: str) -> tuple[list[int], list[int], bool]:
        """Token ids and segments of a text, at most `max_length`, and whether it was truncated at that side."""
        if (loaded := self._loaded.get((max_length, side))) is None:
            loaded = self._loaded[max_length, side] = self._load(max_length, side)
        found = loaded.encode(*((text,) if isinstance(text, str) else text))
        return found.ids, found.type_ids, bool(found.overflowing)


class _Tokens(dict[str, Tensor]):
    """The tensors of one sample, and whether its text was longer than they are."""

    truncated = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTransform(InputTransform):
    """How a network takes texts: split into tokens, truncated and padded to a length.

    A batch is padded to a bucket, never to its longest text alone: a text is always computed at the length of its own
    bucket, so that its label does not depend on the others.

    Attributes:
        fingerprint: SHA-256 of `tokenizer.json`.
        max_length: tokens of a text, with the special ones; the rest is left out.
        pad_id: of the token that fills up.
        segments: whether the network takes the number of the segment that a token belongs to.
        lengths: the buckets, ascending; the last is `max_length`.
        truncation_side: where a longer text loses tokens, ``right`` or ``left``.
        vocabulary: how many tokens the network knows.
        tokenizer: absent in a transform out of a manifest, which is compared and not used.
    """

    kind: ClassVar[str] = "text"
    remedy: ClassVar[str] = "give the {network} texts"
    spec_options: ClassVar[str] = "tokenizer, max_length"

    fingerprint: str
    max_length: int
    pad_id: int = 0
    segments: bool = False
    lengths: tuple[int, ...] = ()
    truncation_side: str = "right"
    tokenizer: Tokenizer | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise SpecError(f"max_length: expected at least 4 tokens, found {self.max_length}")
        if self.truncation_side not in ("right", "left"):
            raise SpecError(f"truncation_side: expected right or left, found {self.truncation_side!r}")
        lengths = self.lengths or default_buckets(self.max_length)
        if list(lengths) != sorted(set(lengths)) or lengths[0] < 1 or lengths[-1] != self.max_length:
            raise SpecError(
                f"buckets: expected ascending lengths that end with max_length, {self.max_length}, found "
                f"{','.join(map(str, lengths))}"
            )
        object.__setattr__(self, "lengths", tuple(lengths))

    @property
    def shape(self) -> Hashable:
        """Members with one tokenizer and the same lengths share one batch."""
        return (
            *(self.kind, self.fingerprint, self.max_length, self.pad_id, self.segments, self.lengths),
            self.truncation_side,
        )

    @property
    def norm(self) -> Hashable:
        """Nothing is left for the device."""
        return None

    @property
    def fixes_size(self) -> bool:
        """Texts of every length come out with the same one."""
        return True

    @property
    def buckets(self) -> tuple[int, ...]:
        """Lengths that a batch may have."""
        return self.lengths

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

    def _fill(self, values: list[int], padding: int, dtype: type[np.integer[Any]]) -> Tensor:
        # A tensor out of a list takes ten times as long as one out of an array.
        filled = np.full(self.max_length, padding, dtype)
        filled[: len(values)] = values
        return torch.from_numpy(filled)

    def collate(self, items: Sequence[Fitted]) -> Inputs:
        """Stacked, by name."""
        tokens = [item for item in items if isinstance(item, _Tokens)]
        assert len(tokens) == len(items)
        tensors = {name: torch.stack([one[name] for one in tokens]) for name in tokens[0]}
        return Inputs(tensors, sum(one.truncated for one in tokens))

    def bucket_of(self, inputs: Inputs) -> Tensor:
        """int64 (B,): the shortest bucket that holds all tokens of a text."""
        lengths_B = inputs.tensors["attention_mask"].sum(dim=1)
        buckets = torch.tensor(self.lengths, device=lengths_B.device)
        return buckets[torch.searchsorted(buckets, lengths_B)]

    def cut(self, inputs: Inputs, bucket: int | None = None) -> Inputs:
        """A batch at the length of a bucket, or of the longest that a text of it needs."""
        length = int(self.bucket_of(inputs).max()) if bucket is None else bucket
        return replace(inputs.map(lambda tensor: tensor[:, :length]), truncated=inputs.truncated)

    def finish(self, inputs: Inputs) -> Inputs:
        """As int64, which networks take."""
        return inputs.map(Tensor.long)

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


def default_buckets(max_length: int) -> tuple[int, ...]:
    """Every 4 tokens up to 64, every 8 up to 128, every 16 up to 256, and so on."""
    lengths, length = [8], 8
    while length < max_length:
        length += max(4, 1 << (length.bit_length() - 4))
        lengths.append(length)
    return (*takewhile(lambda one: one < max_length, lengths), max_length)
