"""A step of documents: lines of a batch that go forward one part after the other, and what counts in each."""

from dataclasses import dataclass

import numpy as np

from softlabel.inputs.base import IGNORE
from softlabel.loader.token_batch import TokenBatch
from softlabel.training.step import Counts, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPart:
    """Some lines of a batch, and which of its places lie in them."""

    lines: slice
    places: slice


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenStep(Step):
    """One step of documents; its parts are `TokenPart`s.

    Attributes:
        batch: on the device.
    """

    batch: TokenBatch


def cut_lines(batch: TokenBatch, parts: int) -> tuple[tuple[TokenPart, Counts], ...]:
    """A batch on the CPU in parts of about as many lines, each of at least one, with what counts in each."""
    lines, length = batch.tokens.shape
    edges = sorted({lines * number // parts for number in range(parts + 1)})
    at = np.searchsorted(batch.places.numpy(), np.array(edges) * length).tolist()
    labels_P, found = batch.hard_labels, []
    for number in range(len(edges) - 1):
        here, places = slice(edges[number], edges[number + 1]), slice(at[number], at[number + 1])
        counted = places.stop - places.start
        labelled_P = labels_P[places] != IGNORE
        hard = int(labelled_P.sum())
        if batch.target is None:
            soft = both = 0
        elif batch.has_target is None:
            soft, both = counted, hard
        else:
            soft, both = int(batch.has_target[places].sum()), int((labelled_P & batch.has_target[places]).sum())
        counts = Counts(
            rows=counted,
            soft=soft,
            hard=hard,
            both=both,
            units=int((batch.segments[here] > 0).sum()),
        )
        found.append((TokenPart(lines=here, places=places), counts))
    return tuple(found)
