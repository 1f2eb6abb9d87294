"""What a report must say of a store, in plain numpy, scipy and scikit-learn on all rows at once, in float64."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from softlabel.store.reader import Store

F64 = NDArray[np.float64]


class Rows:
    """All rows of a store: logits (N, M, C) at temperature 1 where they are exact there, else at the store's."""

    def __init__(self, store: Store, judged: float = 1.0) -> None:
        self.run, self.judged = store.run, judged
        taken = store.take(range(len(store)))
        scaled = np.float64(taken.scaled_logits).reshape(len(store), -1, store.run.num_classes)
        self.logits_NMC = scaled * (store.run.temperature / judged)
        self.scaled_NMC = scaled
        self.labels = np.array(taken.hard_labels)
        self.views, self.content, self.keys = taken.views, np.array(taken.content), taken.keys
        self.weights = np.array(store.run.combine.weights) if store.run.kept else np.ones(1)
        self.p_NC = self.combine(self.to_probabilities(self.logits_NMC))
        self.p_stored_NC = self.combine(self.to_probabilities(self.scaled_NMC))

    def to_probabilities(self, logits: F64) -> F64:
        found: F64 = softmax(logits, axis=-1) if self.run.activation == "softmax" else 1 / (1 + np.exp(-logits))
        return found

    def combine(self, p_NMC: F64) -> F64:
        found: F64 = np.einsum("nmc,m->nc", p_NMC, self.weights / self.weights.sum())
        return found


def learn_confidently(p_NC: F64, labels_N: NDArray[np.int64]) -> dict[str, Any]:
    """Section 3 of Northcutt et al., row by row."""
    classes = p_NC.shape[1]
    has = [bool((labels_N == one).any()) for one in range(classes)]
    threshold = [p_NC[labels_N == one, one].mean() if has[one] else np.inf for one in range(classes)]
    counts: Counter[tuple[int, int]] = Counter()
    for row, label in enumerate(labels_N.tolist()):
        if label < 0:
            continue
        reaching = [one for one in range(classes) if p_NC[row, one] >= threshold[one]]
        if not reaching:
            continue
        suggestion = max(reaching, key=lambda one, row=row: p_NC[row, one])
        counts[label, suggestion] += 1
    joint = np.zeros((classes, classes))
    for (label, suggestion), count in counts.items():
        joint[label, suggestion] = count
    sums = joint.sum(axis=1)
    rows_C = np.array([(labels_N == one).sum() for one in range(classes)])
    used = sums > 0
    joint[used] *= (rows_C[used] / sums[used])[:, None]
    total = joint.sum()
    listed: dict[int, list[tuple[float, int]]] = {}
    for label, other in zip(*np.nonzero(joint), strict=True):
        excess = [(p_NC[row, other] - p_NC[row, label], -row) for row in np.flatnonzero(labels_N == label)]
        quota = 0 if label == other else round(joint[label, other])
        for value, row in sorted(excess, reverse=True)[:quota]:
            if value > 0:
                listed.setdefault(-row, []).append((value, int(other)))
    wrong = [
        (p_NC[row, labels_N[row]], p_NC[row, labels_N[row]] - p_NC[row].max(), row, max(found)[1])
        for row, found in listed.items()
    ]
    pairs = Counter((int(labels_N[row]), other) for _, _, row, other in wrong)
    return {
        "thresholds": tuple(one if np.isfinite(one) else None for one in threshold),
        "share": float((total - np.trace(joint)) / total) if total else 0.0,
        "wrong": sorted(wrong),
        "pairs": sorted((-count, *pair) for pair, count in pairs.items())[:50],
    }


def reliability(confidence: F64, right: NDArray[np.bool_]) -> tuple[list[int], float]:
    """Counts of 15 bins (lower, upper], and the expected calibration error."""
    edges = np.linspace(0, 1, 16)
    counts, error = [], 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        counts.append(int(inside.sum()))
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return counts, error


def fit_temperature(logits_NC: F64, labels_N: NDArray[np.int64]) -> float:
    def nats(log_t: float) -> float:
        return float(-log_softmax(logits_NC / np.exp(log_t), axis=1)[np.arange(len(labels_N)), labels_N].mean())

    return float(np.exp(minimize_scalar(nats, bounds=(np.log(0.01), np.log(100)), method="bounded").x))


def entropy(p_NC: F64) -> F64:
    found: F64 = -np.where(p_NC > 0, p_NC * np.log(np.where(p_NC > 0, p_NC, 1)), 0).sum(axis=1)
    return found
