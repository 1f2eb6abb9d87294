"""The teacher's side of encodings: from scaled logits to the columns of a store, and what that costs.

Legend: R rows, C classes, D width of the teacher's last hidden layer, W elements of one column in one row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.labels.encodings import float16, float32, head, int8, sampled, topk
from softlabel.labels.encodings.base import Answers, Coder, Columns, Reading, measure_decoded, measure_sigmoids
from softlabel.store.encodings import Encoding, Float16, Float32, Head, Int8, Sampled, TopK

__all__ = ["Answers", "Coder", "Reading", "decode", "encode", "measure", "register"]

_CODERS: dict[type[Encoding], Coder] = {
    Float32: float32.CODER,
    Float16: float16.CODER,
    Int8: int8.CODER,
    TopK: topk.CODER,
    Sampled: sampled.CODER,
    Head: head.CODER,
}


def register(kind: type[Encoding], coder: Coder) -> None:
    """Let teachers write stores in an encoding."""
    _CODERS[kind] = coder


def encode(
    scaled_logits_RC: Tensor,
    encoding: Encoding,
    *,
    temperature: float = 1.0,
    seeds_R: Tensor | None = None,
    hidden_RD: Tensor | None = None,
) -> Columns:
    """The columns that a store keeps of these rows: name -> (R, W), on the same device. See `Answers`.

    Raises:
        UsageError: no seeds for an encoding that is drawn, or no hidden layer for one that stores it.
    """
    if encoding.drawn and seeds_R is None:
        raise UsageError(f"encoding {encoding.name!r} needs a seed for every row, from its key")
    if encoding.from_hidden and hidden_RD is None:
        raise UsageError(f"encoding {encoding.name!r} stores the teacher's hidden layer, not its logits")
    answers = Answers(scaled_logits=scaled_logits_RC, temperature=temperature, seeds=seeds_R, hidden=hidden_RD)
    return _CODERS[type(encoding)].encode(encoding, answers)


def decode(columns: Mapping[str, Tensor], encoding: Encoding, reading: Reading) -> Tensor:
    """What a reader gets back: float64 (R, C) logits divided by `reading.at`, up to a constant per row. Top-k spreads
    its tail evenly, unsampled classes are -inf."""
    return _CODERS[type(encoding)].decode(encoding, columns, reading)


def measure(scaled_logits_RC: Tensor, columns: Mapping[str, Tensor], encoding: Encoding, reading: Reading) -> Tensor:
    """What the columns lose of the logits at `reading.at`, in nats: float64 (R,); see `measure_decoded`, and, of
    independent outputs, `measure_sigmoids`."""
    coder = _CODERS[type(encoding)]
    if encoding.exact:
        return scaled_logits_RC.new_zeros(len(scaled_logits_RC), dtype=torch.float64)
    if reading.activation == "sigmoid":
        return measure_sigmoids(scaled_logits_RC, coder.decode(encoding, columns, reading), reading.factor)
    if coder.nats is not None:
        return coder.nats(encoding, scaled_logits_RC, columns, reading)
    decoded_RC = coder.decode(encoding, columns, reading)
    return measure_decoded(encoding, scaled_logits_RC, decoded_RC, reading.factor)
