"""How sure the labels and each member are against how often they are right, and the temperature that fits.

Legend: S rows of the sample, R rows of a part, C classes, M members.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.errors import DataError
from softlabel.labels.calibration import CHUNK, fit_temperature
from softlabel.labels.combine import combine
from softlabel.report.agreement import NO_LABELS, explain_drawn
from softlabel.report.figures import Absent, Calibrated, Calibration, Reliability
from softlabel.report.reliability import ReliabilityMeter
from softlabel.report.store_pass import RowSample, choose_samples

# Numbers, which the fit reads a dozen times in float64: 4,000 rows of 1,000 classes.
VALUES = 4_000_000


def measure_calibration(sample: RowSample) -> Calibration | Absent:
    """Measure the labelled rows of a sample, at `LabelReader.judged`."""
    reader = sample.reader
    labels = torch.from_numpy(np.array(sample.labels))
    labelled_S = np.flatnonzero((labels >= 0).numpy() if labels.dim() == 1 else (labels >= 0).any(dim=1).numpy())
    if not len(labelled_S):
        return Absent(reason=NO_LABELS)
    if reader.is_drawn:
        return Absent(reason=explain_drawn("how sure the teachers are"))
    chosen = labelled_S[choose_samples(len(labelled_S), max(1, VALUES // reader.run.num_classes))]
    names = ["labels", *([member.spec for member in reader.run.members] if reader.run.kept else [])]
    curves = [
        _calibrate(name, _read_logits(sample, chosen, None if place == 0 else place - 1), labels[chosen])
        for place, name in enumerate(names)
    ]
    if any(curve is None for curve in curves):
        return Absent(
            reason="a teacher masks the class of every hard label; label with teachers that have these classes"
        )
    return Calibration(rows=len(chosen), curves=tuple(curve for curve in curves if curve is not None))


def _read_logits(sample: RowSample, chosen: np.ndarray, member: int | None) -> Tensor:
    """Logits float32 (R, C) of one member, or of the labels."""
    reader = sample.reader
    found = torch.empty(len(chosen), reader.run.num_classes)
    done = 0
    for part, columns in sample.parts(chosen):
        if member is None and reader.members > 1:
            logits_RC = combine(
                list(reader.read_logits(columns, reader.judged).unbind(dim=1)),
                rule="probs",
                temperature=1.0,
                weights=reader.weights,
                activation=reader.run.activation,
            )
        else:
            logits_RC = reader.read_logits(columns, reader.judged)[:, member or 0]
        found[done : done + len(part)] = logits_RC
        done += len(part)
    return found


def _calibrate(name: str, logits_RC: Tensor, labels: Tensor) -> Calibrated | None:
    if labels.dim() == 1:
        has_class_R = logits_RC.gather(1, labels[:, None])[:, 0] > -torch.inf  # a masked class has no finite likelihood
        logits_RC, labels = logits_RC[has_class_R], labels[has_class_R]
        if not len(labels):
            return None
    before = _measure(logits_RC, labels, 1.0)
    try:
        temperature = fit_temperature(logits_RC, labels)
    except DataError as error:
        return Calibrated(name=name, before=before, fitted_temperature=None, after=None, note=str(error))
    return Calibrated(
        name=name, before=before, fitted_temperature=temperature, after=_measure(logits_RC, labels, temperature)
    )


def _measure(logits_RC: Tensor, labels: Tensor, temperature: float) -> Reliability:
    meter = ReliabilityMeter()
    for logits_BC, labels_B in zip(torch.split(logits_RC, CHUNK), torch.split(labels, CHUNK), strict=True):
        scaled_BC = logits_BC.double() / temperature
        if labels.dim() == 1:
            meter.add(F.log_softmax(scaled_BC, dim=1), labels_B)
        else:
            meter.add_sigmoids(scaled_BC, labels_B)
    found = meter.result()
    assert found is not None
    return found
