"""From scaled logits to the columns of a store, on the device, and what that costs.

Legend: B batch, C classes. The layout of each encoding's columns is in ``store/columns.py`` and ``store/FORMAT.md``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softlabel.errors import UsageError


def encode(scaled_logits_BC: Tensor, encoding: str) -> dict[str, Tensor]:
    """The columns that a store keeps of these rows.

    Args:
        scaled_logits_BC: float32 (B, C), the row's maximum subtracted: near zero, where most of the probability is,
            float16 is finest.
        encoding: ``float16``.

    Returns:
        ``{"logits": float16 (B, C)}``.
    """
    if encoding != "float16":
        raise UsageError(f"encoding: expected 'float16', found {encoding!r}")
    return {"logits": scaled_logits_BC.half()}


@dataclass(slots=True, kw_only=True)
class Fidelity:
    """KL(teacher || decoded) in nats of the rows seen so far, for each temperature that is exact in the store."""

    temperatures: tuple[float, ...]
    stored_temperature: float
    rows: int = 0
    total: dict[float, float] = field(default_factory=dict)
    worst: dict[float, float] = field(default_factory=dict)

    def add(self, scaled_logits_BC: Tensor, decoded_BC: Tensor) -> None:
        """Measure rows: the scaled logits before encoding and what a reader gets back, both at the stored temperature."""
        if not len(scaled_logits_BC):
            return
        for temperature in self.temperatures:
            nats_B = _kl(scaled_logits_BC, decoded_BC, self.stored_temperature / temperature)
            mean_and_worst = torch.stack([nats_B.sum(), nats_B.max()]).tolist()
            self.total[temperature] = self.total.get(temperature, 0.0) + mean_and_worst[0]
            self.worst[temperature] = max(self.worst.get(temperature, 0.0), mean_and_worst[1])
        self.rows += len(scaled_logits_BC)

    def summary(self) -> dict[str, dict[str, float]]:
        """``{"4": {"mean": nats, "worst": nats}}``, by temperature."""
        if not self.rows:
            return {}
        return {
            f"{t:g}": {"mean": self.total[t] / self.rows, "worst": self.worst[t]} for t in self.temperatures
        }


def exact_temperatures(stored: float, retemperable: bool) -> tuple[float, ...]:
    """Where the cost of an encoding can be measured: the store's temperature, and 1 if the labels re-temper."""
    candidates: Iterable[float] = (1.0, stored) if retemperable else (stored,)
    return tuple(dict.fromkeys(candidates))


def _kl(scaled_logits_BC: Tensor, decoded_BC: Tensor, sharpen: float) -> Tensor:
    # The difference is of the size of float32's rounding, so float64 it is.
    log_p_BC = torch.log_softmax(scaled_logits_BC.double() * sharpen, dim=-1)
    log_q_BC = torch.log_softmax(decoded_BC.double() * sharpen, dim=-1)
    terms_BC = log_p_BC.exp() * (log_p_BC - log_q_BC)
    # A masked class (-inf on both sides) or one too unlikely for float16 has p = 0 and contributes nothing.
    return torch.where(log_p_BC.exp() > 0, terms_BC, 0.0).sum(dim=-1).clamp_min(0.0)
