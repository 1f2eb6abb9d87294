"""Samples of several lengths: regrouped, so that each is computed in a batch of its own length.

Legend: B batch, C classes, N samples of a window of batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.inputs.base import Inputs, InputTransform

_PASS_ON_CPU = 512  # positions, such as tokens, of all samples of a pass
_PASS_ROWS_ON_CPU = 32
_UNKNOWN_BYTES = 3 * 256**2  # assumed for a sample of unknown size


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Samples of one length, filled up to a whole pass.

    Attributes:
        rows: int64 (N,), their places in the window.
        inputs: the pass, of at least N samples.
        bucket: the length.
    """

    rows: NDArray[np.int64]
    inputs: Inputs
    bucket: int

    @property
    def filled(self) -> float:
        """The share of the pass that is samples of the window."""
        return len(self.rows) / len(self.inputs)


def cut_into_pieces(
    transform: InputTransform, batches: Sequence[Inputs], pass_rows: Callable[[int], int]
) -> list[Piece]:
    """Passes of exactly `pass_rows(bucket)` samples of one bucket each, of all samples of a window.

    What a sample's neighbours are does not change its answer, its own length and the size of its pass could.
    """
    starts = np.cumsum([0, *map(len, batches)])
    buckets = [transform.bucket_of(batch).numpy() for batch in batches]
    pieces = []
    for bucket in np.unique(np.concatenate(buckets)).tolist():
        places = [np.flatnonzero(one == bucket) for one in buckets]
        rows = np.concatenate([start + some for start, some in zip(starts, places, strict=False)])
        chosen = [
            transform.cut(batch[torch.from_numpy(some)], bucket)
            for batch, some in zip(batches, places, strict=True)
            if len(some)
        ]
        joined = Inputs.join(chosen)
        size = pass_rows(bucket)
        for first in range(0, len(rows), size):
            here = rows[first : first + size]
            # Repeated samples fill up the last one: a row of padding alone could be NaN.
            filled = torch.arange(first, first + size).clamp(max=len(rows) - 1)
            pieces.append(Piece(rows=here, inputs=joined[filled], bucket=bucket))
    return pieces


def put_back(answers: Sequence[Tensor], pieces: Sequence[Piece], sizes: Sequence[int]) -> list[Tensor]:
    """What was answered to the pieces, as it belongs to the batches of the window, which have these sizes."""
    found_NC = torch.cat([answer_BC[: len(piece.rows)] for answer_BC, piece in zip(answers, pieces, strict=True)])
    order_N = torch.from_numpy(np.argsort(np.concatenate([piece.rows for piece in pieces])))
    return list(torch.split(found_NC[order_N.to(found_NC.device)], list(sizes)))


def count_pass_rows(device: torch.device, batch_size: int, bucket: int) -> int:
    """Return how many samples of a length make a forward pass.

    On a CPU fewer than a batch: a small pass is as fast for each position, and every length ends with a pass that is
    filled up.
    """
    if device.type == "cuda":
        return batch_size
    return max(1, min(batch_size, _PASS_ROWS_ON_CPU, _PASS_ON_CPU // bucket))


def count_bytes(transform: InputTransform) -> int:
    """Return the most bytes of one sample of a batch."""
    example = transform.example(1)
    if example is None:
        return _UNKNOWN_BYTES
    if not transform.buckets:
        return example.nbytes
    return example.nbytes * transform.buckets[-1] // int(transform.bucket_of(example)[0])
