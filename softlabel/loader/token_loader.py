"""The loader of a language model: lines of documents, joined to the labels of their positions by key."""

from dataclasses import dataclass
from pathlib import Path

from softlabel.common.arguments import check_arguments
from softlabel.dataset import Source
from softlabel.errors import UsageError
from softlabel.labels.combine import Combination
from softlabel.loader.epoch_loader import EpochLoader
from softlabel.loader.join import Int64s, Missing
from softlabel.loader.order import check_positions
from softlabel.loader.ranks import RankShare, Tail
from softlabel.loader.token_batch import TokenBatch
from softlabel.loader.token_dataset import TokenDataset
from softlabel.store.open import open_store
from softlabel.store.reader import Store


class TokenLoader(EpochLoader[TokenBatch]):
    """Batches of packed or padded documents, hard and soft labels of their positions.

        loader = TokenLoader(source, "labels/stories", batch_tokens=8192, pack=512)
        for batch in loader:
            hidden_BLD = student.hidden(batch.tokens, None, batch.position_ids)
            loss = linear_distillation_loss(
                *(batch.at_places(hidden_BLD), student.head_weight, student.head_bias, batch.target, batch.hard_labels),
                temperature=loader.temperature, soft_weight=0.9, hard_weight=0.1,
            )

    Iterating, epochs, states and ranks work as in `SoftLabelLoader`; what is counted are lines. How documents are
    packed is a pure function of (seed, epoch, lengths), so a loop resumes at any step, on any number of ranks.

    Args:
        source: of documents of tokens, see `softlabel.dataset.tokenize_source`.
        labels: a store or its path; None: the next tokens alone.
        batch_tokens: positions of a batch over all ranks, with padding: as many lines as fit, at least one a rank.
        pack: L, positions of a line that takes several documents.
        pad: L, positions of a line with one document; exactly one of the two is given.
        seed: of the order and the packing.
        shuffle: False takes the documents in their order.
        tail: of lines that fill no batch, see `SoftLabelLoader`.
        missing: ``error``, ``skip`` or ``hard-only``, for documents that the store has no row for.
        workers: processes that make batches.
        pin_memory: hand out batches in page-locked memory, for a GPU, and make the next one in a thread meanwhile.
        combine: rule, weights and temperature for the members of a store that keeps them apart.
        rank, world_size: which of the processes this is, from 0, and how many train together.

    Raises:
        UsageError: numbers that make no sense.
        SoftLabelError: data and store do not belong together (see `TokenDataset`).
    """

    dataset: TokenDataset

    @check_arguments
    def __init__(
        self,
        source: Source,
        labels: str | Path | Store | None = None,
        *,
        batch_tokens: int = 8192,
        pack: int | None = None,
        pad: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        tail: Tail = "keep",
        missing: Missing = "error",
        workers: int = 0,
        pin_memory: bool = False,
        combine: Combination | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        length = pad if pack is None else pack
        if length is None or (pack is not None and pad is not None):
            raise UsageError("pack and pad: expected one of them, the positions of a line, with or without packing")
        if length < 1 or workers < 0:
            raise UsageError(f"pack, pad and workers: expected at least 1 and 0, found {length} and {workers}")
        if batch_tokens < length * world_size:
            raise UsageError(
                f"batch_tokens: expected at least a line of {length} positions for each of {world_size} ranks, found "
                f"{batch_tokens}"
            )
        lines = batch_tokens // length
        shares = RankShare(samples=0, batch_size=lines, tail=tail, rank=rank, world_size=world_size)
        store = labels if labels is None or isinstance(labels, Store) else open_store(labels)
        dataset = TokenDataset(
            source,
            store,
            length=length,
            pack=pack is not None,
            seed=seed,
            shuffle=shuffle,
            missing=missing,
            combine=combine,
        )
        self.batch_tokens, self.length = batch_tokens, length
        super().__init__(
            source=source,
            store=store,
            dataset=dataset,
            order=_LineOrder(dataset),
            shares=shares,
            seed=seed,
            workers=workers,
            pin_memory=pin_memory,
            ahead=pin_memory,
            combine=combine,
        )

    def _identity(self) -> dict[str, int | str]:
        return {
            "seed": self.seed,
            "samples": len(self.dataset),
            "tokens": int(self.dataset.packing.lengths.sum()),
            "store": self.store.manifest.store_id if self.store is not None else "",
            "order": self._order.name,
        }


@dataclass(frozen=True, slots=True)
class _LineOrder:
    """Lines in the order in which they were packed, which is shuffled already."""

    dataset: TokenDataset

    @property
    def name(self) -> str:
        packing = self.dataset.packing
        how = "shuffled" if packing.shuffle else "in order"
        return f"{how}, {'one document' if packing.alone else 'documents packed'} in lines of {packing.length}"

    def count(self, epoch: int) -> int:
        return len(self.dataset.lines(epoch))

    def at(self, epoch: int, positions: Int64s) -> Int64s:
        check_positions(positions, self.count(epoch))
        return positions
