"""What encoding loses of the teacher's answers.

Legend: R rows, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.activation import Activation
from softlabel.labels.encodings import Reading, measure
from softlabel.store.encodings import Encoding, Float16
from softlabel.store.fidelity import Fidelity


@dataclass(slots=True, kw_only=True)
class FidelityMeter:
    """KL(teacher || decoded) in nats over the rows seen, at T = 1 and at the stored temperature.

    An average of probabilities does not exist at T = 1; its figure there is that of the logits which the average stands
    for at its own temperature. Sampled rows give most classes no probability: theirs is KL(decoded || teacher).
    Of independent sigmoids it is the mean over the classes.
    """

    temperature: float
    encoding: Encoding = field(default_factory=Float16)
    activation: Activation = "softmax"
    rows: int = 0
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    worst: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))

    def add(
        self, scaled_logits_RC: Tensor, columns: Mapping[str, Tensor], head: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Measure rows: the scaled logits before encoding and the columns that hold them."""
        if len(scaled_logits_RC):
            nats_2R = self.measure(scaled_logits_RC, columns, head)
            self.add_measured(nats_2R.cpu().numpy())

    def add_measured(self, nats_2R: NDArray[np.float64]) -> None:
        """Take in what `measure` found for some rows, in the order of the rows."""
        if nats_2R.shape[1]:
            self.rows += nats_2R.shape[1]
            self.total = self.total + nats_2R.sum(axis=1)
            self.worst = np.maximum(self.worst, nats_2R.max(axis=1))

    def measure(
        self, scaled_logits_RC: Tensor, columns: Mapping[str, Tensor], head: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Nats of each row at T = 1 and at the stored temperature: float64 (2, R), on the device. Changes nothing."""
        nats = {}
        for at in {1.0, self.temperature}:
            reading = Reading(
                num_classes=scaled_logits_RC.shape[1],
                temperature=self.temperature,
                at=at,
                head=head,
                activation=self.activation,
            )
            nats[at] = measure(scaled_logits_RC, columns, self.encoding, reading)
        return torch.stack([nats[1.0], nats[self.temperature]])

    def result(self) -> Fidelity | None:
        if not self.rows:
            return None
        mean_2, worst_2 = (self.total / self.rows).tolist(), self.worst.tolist()
        return Fidelity(mean_t1=mean_2[0], worst_t1=worst_2[0], mean_t=mean_2[1], worst_t=worst_2[1])
