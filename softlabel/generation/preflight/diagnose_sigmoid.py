"""Diagnose teachers with independent outputs on labelled samples: outputs that say nothing, the opposite, or in another
order, by the area under the ROC curve (AUROC) of each class.

Legend: C classes, N samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CLEARLY = 3.0  # standard errors
_FEW = 4  # samples with and without a class that its AUROC needs
# Width of a finding: a sample that cannot distinguish an AUROC of 0.65 from chance says nothing.
_SHARP = 0.15
_REORDERED = 0.1  # minimal gain in AUROC by another order of the classes
_COMPARED = 32  # classes whose order is compared, those with the most samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """How well outputs rank the samples of their classes.

    Attributes:
        auroc: mean over the classes that have enough samples with and without them.
        classes: their number.
        error: standard error of `auroc` for outputs that do not depend on the labels.
    """

    auroc: float
    classes: int
    error: float


def rank_classes(logits_NC: NDArray[Any], labels_NC: NDArray[np.int8]) -> Ranking | None:
    """Rank the samples of each class by its output; None if no class has enough samples.

    Args:
        logits_NC: floats (N, C).
        labels_NC: 1, 0, or -1 where it is not known.
    """
    return _rank_pairs(logits_NC, labels_NC, [(number, number) for number in range(labels_NC.shape[1])])


def find_ranking_problem(
    logits_NC: NDArray[Any], labels_NC: NDArray[np.int8], class_names: Sequence[str] | None, preprocessing: str
) -> str | None:
    """Return a finding about outputs, or None.

    Args:
        logits_NC: floats (N, C).
        labels_NC: 1, 0, or -1 where it is not known.
        class_names: of the data.
        preprocessing: options that say how the teacher takes samples.
    """
    found = rank_classes(logits_NC, labels_NC)
    if found is None:
        return None
    if order := _find_other_order(logits_NC, labels_NC, class_names):
        return order
    if found.auroc < 0.5 - _CLEARLY * found.error:
        return (
            "its outputs rank the samples in reverse: they are high where the label is 0. Give data whose label 1 is "
            "what an output stands for, or --ignore-labels"
        )
    within = _CLEARLY * found.error
    if within > _SHARP or found.auroc > 0.5 + within:
        return None
    order = ", or outputs in another order than the data's classes" if labels_NC.shape[1] > 1 else ""
    return (
        f"over {found.classes} class{'es' if found.classes > 1 else ''} it is no better than chance (0.5): untrained, "
        f"wrong preprocessing ({preprocessing}){order}"
    )


def _find_other_order(
    logits_NC: NDArray[Any], labels_NC: NDArray[np.int8], class_names: Sequence[str] | None
) -> str | None:
    """Find an assignment of outputs to classes on one half of the samples that ranks the other half clearly better."""
    fit, test = slice(0, None, 2), slice(1, None, 2)
    enough_C = np.minimum(
        *(np.minimum((labels_NC[half] == 1).sum(0), (labels_NC[half] == 0).sum(0)) for half in (fit, test))
    )
    classes = [int(one) for one in np.argsort(-enough_C, kind="stable")[:_COMPARED] if enough_C[one] >= _FEW]
    if len(classes) < 2:
        return None
    pairs = [
        (_compute_auroc(logits_NC[fit, output], labels_NC[fit, label]), output, label)
        for label in classes
        for output in classes
    ]
    meant: dict[int, int] = {}
    for _, output, label in sorted(pairs, key=lambda pair: -pair[0]):
        if output not in meant and label not in meant.values():
            meant[output] = label
    own = _rank_pairs(logits_NC[test], labels_NC[test], [(label, label) for label in classes])
    renamed = _rank_pairs(logits_NC[test], labels_NC[test], list(meant.items()))
    assert own is not None, classes
    assert renamed is not None, classes
    gain = renamed.auroc - own.auroc
    if gain < max(_REORDERED, _CLEARLY * math.sqrt(2) * own.error) or renamed.auroc < 0.5 + _CLEARLY * own.error:
        return None

    def name(one: int) -> str:
        return str(one) if class_names is None else f"{one} ({class_names[one]})"

    moved = [(output, label) for output, label in sorted(meant.items()) if output != label]
    shown = ", ".join(f"output {output} fits class {name(label)}" for output, label in moved[:3])
    return (
        f"its outputs seem to be in another order than the data's classes: {shown}; in that order its mean AUROC is "
        f"{renamed.auroc:.2f}. Give data whose classes are in the teacher's order, or --ignore-labels"
    )


def _rank_pairs(
    logits_NC: NDArray[Any], labels_NC: NDArray[np.int8], pairs: Sequence[tuple[int, int]]
) -> Ranking | None:
    """Rank samples of classes by outputs; `pairs` are (output, class)."""
    areas, variances = [], []
    for output, label in pairs:
        positive, negative = int((labels_NC[:, label] == 1).sum()), int((labels_NC[:, label] == 0).sum())
        if min(positive, negative) >= _FEW:
            areas.append(_compute_auroc(logits_NC[:, output], labels_NC[:, label]))
            variances.append((positive + negative + 1) / (12 * positive * negative))
    if not areas:
        return None
    return Ranking(auroc=float(np.mean(areas)), classes=len(areas), error=math.sqrt(math.fsum(variances)) / len(areas))


def _compute_auroc(scores_N: NDArray[Any], labels_N: NDArray[np.int8]) -> float:
    """Return the share of pairs, a sample with the class and one without, in the right order; ties count half."""
    known_N = labels_N >= 0
    _, inverse, counts = np.unique(scores_N[known_N], return_inverse=True, return_counts=True)
    ranks_N = (np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)]
    positive_N = labels_N[known_N] == 1
    positive = int(positive_N.sum())
    negative = len(positive_N) - positive
    return float((ranks_N[positive_N].sum() - positive * (positive + 1) / 2) / (positive * negative))
