"""sampled on the teacher's side.

R rows, C classes, S draws.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from softlabel.labels.encodings.base import Answers, Coder, Reading, to_ids
from softlabel.store.encodings import Sampled


def encode(encoding: Sampled, answers: Answers) -> dict[str, Tensor]:
    """S draws from softmax(proposal * scaled logits), each with weight p / (q * S), equal ones merged into one."""
    assert answers.seeds is not None
    scaled_logits_RC, samples = answers.scaled_logits, encoding.samples
    num_classes = scaled_logits_RC.shape[1]
    p_RC = torch.softmax(scaled_logits_RC.double(), dim=1)
    q_RC = torch.softmax(scaled_logits_RC.double() * (encoding.proposal or 1.0), dim=1)
    upto_RC = q_RC.cumsum(dim=1)
    at_RS = _choose_points(encoding, answers.seeds) * upto_RC[:, -1:]
    drawn_RS = torch.searchsorted(upto_RC, at_RS, right=True).clamp_max(num_classes - 1).sort(dim=1).values
    weight_RS = (p_RC.gather(1, drawn_RS) / q_RC.gather(1, drawn_RS)) / samples
    first_RS = torch.ones_like(drawn_RS, dtype=torch.bool)
    first_RS[:, 1:] = drawn_RS[:, 1:] != drawn_RS[:, :-1]
    place_RS = first_RS.cumsum(dim=1) - 1
    merged_RS = torch.zeros_like(weight_RS).scatter_add_(1, place_RS, weight_RS)
    index_RS = torch.zeros_like(drawn_RS).scatter_(1, place_RS, drawn_RS)
    return {"index": to_ids(index_RS, num_classes), "weight": merged_RS.float()}


def _choose_points(encoding: Sampled, seeds_R: Tensor) -> Tensor:
    """float64 (R, S) in [0, 1), each uniform: one start and equal distances, or all independent of each other."""
    if encoding.draw == "independent":
        return _uniform(seeds_R, encoding.samples)
    step_S = torch.arange(encoding.samples, device=seeds_R.device, dtype=torch.float64)
    # The last sum may round up to S, and 1 times the total is no class.
    return ((step_S + _uniform(seeds_R, 1)) / encoding.samples).clamp_max(1 - 2.0**-53)


def _uniform(seeds_R: Tensor, count: int) -> Tensor:
    """float64 (R, count) in [0, 1): SplitMix64 of (seed, position), the same on every device and in every batch."""
    step, one, two = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # as signed 64-bit numbers
    position_S = torch.arange(1, count + 1, device=seeds_R.device, dtype=torch.int64)
    state_RS = seeds_R[:, None] + position_S * step
    for shift, factor in ((30, one), (27, two)):
        state_RS = (state_RS ^ _right(state_RS, shift)) * factor
    return _right(state_RS ^ _right(state_RS, 31), 11).double() * 2.0**-53


def _right(values: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def decode(encoding: Sampled, columns: Mapping[str, Tensor], reading: Reading) -> Tensor:
    index_RS, weight_RS = columns["index"].long(), columns["weight"].double()
    return (
        weight_RS.new_zeros(len(index_RS), reading.num_classes).scatter_add_(1, index_RS, weight_RS).log()
        * reading.factor
    )


CODER = Coder(encode=encode, decode=decode)
