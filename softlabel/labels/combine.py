"""The arithmetic of soft labels: from the members' logits to what a store keeps.

Legend: B batch, C classes, M members. Everything is computed in float32, on the device of its input.

Scaled logits are logits divided by the temperature: ``softmax(scaled_logits)`` is the soft label. They are
defined up to a constant per row, so a store keeps them with the row's maximum subtracted. Of independent outputs
``sigmoid(scaled_logits)`` is the soft label of each class, and the store keeps them as they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.common.activation import Activation
from softlabel.errors import UsageError

CombineRule = Literal["logits", "probs", "keep"]
MemberRule = Literal["logits", "probs", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How members that a store keeps apart become one teacher.

    Attributes:
        rule: ``logits`` or ``probs``, see `combine`; ``random``: every sample has one member in every epoch (Kaplun et
            al. 2022).
        weights: one number a member, normalised; None: equal. 0 leaves a member out. Of ``random`` probabilities.
        temperature: at which they are combined; None: that of the store.
    """

    rule: MemberRule = "probs"
    weights: tuple[float, ...] | None = None
    temperature: float | None = None


def normalized_weights(weights: Sequence[float] | None, members: int) -> tuple[float, ...]:
    """Weights of an ensemble's members, summing to 1; uniform when none are given.

    Raises:
        UsageError: not one weight a member, or weights that are negative, not finite or all zero.
    """
    if weights is None:
        return (1.0 / members,) * members
    if len(weights) != members:
        raise UsageError(f"weights: expected one for each of the {members} teachers, found {len(weights)}")
    total = sum(weights)
    if not all(0 <= w < float("inf") for w in weights) or not total > 0:
        raise UsageError(f"weights: expected finite numbers of at least 0, not all 0, found {list(weights)}")
    # Normalising again what sums to 1 must not change a bit: weights are part of a store's identity.
    return tuple(float(w) if math.isclose(total, 1.0, rel_tol=1e-12) else w / total for w in weights)


def combine(
    logits_MBC: Sequence[Tensor],
    *,
    rule: str,
    temperature: float,
    weights: Sequence[float],
    calibration: Sequence[float] | None = None,
    activation: Activation = "softmax",
) -> Tensor:
    """One teacher's worth of scaled logits out of an ensemble's logits.

    ``logits`` averages logits and divides by the temperature (a geometric mean of the distributions), which
    re-tempers exactly. ``probs`` is the logarithm of the weighted mean of ``softmax(logits / temperature)``, the usual
    ensemble average (Hinton et al. 2015), which belongs to that one temperature. ``keep`` mixes nothing. Of independent
    outputs ``probs`` is the logit of the weighted mean of ``sigmoid(logits / temperature)``.

    Args:
        logits_MBC: M tensors (B, C), float; -inf masks a class.
        weights: M numbers that sum to 1.
        calibration: M temperatures of the members' own, that their logits are divided by first; 1 when absent.
        activation: ``softmax``, or ``sigmoid`` of independent outputs.

    Returns:
        float32 (B, C) scaled logits, of a softmax with the row's maximum subtracted; (B, M, C) of each member for
        ``keep``.
    """
    if rule not in get_args(CombineRule):
        raise UsageError(f"combine: expected 'logits', 'probs' or 'keep', found {rule!r}")
    calibration = (1.0,) * len(logits_MBC) if calibration is None else calibration
    scaled = [logits_BC.float() / (temperature * own) for logits_BC, own in zip(logits_MBC, calibration, strict=True)]
    if rule == "keep":
        return _shift_for_store(torch.stack(scaled, dim=1), activation)
    used = [(w, z) for w, z in zip(weights, scaled, strict=True) if w > 0]
    if rule == "logits" or len(used) == 1:
        # A weight of zero must not meet a masked class: 0 * -inf is NaN.
        scaled_logits_BC = sum((w * z for w, z in used[1:]), used[0][0] * used[0][1])
    elif activation == "softmax":
        scaled_logits_BC = _average_logs([(w, torch.log_softmax(z, dim=-1)) for w, z in used])
    else:
        scaled_logits_BC = _average_logs([(w, F.logsigmoid(z)) for w, z in used]) - _average_logs(
            [(w, F.logsigmoid(-z)) for w, z in used]
        )
    return _shift_for_store(scaled_logits_BC, activation)


def average_members(scaled_logits_BMC: Tensor, activation: Activation = "softmax") -> Tensor:
    """Scaled logits (B, C) of members that are kept apart, as students and reports take them where no combination is
    asked for: of the mean of their probabilities at the temperature that they are divided by."""
    members = scaled_logits_BMC.shape[1]
    weights = normalized_weights(None, members)
    parts = list(scaled_logits_BMC.unbind(dim=1))
    return combine(parts, rule="probs", temperature=1.0, weights=weights, activation=activation)


def _average_logs(weighted: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The logarithm of a weighted mean of probabilities, of their logarithms."""
    log_probs_MBC = torch.stack([log_probs_BC for _, log_probs_BC in weighted])
    log_weights_M11 = torch.tensor([weight for weight, _ in weighted], device=log_probs_MBC.device).log()[:, None, None]
    return torch.logsumexp(log_probs_MBC + log_weights_M11, dim=0)


def _shift_for_store(scaled_logits: Tensor, activation: Activation) -> Tensor:
    return subtract_maximum(scaled_logits) if activation == "softmax" else scaled_logits


def subtract_maximum(scaled_logits: Tensor) -> Tensor:
    """Of every row (..., C), which a softmax does not see."""
    return scaled_logits - scaled_logits.amax(dim=-1, keepdim=True)


def retemperable(rule: str, members: int) -> bool:
    """Whether labels of one temperature are exact at another: averages of logits are, averages of probabilities not."""
    return rule != "probs" or members == 1
