"""From scaled logits to the columns of a store, on the device, and what that costs.

Legend: B batch, C classes. The layout of each encoding's columns is in ``store/columns.py`` and ``store/FORMAT.md``.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.store.columns import Encoding
from softlabel.store.manifest import Fidelity


def encode(scaled_logits_BC: Tensor, encoding: Encoding) -> dict[str, Tensor]:
    """The columns that a store keeps of these rows.

    Args:
        scaled_logits_BC: float32 (B, C), the row's maximum subtracted: near zero, where most of the probability is,
            float16 is finest.
        encoding: ``float16`` stores them as they are.

    Returns:
        ``{"logits": float16 (B, C)}``.
    """
    if encoding.name != "float16":
        raise UsageError(f"encoding: expected 'float16', found {encoding.name!r}")
    return {"logits": scaled_logits_BC.half()}


@dataclass(slots=True, kw_only=True)
class FidelityMeter:
    """KL(teacher || decoded) in nats over the rows seen, at T = 1 and at the stored temperature.

    An average of probabilities does not exist at T = 1; its figure there is that of the logits which the average stands
    for at its own temperature.
    """

    temperature: float
    rows: int = 0
    total: dict[float, float] = field(default_factory=dict)
    worst: dict[float, float] = field(default_factory=dict)

    def add(self, scaled_logits_BC: Tensor, decoded_BC: Tensor) -> None:
        """Measure rows: the scaled logits before encoding and what a reader gets back."""
        if not len(scaled_logits_BC):
            return
        for at in {1.0, self.temperature}:
            nats_B = _kl(scaled_logits_BC, decoded_BC, self.temperature / at)
            total, worst = torch.stack([nats_B.sum(), nats_B.max()]).tolist()
            self.total[at] = self.total.get(at, 0.0) + total
            self.worst[at] = max(self.worst.get(at, 0.0), worst)
        self.rows += len(scaled_logits_BC)

    def result(self) -> Fidelity | None:
        if not self.rows:
            return None
        return Fidelity(
            mean_t1=self.total[1.0] / self.rows,
            worst_t1=self.worst[1.0],
            mean_t=self.total[self.temperature] / self.rows,
            worst_t=self.worst[self.temperature],
        )


def _kl(scaled_logits_BC: Tensor, decoded_BC: Tensor, sharpen: float) -> Tensor:
    # The difference is of the size of float32's rounding, so float64 it is.
    log_p_BC = torch.log_softmax(scaled_logits_BC.double() * sharpen, dim=-1)
    log_q_BC = torch.log_softmax(decoded_BC.double() * sharpen, dim=-1)
    p_BC = log_p_BC.exp()
    # A class that is masked on both sides has p = 0 and contributes nothing, where the product would be NaN.
    return torch.where(p_BC > 0, p_BC * (log_p_BC - log_q_BC), 0.0).sum(dim=-1).clamp_min(0.0)
