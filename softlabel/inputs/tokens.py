"""Documents of token ids as samples of a language model: a row of labels for each of their positions.

    source = tokenize_source(open_source(DATA), vocabulary, max_length=...)   softlabel/dataset/tokenize.py
    sample.raw                                  TokenIds: ids (L,) and which positions count
    TOKENS.decode(sample)                       {"input_ids": int32 (L,), "mask": uint8 (L,)} and the content hash
    TokenTransform.fit, .collate, .cut          the same and "attention_mask", padded to (B, L) of a bucket

    teacher = load_teacher("lm:FOLDER", kind="tokens")                        softlabel/models/teacher.py
    hidden_BLD = teacher.hidden(inputs)
    logits_PV = teacher.position_logits(hidden_BLD[inputs.tensors["mask"] != 0])      some positions at a time

Position t of a document is what a network says after its tokens 0 to t: nothing is shifted. `mask[t]` is 1 where what
comes after token t counts.

Legend: B batch, L positions.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import Fitted, InputKind, Inputs, Item, Raw, Sample, TokenIds
from softlabel.inputs.buckets import BucketTransform

EMPTY = "the document is empty: it has no position to label"  # the reason why it has no row


class TokenKind(InputKind):
    """Token ids; the content hash is of the ids as ``<i4``, whatever the mask is."""

    name: ClassVar[str] = "tokens"
    unit: ClassVar[str] = "doc"
    noun: ClassVar[str] = "documents"
    view_steps: ClassVar[frozenset[str] | None] = frozenset()

    def decode(self, sample: Sample) -> tuple[Item, int]:
        """See `InputKind.decode`; a document without tokens makes a sample bad."""
        raw = sample.raw
        if isinstance(raw, BadImageError):
            raise BadImageError(str(raw)) from raw
        if not isinstance(raw, TokenIds):
            raise DataError(f"expected the token ids of a document, found {type(raw).__name__}; tokenise it first")
        if not len(raw.ids):
            raise BadImageError(EMPTY)
        item = {"input_ids": torch.from_numpy(raw.ids.copy()), "mask": torch.from_numpy(raw.mask.copy())}
        return item, hash_ids(raw.ids)

    def content_hash(self, raw: Raw) -> int | None:
        """Of the ids."""
        return hash_ids(raw.ids) if isinstance(raw, TokenIds) else None


TOKENS = TokenKind()


def hash_ids(ids_L: NDArray[Any]) -> int:
    """The XXH3-64 of token ids as ``<i4``, not 0."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids_L, "<i4").data) or 1


def count_what_follows(counted_L: NDArray[Any]) -> NDArray[np.uint8]:
    """The mask of positions of a mask of tokens: what counts at a position is the token after it.

    Args:
        counted_L: (L,), true for the tokens that are to be learnt.

    Returns:
        uint8 (L,), 0 at the last position, after which the document has no token.
    """
    mask_L = np.zeros(len(counted_L), np.uint8)
    mask_L[:-1] = np.asarray(counted_L)[1:] != 0
    return mask_L


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTransform(BucketTransform):
    """How a language model takes documents: padded on the right to the length of a bucket.

    Attributes:
        fingerprint: of the vocabulary (`Vocabulary.fingerprint`).
        vocabulary: how many ids it has.
    """

    kind: ClassVar[str] = "tokens"
    remedy: ClassVar[str] = "give the {network} documents of its own tokens"
    spec_options: ClassVar[str] = "max_length, buckets"

    fingerprint: str
    vocabulary: int

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise SpecError(f"max_length: expected at least 1 token, found {self.max_length}")
        BucketTransform.__post_init__(self)

    @property
    def shape(self) -> Hashable:
        """Members with one vocabulary and the same lengths share one batch."""
        return (self.kind, self.fingerprint, self.vocabulary, self.max_length, self.pad_id, self.lengths)

    def fit(self, item: Item, *, fixed: bool = False) -> Fitted:
        """`input_ids` int32 (L,), `attention_mask` uint8 (L,), which are tokens, and `mask` uint8 (L,), after which of
        them counts what follows; all padded to `max_length`.

        Raises:
            DataError: it is no document of this vocabulary and length.
        """
        if not isinstance(item, dict) or set(item) != {"input_ids", "mask"}:
            raise DataError("the network takes documents of tokens, found samples of another kind; give it texts")
        ids_L = item["input_ids"].numpy()
        if len(ids_L) > self.max_length:
            raise DataError(
                f"expected a document of at most {self.max_length} tokens, found {len(ids_L)}; tokenise the data with "
                "the max_length of the network"
            )
        if ids_L.max() >= self.vocabulary or ids_L.min() < 0:
            wrong = ids_L[(ids_L >= self.vocabulary) | (ids_L < 0)][0]
            raise DataError(
                f"expected token ids from 0 to {self.vocabulary - 1}, found {wrong}: it is a token of another "
                "vocabulary; tokenise the data with the tokenizer of the network"
            )
        return {
            "input_ids": self._fill(ids_L, self.pad_id, np.int32),
            "attention_mask": self._fill(np.ones(len(ids_L)), 0, np.uint8),
            "mask": self._fill(item["mask"].numpy(), 0, np.uint8),
        }

    def collate(self, items: Sequence[Fitted]) -> Inputs:
        """Stacked, by name."""
        tokens = [item for item in items if isinstance(item, dict)]
        assert len(tokens) == len(items)
        return Inputs({name: torch.stack([one[name] for one in tokens]) for name in tokens[0]})

    def example(self, rows: int) -> Inputs | None:
        """Made-up documents of one to four tokens."""
        items: list[Fitted] = []
        for number in range(rows):
            ids = torch.arange(number, number + min(1 + number % 4, self.max_length), dtype=torch.int32)
            items.append(
                self.fit({"input_ids": ids % self.vocabulary, "mask": torch.ones(len(ids), dtype=torch.uint8)})
            )
        return self.cut(self.collate(items))

    def describe(self, shape: Sequence[Any]) -> str:
        """How many tokens."""
        sizes = {size for part in shape for size in (part[1:] if isinstance(part, tuple) else (part,))}
        return f"{' or '.join(map(str, sorted(sizes)))} tokens"

    @property
    def fit_in_words(self) -> str:
        """The vocabulary and the length."""
        return f"documents of {self.max_length} tokens of vocabulary {self.fingerprint[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            "kind": self.kind,
            "tokenizer": self.fingerprint,
            "vocabulary": self.vocabulary,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "buckets": list(self.lengths),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "TokenTransform":
        """The inverse of `to_dict`. Raises SpecError where a field is of another kind."""
        try:
            return cls(
                fingerprint=str(found["tokenizer"]),
                vocabulary=int(found["vocabulary"]),
                max_length=int(found["max_length"]),
                pad_id=int(found["pad_id"]),
                lengths=tuple(int(one) for one in found["buckets"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(
                f"preprocessing: expected tokenizer, vocabulary, max_length, pad_id and buckets, found {error!r}"
            ) from error
