"""Check of language models without any ground truth: are the labels at the right positions, and does context help?

The next token of the data's own documents is far more probable under the labels of its position than under those of
the positions beside it, so that labels which are off by one are found. And a sound network predicts better the more of
a document it has seen; one whose position encoding is broken (query and key rows in the order of another library)
predicts worse.

Legend: B documents, C tokens of the vocabulary, L positions, P some positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import TeacherError
from softlabel.generation.input_reader import DecodedBatch
from softlabel.generation.token_lane import Positions, TokenLane
from softlabel.labels.combine import average_members
from softlabel.models.teacher import Teacher

_DOCUMENTS = 64  # that are looked at
_BEST = 0.9  # the NLL at the right place is at most this share of the others'
_CONTEXT = 8  # tokens of a short context
_LONG = 32  # positions that have seen at least so many tokens are compared with it
_COMPARED = 512  # positions
_SIGMAS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """Mean negative log likelihood of tokens of the data under the labels, in nats.

    Attributes:
        here: of the token that comes next, which the label of a position is about.
        earlier: of the token at the position itself.
        later: of the token after the next one.
        positions: over so many positions.
    """

    here: float
    earlier: float
    later: float
    positions: int

    def __str__(self) -> str:
        return (
            f"{self.here:.2f} nats at its place, {self.earlier:.2f} one earlier, {self.later:.2f} one later, over "
            f"{self.positions:,} positions"
        )


def check_alignment(lane: TokenLane, batches: Sequence[DecodedBatch]) -> Alignment | None:
    """Compare the labels of some documents with their tokens.

    Returns:
        Of the combined labels; None where no document has three tokens.

    Raises:
        TeacherError: the labels of a teacher, or all of them together, are not those of their positions, or a teacher
            predicts worse the more it has seen.
    """
    batch = next((batch for batch in batches if batch.keys), None)
    if batch is None:
        return None
    few = _first(batch, _DOCUMENTS)
    ids_BL, there_BL = few.inputs[0].tensors["input_ids"].long(), few.inputs[0].tensors["attention_mask"] != 0
    lengths_B = there_BL.sum(dim=1)
    if int(lengths_B.max()) < 3:
        return None
    teachers = lane.members.teachers
    # The labels of one teacher are its own.
    names = [*(["the combined labels"] if len(teachers) > 1 else []), *(teacher.spec.text for teacher in teachers)]
    sums, count = np.zeros((len(names), 3)), 0
    nll_MBL = torch.full((len(names), *ids_BL.shape), math.nan)
    with torch.inference_mode():
        for chunk in lane.iter_positions([few], lambda inputs: inputs.tensors["attention_mask"] != 0):
            kept = torch.nonzero(chunk.places + 2 < lengths_B[chunk.documents]).reshape(-1)
            if not len(kept):
                continue
            documents_P, places_P = chunk.documents[kept], chunk.places[kept]
            count += len(kept)
            # The next token, the one at the position itself, and the one after the next.
            asked_P3 = ids_BL[documents_P[:, None], places_P[:, None] + torch.tensor([1, 0, 2])]
            combined = [_combine(lane, chunk)] if len(teachers) > 1 else []
            for number, logits_PC in enumerate([*combined, *chunk.logits]):
                found_P3 = _measure_nll(logits_PC[kept.to(logits_PC.device)], asked_P3)
                sums[number] += found_P3.sum(dim=0).double().numpy()
                nll_MBL[number, documents_P, places_P] = found_P3[:, 0]
    found = [Alignment(here=a, earlier=b, later=c, positions=count) for a, b, c in (sums / count).tolist()]
    for name, one in reversed(list(zip(names, found, strict=True))):
        if not one.here <= _BEST * min(one.earlier, one.later):
            raise TeacherError(
                f"{name}: expected labels under which the next token is by far the most probable, found an NLL of {one}"
                ": they are off by a position, or the network knows nothing of these documents; check the network, its "
                "tokenizer and the data, or give --no-preflight if they are right"
            )
    for teacher, nll_BL in zip(teachers, nll_MBL[-len(teachers) :], strict=True):
        _check_context(teacher, ids_BL, nll_BL)
    return found[0]


def _combine(lane: TokenLane, chunk: Positions) -> Tensor:
    """The combined labels at temperature 1, (P, C)."""
    combined = lane.combine(chunk.logits) * lane.run.temperature
    return average_members(combined) if combined.dim() == 3 else combined


def _measure_nll(logits_PC: Tensor, asked_PK: Tensor) -> Tensor:
    """Negative log likelihood of K tokens under each of P labels, float32 (P, K), on the host."""
    asked_PK = asked_PK.to(logits_PC.device)
    return (logits_PC.logsumexp(dim=1, keepdim=True) - logits_PC.gather(1, asked_PK)).float().cpu()


def _check_context(teacher: Teacher, ids_BL: Tensor, nll_BL: Tensor) -> None:
    """Raise TeacherError where the tokens before the last few make a teacher's predictions worse."""
    place_L = torch.arange(ids_BL.shape[1])
    documents_P, places_P = torch.nonzero(~nll_BL.isnan() & (place_L >= _LONG), as_tuple=True)
    if len(documents_P) < _COMPARED // 4:
        return
    picked = torch.from_numpy(np.unique(np.linspace(0, len(documents_P) - 1, _COMPARED).astype(np.int64)))
    documents_P, places_P = documents_P[picked], places_P[picked]
    short_PK = ids_BL[documents_P[:, None], places_P[:, None] + torch.arange(1 - _CONTEXT, 1)]
    transform = teacher.preprocessing
    ones = torch.ones(_CONTEXT, dtype=torch.uint8)
    inputs = transform.cut(
        transform.collate([transform.fit({"input_ids": ids.int(), "mask": ones}) for ids in short_PK])
    )
    logits_PC = teacher.position_logits(teacher.hidden(inputs)[:, _CONTEXT - 1])
    short_P = _measure_nll(logits_PC, ids_BL[documents_P, places_P + 1][:, None])[:, 0]
    worse_P: NDArray[np.float64] = (nll_BL[documents_P, places_P] - short_P).double().numpy()
    error = float(worse_P.std(ddof=1)) / math.sqrt(len(worse_P))
    if float(worse_P.mean()) > _SIGMAS * error:
        raise TeacherError(
            f"{teacher.spec.text}: expected a network that predicts better the more of a document it has seen, found "
            f"{float(nll_BL[documents_P, places_P].mean()):.2f} nats a token after all of it and "
            f"{float(short_P.mean()):.2f} after its last {_CONTEXT} tokens: the checkpoint is broken (are the rows of "
            "query and key in the order of another library?), or documents are longer than it was trained for; check "
            "it, lower --max-length, or give --no-preflight if it is right"
        )


def _first(batch: DecodedBatch, documents: int) -> DecodedBatch:
    return DecodedBatch(
        keys=batch.keys[:documents],
        labels=batch.labels[:documents],
        content=batch.content[:documents],
        inputs=(batch.inputs[0][:documents],),
        bad=(),
    )
