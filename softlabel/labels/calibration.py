"""One temperature a teacher, so that members are comparable before they are averaged (Guo et al. 2017).

A calibrated teacher's logits are divided by its temperature before anything else is done with them. The temperatures
lie in a JSON file, each with the hash of the weights and the preprocessing that it was fitted with.

Legend: C classes, N samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from softlabel.common.activation import Activation
from softlabel.errors import DataError, MismatchError, StoreError, UsageError
from softlabel.store.manifest import Json, Member
from softlabel.store.strict_json import OMIT, SchemaError, from_json, loads, to_json

LOWEST, HIGHEST = 0.01, 100.0  # where a temperature is looked for
CHUNK = 8192  # rows that are worked on in float64 at a time
_STEPS, _PRECISION = 200, 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A teacher and its temperature, with what the temperature changed on the data that it was fitted on.

    Attributes:
        spec, sha256, preprocessing, precision: as a store has them (`Member`).
        temperature: what its logits are to be divided by.
        nll_before, nll_after: mean of -log p(label), in nats; of independent outputs over all known labels.
        ece_before, ece_after: expected calibration error, 15 bins.
    """

    spec: str
    sha256: str
    preprocessing: Json
    precision: str
    temperature: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float

    def __post_init__(self) -> None:
        if not LOWEST <= self.temperature <= HIGHEST:
            raise ValueError(f"temperature: expected {LOWEST:g} to {HIGHEST:g}, found {self.temperature}")


