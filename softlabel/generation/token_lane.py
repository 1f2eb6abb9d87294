"""Compute a row of columns for every position of documents: what a language model says after each of their tokens.

    documents of a window -> passes of one length -> hidden states -> chunks of positions -> last layer -> encode

Logits exist for a chunk of positions alone, never for all of a batch. The shapes of passes and chunks depend on the
length of a document and on the run, not on the documents beside it, so that a position's label is the same to the bit
in every batch and shard.

Legend: B batch, C tokens of the vocabulary, D width, L positions of a document, M members, P some positions.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.keys import Keys
from softlabel.generation.batch_labels import BatchLabels, make_labels
from softlabel.generation.engine import unpack_answers
from softlabel.generation.input_reader import DecodedBatch
from softlabel.generation.labeller import Lane, find_wrong
from softlabel.generation.progress import Progress
from softlabel.generation.transfer import Download
from softlabel.inputs.base import IGNORE, Inputs
from softlabel.labels.combine import average_members
from softlabel.labels.encodings import encode
from softlabel.labels.fidelity import FidelityMeter
from softlabel.labels.row_seeds import make_row_seeds
from softlabel.store.manifest import ShardPlan
from softlabel.store.token_rows import LENGTH, MASK, POSITIONS, TOKENS

# Bytes of the logits of a chunk: enough positions for a matrix product, and few for the memory.
_CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
_POSITIONS_ON_CPU = 2048  # of a pass: more do not stay in the cache
_POSITIONS_A_SAMPLE = 64  # a pass on a GPU has as many positions as a batch of samples has times this

# Which positions of a pass are wanted: its inputs on the host -> bool (B, L).
Choice = Callable[[Inputs], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positions:
    """Some positions of documents, on the host; their logits and hidden states on the device.

    Attributes:
        documents: int64 (P,), the document of each in its window.
        places: int64 (P,), where in the document.
        following: int64 (P,), the token that comes next where it counts, else -100.
        logits: of each member, float32 (P, C).
        hidden: what went into the last layer of the first member, float32 (P, D).
    """

    documents: Tensor
    places: Tensor
    following: Tensor
    logits: list[Tensor]
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLane(Lane):
    """A lane whose rows are the positions of documents; see `Lane`.

    What looks at a sample as a whole, such as a preflight, gets one position of each document (`probe`).
    """

    def label(self, plan: ShardPlan, batches: Sequence[DecodedBatch], progress: Progress) -> list[BatchLabels]:
        """Label documents of one shard."""
        full = [batch for batch in batches if batch.keys]
        keys = [key for batch in full for key in batch.keys]
        parts = []
        with torch.inference_mode():
            chunks = self.iter_positions(full, self._choose_labelled)
            while True:
                with progress.spend("forward"):
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                with progress.spend("encoding"):
                    parts.append(self._encode_positions(plan, chunk, keys))
            with progress.spend("encoding"):
                made = iter(self._split(full, parts))
                return [next(made) if batch.keys else make_labels(batch, None, None) for batch in batches]

    def logits(self, batches: Sequence[DecodedBatch]) -> list[list[Tensor]]:
        """Logits float32 (B, C) of each batch and member at one position of each document."""
        return [found.logits for found in self._probe_batches(batches)]

    def hard_labels(self, batch: DecodedBatch) -> NDArray[np.int64]:
        """The next token at the position of each document that `logits` are of, int64 (B,)."""
        if not batch.keys:
            return np.zeros(0, np.int64)
        found: NDArray[np.int64] = _find_following(batch.inputs[0])[probe(batch.inputs[0])].numpy()
        return found

    def hidden(self, batch: DecodedBatch) -> tuple[Tensor, Tensor]:
        """Scaled logits (B, C) and what goes into the last layer (B, D), at one position of each document."""
        (found,) = self._probe_batches([batch])
        return self.combine(found.logits), found.hidden

    def sample_positions(self, batch: DecodedBatch, most: int) -> Iterator[tuple[Positions, NDArray[np.int64]]]:
        """Yield some labelled positions of a batch, evenly spread, and which of its document's labelled ones each is.

        Args:
            most: positions of a document.
        """

        def choose(inputs: Inputs) -> Tensor:
            labelled_BL = self._choose_labelled(inputs)
            step_B1 = -(-labelled_BL.sum(dim=1, keepdim=True) // most)
            return labelled_BL & ((labelled_BL.cumsum(dim=1) - 1) % step_B1.clamp_min(1) == 0)

        ordinals_BL = self._choose_labelled(batch.inputs[0]).cumsum(dim=1) - 1
        with torch.inference_mode():
            for found in self.iter_positions([batch], choose):
                yield found, ordinals_BL[found.documents, found.places].numpy()

    def pass_rows(self, bucket: int) -> int:
        """Return how many documents of a length make a forward pass."""
        is_cuda = self.members.device.type == "cuda"
        positions = self.batch_size * _POSITIONS_A_SAMPLE if is_cuda else _POSITIONS_ON_CPU
        return max(1, positions // bucket)

    def iter_positions(self, batches: Sequence[DecodedBatch], choose: Choice) -> Iterator[Positions]:
        """Yield the positions of documents that are wanted, in chunks, documents of one length after another."""
        teachers, device = self.members.teachers, self.members.device
        step = max(1, _CHUNK_BYTES[device.type] // (4 * self.run.num_classes * len(teachers)))
        for piece in self._cut_into_pieces(batches, 0):
            wanted_BL = choose(piece.inputs)
            wanted_BL[len(piece.rows) :] = False  # filler
            if not wanted_BL.any():
                continue
            following_P = _find_following(piece.inputs).reshape(-1)
            length = wanted_BL.shape[1]
            rows = torch.from_numpy(piece.rows)
            wanted_P = wanted_BL.reshape(-1)
            (inputs,) = self.members.upload([piece.inputs])
            hidden = [teacher.hidden(inputs).flatten(0, 1) for teacher in teachers]
            for start in range(0, len(wanted_P), step):
                here = slice(start, start + step)
                kept = torch.nonzero(wanted_P[here]).reshape(-1)
                if not len(kept):
                    continue
                there = kept.to(device, non_blocking=True)
                # The last layer takes whole chunks: a product of another shape could round in another way.
                logits = [
                    teacher.position_logits(part[here])[there] for teacher, part in zip(teachers, hidden, strict=True)
                ]
                yield Positions(
                    documents=rows[(start + kept) // length],
                    places=(start + kept) % length,
                    following=following_P[here][kept],
                    logits=logits,
                    hidden=hidden[0][here][there].float(),
                )

    def _probe_batches(self, batches: Sequence[DecodedBatch]) -> list[Positions]:
        if not batches:
            return []
        with torch.inference_mode():
            chunks = list(self.iter_positions(batches, probe))
            order = torch.argsort(torch.cat([one.documents for one in chunks]))
            there = order.to(self.members.device)
            whole = [torch.cat(parts)[there] for parts in zip(*(one.logits for one in chunks), strict=True)]
            hidden = torch.cat([one.hidden for one in chunks])[there]
            following = torch.cat([one.following for one in chunks])[order]
            places = torch.cat([one.places for one in chunks])[order]
            edges = np.cumsum([0, *(len(batch.keys) for batch in batches)]).tolist()
            return [
                Positions(
                    documents=torch.arange(stop - start),
                    places=places[start:stop],
                    following=following[start:stop],
                    logits=[logits[start:stop] for logits in whole],
                    hidden=hidden[start:stop],
                )
                for start, stop in itertools.pairwise(edges)
            ]

    def _choose_labelled(self, inputs: Inputs) -> Tensor:
        tokens = self.run.tokens
        assert tokens is not None
        labelled_BL = inputs.tensors["mask" if tokens.positions == "masked" else "attention_mask"] != 0
        if self.members.teachers[0].is_engine:
            there_BL = inputs.tensors["attention_mask"] != 0
            labelled_BL[:, :-1] &= there_BL[:, 1:]
            labelled_BL[:, -1] = False
        return labelled_BL

    def _encode_positions(self, plan: ShardPlan, chunk: Positions, keys: Sequence[str]) -> "_Encoded":
        run = self.run
        scaled_logits = self.combine(chunk.logits)
        flat_RC = scaled_logits.reshape(-1, run.num_classes)
        hidden_RD = chunk.hidden if self.head is not None else None
        meter = FidelityMeter(temperature=run.temperature, encoding=run.encoding, activation=run.activation)
        seeds_R = self._position_seeds(plan, chunk, keys, flat_RC.device) if run.encoding.drawn else None
        if self.members.teachers[0].is_engine:  # what it left out before is not known
            columns = unpack_answers(chunk.hidden, run.num_classes)
            nats_2R = torch.zeros((2, 0), dtype=torch.float64, device=flat_RC.device)
        else:
            columns = encode(flat_RC, run.encoding, temperature=run.temperature, seeds_R=seeds_R, hidden_RD=hidden_RD)
            nats_2R = meter.measure(flat_RC, columns, None if self.head is None else (self.head.weight, self.head.bias))
        mixed_PC = average_members(scaled_logits) if run.kept else scaled_logits
        following_P = chunk.following.to(mixed_PC.device, non_blocking=True)
        explained = None
        if self.head is not None:
            explained = self.head.explains(chunk.logits[0], chunk.hidden)
        return _Encoded(
            documents=chunk.documents,
            columns={name: column.reshape(len(chunk), -1) for name, column in columns.items()},
            nats=nats_2R,
            wrong=find_wrong(chunk.logits, run.activation),
            right=(mixed_PC.argmax(dim=-1) == following_P).sum(),
            known=(chunk.following >= 0).sum(),
            explained=explained,
        )

    def _position_seeds(self, plan: ShardPlan, chunk: Positions, keys: Sequence[str], device: torch.device) -> Tensor:
        """Return seeds of random draws, int64 (R,), a function of (seed, key, view, position, member)."""
        keys_P = Keys.of(keys).take(chunk.documents.numpy())
        members = range(self.first_member, self.first_member + self.run.members_stored)
        spots = np.ones(len(chunk), np.int64), chunk.places.numpy()
        seeds_R = make_row_seeds(keys_P, plan.view, seed=self.run.views.seed, members=members, spots=spots)
        return torch.from_numpy(seeds_R).to(device, non_blocking=True)

    def _split(self, batches: Sequence[DecodedBatch], parts: Sequence["_Encoded"]) -> list[BatchLabels]:
        """Put the positions into the order of the documents, and cut them into the batches of the window."""
        if not parts:  # no position of these documents is wanted
            return [self._make_empty(batch) for batch in batches]
        documents_P = torch.cat([part.documents for part in parts])
        order = torch.argsort(documents_P, stable=True)  # positions of a document come in their order
        there = order.to(self.members.device)
        columns = {name: torch.cat([part.columns[name] for part in parts])[there] for name in parts[0].columns}
        wrong_MP = torch.cat([part.wrong for part in parts], dim=1)[:, there]
        sizes = [len(batch.keys) for batch in batches]
        counts_N = torch.bincount(documents_P, minlength=sum(sizes))
        edges = [0, *torch.cumsum(counts_N, 0).tolist()]
        checks = {
            "nats": torch.cat([part.nats for part in parts], dim=1),
            "right": torch.stack([part.right for part in parts]).sum(),
            "known": torch.stack([part.known for part in parts]).sum(),
        }
        if explained := [part.explained for part in parts if part.explained is not None]:
            checks["explained"] = torch.cat(explained).all().reshape(1)
        made, first = [], 0
        for batch, size in zip(batches, sizes, strict=True):
            own = slice(edges[first], edges[first + size])
            owners = torch.repeat_interleave(torch.arange(size), counts_N[first : first + size]).to(wrong_MP.device)
            wrong_MB = torch.zeros(len(wrong_MP), size, dtype=torch.int32, device=wrong_MP.device)
            wrong_MB.index_add_(1, owners, wrong_MP[:, own].int())
            # The figures of a window come with its first batch.
            found = {**(checks if not first else {}), "wrong": wrong_MB > 0}
            rows = {name: column[own] for name, column in columns.items()}
            made.append(
                make_labels(
                    batch, Download(rows), Download(found), columns=_describe(batch, counts_N[first : first + size])
                )
            )
            first += size
        return made

    def _make_empty(self, batch: DecodedBatch) -> BatchLabels:
        none = {
            column.name: torch.zeros((0, column.width), dtype=_TORCH[column.dtype]) for column in self.run.label_columns
        }
        wrong_MB = torch.zeros(len(self.members.teachers), len(batch.keys), dtype=torch.bool)
        counts = torch.zeros(len(batch.keys), dtype=torch.int64)
        return make_labels(batch, Download(none), Download({"wrong": wrong_MB}), columns=_describe(batch, counts))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Encoded:
    """A chunk of positions: int64 (P,) documents, columns (P, W), and what is checked of them."""

    documents: Tensor
    columns: dict[str, Tensor]
    nats: Tensor
    wrong: Tensor
    right: Tensor
    known: Tensor
    explained: Tensor | None


_TORCH = {
    dtype: torch.from_numpy(np.zeros(0, dtype)).dtype for dtype in ("<f2", "<f4", "|i1", "|u1", "<u2", "<i4", "<u8")
}


def probe(inputs: Inputs) -> Tensor:
    """One position of each document, bool (B, L): a function of its tokens, before the last one if it has several."""
    ids_BL, there_BL = inputs.tensors["input_ids"], inputs.tensors["attention_mask"] != 0
    sums_B = (ids_BL.long() * there_BL).sum(dim=1)
    places_B = sums_B % (there_BL.sum(dim=1) - 1).clamp_min(1)
    return torch.arange(ids_BL.shape[1]) == places_B[:, None]


def _find_following(inputs: Inputs) -> Tensor:
    """The next token of each position where it counts, else -100: int64 (B, L)."""
    ids_BL, there_BL = inputs.tensors["input_ids"].long(), inputs.tensors["attention_mask"] != 0
    counts_BL = (inputs.tensors["mask"] != 0)[:, :-1] & there_BL[:, 1:]
    following_BL = torch.full_like(ids_BL, IGNORE)
    following_BL[:, :-1] = torch.where(counts_BL, ids_BL[:, 1:], IGNORE)
    return following_BL


def _describe(batch: DecodedBatch, counts_B: Tensor) -> dict[str, NDArray[Any]]:
    """The columns of a batch that the teachers do not answer."""
    tensors = batch.inputs[0].tensors
    there_BL = tensors["attention_mask"].numpy() != 0
    return {
        LENGTH: there_BL.sum(axis=1, dtype=np.int32)[:, None],
        POSITIONS: counts_B.numpy().astype(np.int32)[:, None],
        TOKENS: tensors["input_ids"].numpy()[there_BL][:, None],
        MASK: tensors["mask"].numpy()[there_BL].astype(np.uint8)[:, None],
    }
