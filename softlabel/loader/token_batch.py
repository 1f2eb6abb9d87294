"""What the training loop of a language model gets: documents in lines, and labels of their positions.

Legend: B lines, L positions of a line, N documents, P positions that count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from softlabel.loader.batch import NamedFields, move_target, pin_target
from softlabel.loss.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBatch(NamedFields):
    """Lines of documents, packed or padded.

    A document must not see the others of its line: `segments` says which positions belong together, `position_ids`
    counts from 0 in each document: networks of transformers keep documents apart by them, with `use_cache=False`.

        logits_PV = batch.at_places(model(...).logits)
        loss = distillation_loss(logits_PV, batch.target, batch.hard_labels)

    Attributes:
        tokens: int64 (B, L), 0 where there is no token.
        position_ids: int64 (B, L), the place in the document.
        segments: int64 (B, L), the number of the document in its line, from 1; 0: no token.
        labels: int64 (B, L), the next token of the same document where it counts, else -100: already shifted.
        weight: float32 (B, L), 1 where what comes next counts, 0 at prompts, padding and filler.
        places: int64 (P,), rising: the positions of weight 1 in the batch read line by line.
        target: what the teacher says at the places; None without a store.
        has_target: bool (P,), False where the store has no label of the position (its target is filler); None: all
            have one, or there is no store.
        keys: N keys, line after line.
        samples: int64 (N,), which documents of the dataset these are.
        rows: int64 (N,), their rows of the store, -1 for none.
    """

    tokens: Tensor
    position_ids: Tensor
    segments: Tensor
    labels: Tensor
    weight: Tensor
    places: Tensor
    target: Target | None
    has_target: Tensor | None
    keys: Sequence[str]
    samples: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def at_places(self, tensor: Tensor) -> Tensor:
        """The positions that count of a tensor (B, L, ...): (P, ...)."""
        return tensor.flatten(0, 1).index_select(0, self.places)

    @property
    def hard_labels(self) -> Tensor:
        """int64 (P,): `labels` at the places."""
        return self.at_places(self.labels)

    @property
    def attention_mask(self) -> Tensor:
        """bool (B, 1, L, L): whether a position sees another one, of its own document and not after it. Positions
        without a token see each other, so that no row of a softmax is empty.

        For networks that take no `position_ids`. transformers takes such a mask as it is, without the sliding window
        that some of its networks have: give these `position_ids` instead.
        """
        same_BLL = self.segments[:, :, None] == self.segments[:, None, :]
        length = self.segments.shape[1]
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        return (same_BLL & causal_LL)[:, None]

    def take(self, lines: slice, places: slice) -> Self:
        """Some of the lines, without keys, samples and rows.

        Args:
            lines: which.
            places: of all that count, those in the lines; their number follows from `places`, which the CPU would have
                to wait for where the batch is on a GPU.
        """
        length = self.tokens.shape[1]
        return replace(
            self,
            **{name: getattr(self, name)[lines] for name in ("tokens", "position_ids", "segments", "labels", "weight")},
            places=self.places[places] - lines.start * length,
            target=None if self.target is None else self.target.take(places),
            has_target=None if self.has_target is None else self.has_target[places],
            keys=(),
            samples=self.samples[:0],
            rows=self.rows[:0],
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch on another device; `samples` and `rows` are for the reader and stay where they are."""
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _MOVED}
        return replace(self, **moved, **move_target(self, device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _MOVED}, **pin_target(self))


_MOVED = ("tokens", "position_ids", "segments", "labels", "weight", "places")
