"""Diagnose teachers on labelled images: accuracy, wrong preprocessing, or another order of classes.

Legend: C classes, N labelled images.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.multi_hot import Labels
from softlabel.generation.input_reader import DecodedBatch
from softlabel.generation.labeller import Labeller
from softlabel.generation.preflight.sample import Trial
from softlabel.inputs.base import IGNORE
from softlabel.inputs.image_transform import Preprocessing
from softlabel.models.teacher import Teacher

# Common normalisations, (mean, std).
NORMALISATIONS = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "[-1, 1]": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "[0, 1]": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "CIFAR's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
FEWEST = 32  # labelled images needed for a finding
_CLEARLY = 3.0  # standard errors
_CONFIDENT = 0.5
_REORDERED = 0.1  # minimal gain in accuracy by another order of classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One teacher on the sample's labelled images; `finding` names a problem and its likely cause, or is None."""

    teacher: str
    images: int
    accuracy: float
    confidence: float
    finding: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Predictions:
    """Predicted class, its probability, and label of N images."""

    top: NDArray[np.int64]
    sure: NDArray[np.float64]
    labels: NDArray[np.int64]

    @property
    def right(self) -> NDArray[np.bool_]:
        right_N: NDArray[np.bool_] = self.top == self.labels
        return right_N

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def compare_names(teacher: Teacher, class_names: Sequence[str] | None) -> str | None:
    """Compare a teacher's class names with the data's; return a finding, or None."""
    theirs = teacher.class_names
    if theirs is None or class_names is None or len(theirs) != len(class_names):
        return None
    if all(re.fullmatch(r"n?\d+", name) for name in class_names):  # numbers and WordNet ids cannot be compared
        return None
    names, own = [_split_synonyms(name) for name in class_names], [_split_synonyms(name) for name in theirs]
    other = [number for number, (a, b) in enumerate(zip(own, names, strict=True)) if not a & b]
    if not other:
        return None
    known = set().union(*names)
    moved = [number for number in other if own[number] & known]
    shown = ", ".join(f"class {n} is {theirs[n]!r} for it and {class_names[n]!r} in the data" for n in other[:3])
    what = "are in another order than the data's" if len(moved) == len(other) else "are not named as the data's"
    return (
        f"{teacher.spec.text}: {len(other)} of its {len(theirs)} classes {what}: {shown}; give data whose classes are "
        "the teacher's, or --ignore-labels"
    )


def _split_synonyms(name: str) -> set[str]:
    """Split a name such as 'Tench, Tinca_tinca' into normalised synonyms."""
    return {" ".join(re.split(r"[\s_-]+", part.strip().casefold())) for part in name.split(",")}


def diagnose(labeller: Labeller, trial: Trial) -> tuple[Diagnosis, ...]:
    """Diagnose every teacher on the labelled images of a sample; empty if there are none, or if an image may have
    several classes at once, so that no one of them is the right one."""
    several = labeller.run.activation == "sigmoid"
    labelled = any((batch.labels != IGNORE).any() for batch in trial.batches)
    if several or not labelled or not labeller.run.encoding.labels:
        return ()
    return tuple(_diagnose_teacher(labeller, number, trial) for number in range(len(labeller.teachers)))


def _diagnose_teacher(labeller: Labeller, number: int, trial: Trial) -> Diagnosis:
    teacher, run = labeller.teachers[number], labeller.run
    if run.kept or len(labeller.teachers) == 1:  # its logits are in the sample
        own = trial.scaled_logits.reshape(len(trial.labels), -1, run.num_classes)[:, number]
        rows = sum(len(batch.keys) for batch in trial.batches)
        logits_BC = own[:rows] * (run.temperature * run.members[number].calibration)
        found = _evaluate_logits(logits_BC, trial.labels[:rows])
    else:
        full = [batch for batch in trial.batches if batch.keys]
        logits_BC = torch.cat([logits_MBC[number] for logits_MBC in labeller.lane.logits(full)])
        found = _evaluate_logits(logits_BC, np.concatenate([batch.labels for batch in full]))
    finding = None
    if len(found.labels) >= FEWEST:
        finding = (
            _find_other_order(found, run.class_names)
            or _find_other_normalisation(teacher, labeller, trial)
            or _describe_chance(found, teacher)
        )
    return Diagnosis(
        teacher=teacher.spec.text,
        images=len(found.labels),
        accuracy=found.accuracy,
        confidence=float(found.sure.mean()),
        finding=finding,
    )