def _identify(preprocessing: Json) -> Json:
    """What of a preprocessing a temperature depends on: of documents not how long they may be."""
    if preprocessing.get("kind") != "tokens":
        return preprocessing
    return {name: value for name, value in preprocessing.items() if name not in ("max_length", "buckets")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What `softlabel calibrate` found: the file that `generate --calibration` takes.

    Attributes:
        data, fingerprint: the labelled samples that it was fitted on, and the hash of their ordered keys.
        samples: how many of them had a label and could be decoded.
        activation: what the outputs were taken as.
        members: a temperature for each teacher.
    """

    format: Literal["softlabel-calibration"] = "softlabel-calibration"
    format_version: int = 1
    data: str
    fingerprint: str
    samples: int
    activation: Activation = field(default="softmax", metadata=OMIT)
    members: tuple[Calibrated, ...]

    def to_json(self) -> Any:
        return to_json(self)

    def temperatures(
        self, members: Sequence[Member], where: object, activation: Activation = "softmax"
    ) -> tuple[float, ...]:
        """The temperature of each of these members, found by the hash of its weights and its preprocessing.

        Raises:
            MismatchError: the file has none for a member, or is of outputs that were taken as something else.
        """
        if self.activation != activation:
            raise MismatchError(
                f"{where}: expected temperatures of a {activation}, found those of a {self.activation}; run 'softlabel "
                f"calibrate --activation {activation}'"
            )
        return tuple(self._temperature(member, where) for member in members)

    def _temperature(self, member: Member, where: object) -> float:
        same = [one for one in self.members if one.sha256 == member.sha256]
        fitting = [one for one in same if _identify(one.preprocessing) == _identify(member.preprocessing)]
        if fitting:
            return fitting[0].temperature
        if same:
            raise MismatchError(
                f"{where}: preprocessing of {member.spec}: expected {dict(member.preprocessing)}, found "
                f"{dict(same[0].preprocessing)}; calibrate it as it will label"
            )
        listed = ", ".join(f"{one.spec} (sha256 {one.sha256[:12]})" for one in self.members)
        raise MismatchError(
            f"{where}: expected a temperature for {member.spec} (sha256 {member.sha256[:12]}), found {listed}; "
            "run 'softlabel calibrate' with this teacher"
        )


def read_calibration(path: str | Path) -> Calibration:
    """A file that `softlabel calibrate` wrote.

    Raises:
        UsageError: there is none, or it is something else.
    """
    try:
        return from_json(Calibration, loads(Path(path).read_bytes()))
    except OSError as error:
        raise UsageError(f"{path}: expected a file of 'softlabel calibrate', found: {error.strerror}") from error
    except SchemaError as error:
        raise UsageError(f"{path}: expected a file of 'softlabel calibrate': {error}") from error


def write_calibration(path: str | Path, calibration: Calibration) -> None:
    """Raises StoreError where it cannot be written."""
    import json

    try:
        Path(path).write_text(json.dumps(calibration.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror}") from error


def fit_temperature(logits_NC: Tensor, labels: Tensor) -> float:
    """The temperature with the least mean of -log softmax(logits / T)[label], or of the binary negative log-likelihood.

    In u = 1 / T the mean is convex, so the root of its slope is found by Newton's steps, kept inside a bracket that
    shrinks around it; in float64.

    Args:
        logits_NC: float (N, C); -inf masks a class.
        labels: int64 (N,), or of independent outputs int8 (N, C): 1, 0 or -1 (unknown).

    Raises:
        DataError: there is no best one: every label, or no label, is the teacher's first choice.
    """
    low, high = 1 / HIGHEST, 1 / LOWEST
    if _slope(logits_NC, labels, high)[0] <= 0:
        raise DataError(
            f"the teacher is right on all {len(labels):,} samples, or so sure where it is that no temperature "
            "is sharp enough; calibrate on samples that it was not trained on"
        )
    if _slope(logits_NC, labels, low)[0] >= 0:
        raise DataError(
            "the labels have nothing to do with the teacher's answers, so that no temperature is flat enough; check "
            "its preprocessing and the order of its classes"
        )
    u = 1.0
    for _ in range(_STEPS):
        first, second = _slope(logits_NC, labels, u)
        low, high = (u, high) if first < 0 else (low, u)
        newton = u - first / second if second > 0 else 0.0
        following = newton if low < newton < high else (low * high) ** 0.5
        if abs(following - u) <= _PRECISION * u:
            break
        u = following
    return 1 / following


def _slope(logits_NC: Tensor, labels_N: Tensor, u: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log-likelihood by u = 1 / T."""
    if labels_N.dim() == 2:
        return _compute_binary_slope(logits_NC, labels_N, u)
    first = second = 0.0
    for logits_BC, labels_B in zip(torch.split(logits_NC, CHUNK), torch.split(labels_N, CHUNK), strict=True):
        z_BC = logits_BC.double()
        z_BC = z_BC - z_BC.amax(dim=1, keepdim=True)
        p_BC = torch.softmax(u * z_BC, dim=1)
        masked_BC = z_BC == -torch.inf
        if bool(masked_BC.gather(1, labels_B[:, None]).any()):
            raise DataError("a sample's label is a class that the teacher masks; calibrate on the classes that it has")
        z_BC = z_BC.masked_fill(masked_BC, 0.0)  # their probability is 0, and 0 * -inf is no number
        mean_B = (p_BC * z_BC).sum(dim=1)
        first += float((mean_B - z_BC.gather(1, labels_B[:, None])[:, 0]).sum())
        second += float((p_BC * (z_BC - mean_B[:, None]).square()).sum())
    return first / len(labels_N), second / len(labels_N)


def _compute_binary_slope(logits_NC: Tensor, labels_NC: Tensor, u: float) -> tuple[float, float]:
    first = second = 0.0
    for logits_BC, labels_BC in zip(torch.split(logits_NC, CHUNK), torch.split(labels_NC, CHUNK), strict=True):
        known_BC = labels_BC >= 0
        z, y = logits_BC[known_BC].double(), labels_BC[known_BC].double()
        p = torch.sigmoid(u * z)
        first += float(((p - y) * z).sum())
        second += float((p * (1 - p) * z.square()).sum())
    known = int((labels_NC >= 0).sum())
    return first / known, second / known
