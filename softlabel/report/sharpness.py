"""How sharp the labels are, and at which temperature a student sees more of them.

Legend: S rows of the sample, R rows of a part, C classes.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.report.agreement import explain_drawn
from softlabel.report.figures import Absent, Histogram, Sharpness, SharpnessAt
from softlabel.report.store_pass import RowSample, choose_samples

BINS = 30
SURE = 0.999  # a probability above it is as good as one-hot
TRIED = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 20.0)
ENOUGH = 1.5, 3.0  # effective classes that need no other temperature
VALUES = 10_000_000  # numbers that are measured: 10,000 rows of 1,000 classes
_TRIED_VALUES = 1_000_000  # on which each temperature is tried


def measure_sharpness(sample: RowSample) -> Sharpness | Absent:
    """Measure the rows of a sample at temperature 1, where that is exact, and at the store's."""
    reader = sample.reader
    if reader.is_drawn:
        return Absent(reason=explain_drawn("the entropy of a row"))
    if not len(sample):
        return Absent(reason="the store has no rows; see which samples are bad or missing")
    stored = reader.run.temperature
    temperatures = sorted({stored, 1.0} if reader.is_exact_at(1.0) else {stored})
    chosen = _choose(sample, VALUES)
    at = {temperature: _measure(sample, temperature, chosen) for temperature in temperatures}
    return Sharpness(
        at=tuple(at[temperature] for temperature in temperatures), suggested_temperature=_suggest(sample, at[stored])
    )


@dataclass(slots=True, kw_only=True)
class EntropySums:
    """Sums over rows, of which `highest` is the largest entropy that there is."""

    highest: float
    rows: int = 0
    nats: float = 0.0
    effective: float = 0.0
    sure: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, entropy_R: NDArray[np.float64], sure_R: NDArray[np.float64]) -> None:
        self.rows += len(entropy_R)
        self.nats += float(entropy_R.sum())
        self.effective += float(np.exp(entropy_R).sum())
        self.sure += float(sure_R.sum())
        # Rounding may exceed the highest entropy that there is.
        self.counts += np.histogram(np.clip(entropy_R, 0.0, self.highest), BINS, (0.0, self.highest))[0]

    def result(self, temperature: float) -> SharpnessAt:
        edges = np.linspace(0.0, self.highest, BINS + 1)
        return SharpnessAt(
            temperature=temperature,
            entropy=Histogram(edges=tuple(edges.tolist()), counts=tuple(self.counts.tolist())),
            mean_entropy=self.nats / self.rows,
            effective_classes=self.effective / self.rows,
            one_hot=self.sure / self.rows,
        )


def _measure(sample: RowSample, temperature: float, chosen: NDArray[np.int64]) -> SharpnessAt:
    run = sample.reader.run
    # A single class has no entropy, and a histogram needs a range.
    sums = EntropySums(highest=math.log(2 if run.activation == "sigmoid" else max(2, run.num_classes)))
    for _, columns in sample.parts(chosen):
        p_RC = sample.reader.read_probabilities(columns, temperature)
        if run.activation == "sigmoid":
            sure_R = ((p_RC > SURE) | (p_RC < 1 - SURE)).double().mean(dim=1)
            entropy_R = _compute_binary_entropy(p_RC).double().mean(dim=1)
        else:
            sure_R = (p_RC.amax(dim=1) > SURE).double()
            logs_RC = p_RC.clamp_min(torch.finfo(torch.float32).tiny).log2_()  # 0 * log 0 is 0
            entropy_R = -(p_RC.mul_(logs_RC).sum(dim=1, dtype=torch.float64)) * math.log(2)
        sums.add(entropy_R.numpy(), sure_R.numpy())
    return sums.result(temperature)


def _choose(sample: RowSample, values: int) -> NDArray[np.int64]:
    """Positions in the sample of rows that hold about so many numbers."""
    return choose_samples(len(sample), max(1, values // (sample.reader.run.num_classes * sample.reader.members)))


def _suggest(sample: RowSample, stored: SharpnessAt) -> float | None:
    """The tried temperature whose effective classes are nearest to two, on a logarithmic scale."""
    run = sample.reader.run
    tried = [temperature for temperature in TRIED if sample.reader.is_exact_at(temperature)]
    # Two of four classes and fewer would be noise rather than knowledge.
    wanted = min(2.0, 1 + (run.num_classes - 1) / 4)
    enough = ENOUGH[0] * wanted / 2 <= stored.effective_classes <= ENOUGH[1] * wanted / 2
    if run.activation == "sigmoid" or run.num_classes < 2 or enough or tried in ([], [run.temperature]):
        return None
    chosen = _choose(sample, _TRIED_VALUES)
    effective = {one: _measure(sample, one, chosen).effective_classes for one in tried}
    best = min(tried, key=lambda one: (abs(math.log(effective[one] / wanted)), one))
    return None if math.isclose(best, run.temperature) else best


def _compute_binary_entropy(p: torch.Tensor) -> torch.Tensor:
    """Of independent probabilities, in nats."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
