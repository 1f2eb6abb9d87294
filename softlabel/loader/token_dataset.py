"""A map-style dataset of whole batches of documents, joined to the rows of a store by key.

Legend: N documents, K documents that are kept, B lines, L positions of a line, P positions that count, S stored
positions of a batch, W elements of a column at one position.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from softlabel.dataset import Source
from softlabel.errors import DataError, MismatchError
from softlabel.inputs.base import IGNORE, TokenIds
from softlabel.inputs.batch import refuse_failed
from softlabel.inputs.content import changed_content, hashes_of
from softlabel.labels.combine import Combination
from softlabel.loader.batch import BatchKeys, BatchRequest
from softlabel.loader.join import Int64s, Kept, Missing, choose_kept, describe_changed, read_keys
from softlabel.loader.packing import PackedEpoch, Packing
from softlabel.loader.target import make_target
from softlabel.loader.token_batch import TokenBatch
from softlabel.loss.targets import Target
from softlabel.store.reader import Store
from softlabel.store.token_rows import LENGTH, MASK, POSITIONS


class TokenDataset(Dataset[TokenBatch]):
    """Lines of the documents of a source, with the soft labels that a store has for their positions.

    Args:
        source: of documents of tokens, see `softlabel.dataset.tokenize_source`.
        store: where soft labels come from; None: the next tokens alone.
        length: L, positions of a line.
        pack: whether a line takes several documents.
        seed, shuffle: of the packing, see `Packing`.
        missing: what happens to a document whose key is not in the store, see `choose_kept`.
        combine: how a store's members become one teacher, where it keeps them apart.

    Raises:
        MissingKeyError: see `missing`.
        MismatchError: the store is not of tokens, or of another vocabulary or other documents.
        UsageError: a document is longer than a line.
        DataError: nothing is left to train on.
    """

    def __init__(
        self,
        source: Source,
        store: Store | None = None,
        *,
        length: int,
        pack: bool = True,
        seed: int = 0,
        shuffle: bool = True,
        missing: Missing = "error",
        combine: Combination | None = None,
    ) -> None:
        self.source, self.store, self._combination = source, store, combine
        keys = read_keys(source)
        kept, rows_N = Kept(samples=np.arange(len(keys))), np.full(len(keys), -1)
        if store is not None:
            _check_store(source, store)
            rows_N = store.lookup(keys, missing="mask")
            kept = choose_kept(source, store, keys, rows_N, missing)
        lengths_N = _read_lengths(source)
        # Without a token there is nothing to learn.
        self.samples = kept.samples[lengths_N[kept.samples] > 0]
        if not len(self.samples):
            raise DataError(f"{source.name}: expected documents with tokens, found none")
        self.skipped_missing = kept.skipped_missing
        self.skipped_bad = len(keys) - len(self.samples) - kept.skipped_missing
        self.rows: Int64s = rows_N[self.samples].astype(np.int64)
        self._keys = keys.take(self.samples)
        self.packing = Packing(
            lengths=lengths_N[self.samples], length=length, seed=seed, shuffle=shuffle, alone=not pack
        )
        self._packed: tuple[int, PackedEpoch] | None = None

    def __len__(self) -> int:
        """Documents of an epoch."""
        return len(self.samples)

    def lines(self, epoch: int) -> PackedEpoch:
        """The lines of an epoch; the last one asked for is kept."""
        epoch = epoch if self.packing.shuffle else 0  # all are equal
        # Read once: the thread of an iteration that was left may replace it meanwhile.
        packed = self._packed
        if packed is None or packed[0] != epoch:
            packed = self._packed = epoch, self.packing.pack(epoch)
        return packed[1]

    def runs_user_code(self, wanted: BatchRequest) -> bool:
        """Whether documents come out of a dataset of the user's."""
        return self.source.is_users

    def __getitems__(self, wanted: BatchRequest) -> TokenBatch:
        """The lines of an epoch (`wanted.view`) at these positions."""
        packed, length = self.lines(wanted.view), self.packing.length
        lines = [packed.line(number) for number in wanted.positions.tolist()]
        # Filler lines repeat others and count for nothing: they stay empty.
        counted = len(lines) if wanted.counted is None else wanted.counted
        lines[counted:] = [line[:0] for line in lines[counted:]]
        documents = np.concatenate(lines)
        keys = BatchKeys(self._keys, documents)
        ids = self._read(documents, keys)
        tokens_BL, place_BL, segment_BL, label_BL, weight_BL = (
            np.zeros((len(lines), length), kind) for kind in (*[np.int64] * 3, np.int64, np.float32)
        )
        label_BL[:] = IGNORE
        found = iter(ids)
        for row, line in enumerate(lines):
            at = 0
            for number in range(1, len(line) + 1):
                one = next(found)
                here = slice(at, at + len(one.ids))
                tokens_BL[row, here] = one.ids
                place_BL[row, here] = np.arange(len(one.ids))
                segment_BL[row, here] = number
                weight_BL[row, here] = one.mask
                label_BL[row, here][:-1] = np.where(one.mask[:-1], one.ids[1:], IGNORE)
                at = here.stop
        target, has_target_P = self._target(documents, ids)
        return TokenBatch(
            tokens=torch.from_numpy(tokens_BL),
            position_ids=torch.from_numpy(place_BL),
            segments=torch.from_numpy(segment_BL),
            labels=torch.from_numpy(label_BL),
            weight=torch.from_numpy(weight_BL),
            places=torch.from_numpy(np.flatnonzero(weight_BL)),
            target=target,
            has_target=has_target_P,
            keys=keys,
            samples=torch.from_numpy(self.samples[documents]),
            rows=torch.from_numpy(self.rows[documents]),
        )

    def _read(self, documents: Int64s, keys: BatchKeys) -> list[TokenIds]:
        samples = self.source.read(self.samples[documents].tolist())
        failed = {place: str(one.raw) for place, one in enumerate(samples) if not isinstance(one.raw, TokenIds)}
        refuse_failed(failed, list(keys), name=self.source.name)
        if self.store is not None:
            rows = self.rows[documents]
            known = np.flatnonzero(rows >= 0)
            hashes = hashes_of([samples[place].raw for place in known], self.source.inputs.content_hash)
            if len(changed := known[changed_content(hashes, self.store.content[rows[known]])]):
                raise MismatchError(describe_changed(self.source.name, list(keys), changed, self.store))
        return [one.raw for one in samples if isinstance(one.raw, TokenIds)]

    def _target(self, documents: Int64s, ids: list[TokenIds]) -> tuple[Target | None, Tensor | None]:
        """The target at the positions that count, and which of them have one (None: all)."""
        store = self.store
        if store is None:
            return None, None
        rows = self.rows[documents]
        names = [column.name for column in store.run.label_columns]
        stored = store.take(rows[rows >= 0], [*names, LENGTH, POSITIONS, MASK])
        labelled = stored.places
        counts = iter(np.split(np.arange(len(labelled)), np.cumsum(stored.positions)[:-1]))
        places: list[NDArray[np.int64]] = []
        for one, row in zip(ids, rows.tolist(), strict=True):
            of_L = np.full(len(one.ids), -1, np.int64)
            if row >= 0:
                of_positions = next(counts)
                of_L[labelled[of_positions]] = of_positions
            places.append(of_L[one.mask != 0])
        place_P = np.concatenate([np.zeros(0, np.int64), *places])
        has_P = place_P >= 0
        # A position without a label gets another's as filler, or zeros where no document of the batch has one.
        chosen = {
            name: column[np.maximum(place_P, 0)]
            if len(column)
            else np.zeros((len(place_P), *column.shape[1:]), column.dtype)
            for name, column in ((name, stored.columns[name]) for name in names)
        }
        target = make_target(store.run, chosen, extra=store.extra, combination=self._combination)
        return target, None if has_P.all() else torch.from_numpy(has_P)


def _read_lengths(source: Source) -> Int64s:
    """Tokens of each document, int64 (N,)."""
    lengths = getattr(source, "lengths", None)
    if lengths is None:
        raise MismatchError(
            f"{source.name}: expected documents of tokens, found {source.inputs.noun}; tokenise them first"
        )
    return np.asarray(lengths, np.int64)


def _check_store(source: Source, store: Store) -> None:
    tokens = store.run.tokens
    if tokens is None:
        raise MismatchError(
            f"{store.url}: has one label a sample, a language model learns from one a token; label the data with an "
            "lm: teacher"
        )
    made = getattr(source, "tokenization", None)  # of documents that were tokenised here
    if made is not None and made.vocabulary != tokens.tokenizer:
        raise MismatchError(
            f"{source.name}: its documents are of another vocabulary ({made.vocabulary[:12]}...) than the labels of "
            f"{store.url} ({tokens.tokenizer[:12]}...); tokenise with the teacher's"
        )