def _evaluate_logits(logits_BC: Tensor, labels_B: Labels) -> _Predictions:
    known_B = labels_B != IGNORE
    best = torch.softmax(logits_BC.double().cpu(), dim=1).max(dim=1)
    return _Predictions(
        top=best.indices.numpy()[known_B], sure=best.values.numpy()[known_B], labels=labels_B[known_B].astype(np.int64)
    )


def _evaluate_teacher(teacher: Teacher, labeller: Labeller, batches: Sequence[DecodedBatch]) -> _Predictions:
    """Run one teacher on batches."""
    place = [one.shape for one in labeller.reader.transforms].index(teacher.preprocessing.shape)
    full = [batch for batch in batches if batch.keys]
    logits = torch.cat([teacher.logits(batch.inputs[place]) for batch in full])
    return _evaluate_logits(logits, np.concatenate([batch.labels for batch in full]))


def _find_other_order(found: _Predictions, class_names: Sequence[str] | None) -> str | None:
    """Find a renaming of classes on one half of the images that improves the accuracy on the other half.

    A class that is not in the first half counts as wrong.
    """
    fit, test = slice(0, None, 2), slice(1, None, 2)
    seen = Counter(zip(found.top[fit].tolist(), found.labels[fit].tolist(), strict=True))
    meant: dict[int, int] = {}
    taken: set[int] = set()
    for (answer, label), _ in sorted(seen.items(), key=lambda item: (-item[1], item[0])):
        if answer not in meant and label not in taken:
            meant[answer] = label
            taken.add(label)
    labels_N = found.labels[test]
    renamed_N = np.array([meant.get(answer, IGNORE) for answer in found.top[test].tolist()]) == labels_N
    gain = _compute_gain(renamed_N, found.right[test])
    moved = sorted((answer, label) for answer, label in meant.items() if answer != label)
    if gain is None or gain < _REORDERED or renamed_N.mean() < 0.5:
        return None

    def name(one: int) -> str:
        return str(one) if class_names is None else f"{one} ({class_names[one]})"

    shown = ", ".join(f"{answer} where the label is {name(label)}" for answer, label in moved[:3])
    return (
        f"its classes seem to be in another order than the data's: it answers {shown}; with its classes renamed so, "
        f"its accuracy is {renamed_N.mean():.2f}. Give data whose class numbers are the teacher's, or --ignore-labels"
    )


def _find_other_normalisation(teacher: Teacher, labeller: Labeller, trial: Trial) -> str | None:
    """Return a finding if another common mean and std clearly improves the accuracy."""
    if labeller.members.in_turn:  # the weights are not on the device
        return None
    own = teacher.preprocessing
    if not isinstance(own, Preprocessing) or len(own.mean) != 3:  # they are of RGB
        return None
    batches = [batch for batch in trial.batches if (batch.labels != IGNORE).any()][-1:]
    now = _evaluate_teacher(teacher, labeller, batches)
    best, finding = 0.0, None
    for name, (mean, std) in NORMALISATIONS.items():
        if max(abs(a - b) for a, b in zip((*mean, *std), (*own.mean, *own.std), strict=True)) < 1e-3:
            continue
        other = dataclasses.replace(teacher, preprocessing=dataclasses.replace(own, mean=mean, std=std))
        then = _evaluate_teacher(other, labeller, batches)
        gain = _compute_gain(then.right, now.right)
        if gain is not None and gain > best:
            numbers = f"mean={_format_numbers(mean)}&std={_format_numbers(std)}"
            best = gain
            finding = (
                f"its preprocessing seems to be another: normalised as {name} ('?{numbers}' in its SPEC) its accuracy "
                f"on {len(now.labels)} images is {then.accuracy:.2f} instead of {now.accuracy:.2f}"
            )
    return finding


def _format_numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in dict.fromkeys(values))


def _compute_gain(other_N: NDArray[np.bool_], own_N: NDArray[np.bool_]) -> float | None:
    """Return the gain in accuracy of the first over the second; None if not significant (McNemar's test)."""
    won, lost = int((other_N & ~own_N).sum()), int((own_N & ~other_N).sum())
    gain = (won - lost) / len(own_N)
    return gain if gain >= 0.05 and won - lost >= _CLEARLY * math.sqrt(won + lost) else None


def _describe_chance(found: _Predictions, teacher: Teacher) -> str | None:
    chance = 1 / teacher.num_classes
    if found.accuracy > chance + _CLEARLY * math.sqrt(chance * (1 - chance) / len(found.labels)):
        return None
    sure = float(found.sure.mean()) >= max(_CONFIDENT, 3 * chance)
    return (
        f"it is {'sure of its answers and ' if sure else ''}no better than chance: {'' if sure else 'untrained, '}"
        f"wrong preprocessing ({teacher.preprocessing.spec_options}), or classes in another order than the data's"
    )
