"""Kept members against each other: agreement, divergence, mutual information, and what each is worth.

Legend: R rows, C classes, M members.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.report.agreement import explain_drawn
from softlabel.report.examples import ExampleReader
from softlabel.report.figures import Absent, Ensemble, Histogram
from softlabel.report.shortlist import Shortlist
from softlabel.report.store_pass import RowSample, choose_samples
from softlabel.store.manifest import Run

HISTOGRAM_BINS = 30
EXAMPLES = 60
MOST_VALUES = 32 << 20  # probabilities that are compared; of more rows a part is taken, evenly


def measure_ensemble(sample: RowSample, examples: ExampleReader | None) -> Ensemble | Absent:
    """Compare the members that a store keeps apart, on the rows of the sample, or a part of them where they are large.

    Args:
        sample: of the pass over the store.
        examples: of the store that was read; None lists none.
    """
    run = sample.reader.run
    if (reason := _find_reason(run, len(sample))) is not None:
        return Absent(reason=reason)
    sums = _Sums(sample)
    most = max(1, MOST_VALUES // (sample.reader.members * run.num_classes))
    for chosen, columns in sample.parts(choose_samples(len(sample), most)):
        logits_RMC = sample.reader.read_logits(columns, sample.reader.judged).double()
        sums.add(
            torch.log_softmax(logits_RMC, dim=-1), np.asarray(sample.labels[chosen], np.int64), sample.rows[chosen]
        )
    return sums.result(examples)


def _find_reason(run: Run, rows: int) -> str | None:
    """Why members cannot be compared; None where they can."""
    if len(run.members) == 1:
        return (
            "one teacher made these labels; give several --teacher to 'softlabel generate --combine keep' to see where "
            "they disagree"
        )
    if not run.kept:
        return (
            f"the store holds the mean of its {len(run.members)} members, not each of them; 'softlabel generate "
            "--combine keep' keeps them apart"
        )
    if run.activation == "sigmoid":
        return (
            "members with independent outputs have no single most probable class to agree on; 'softlabel evaluate' "
            "measures each of them on labelled data"
        )
    if run.encoding.drawn:
        return explain_drawn("the most probable class of a member")
    return None if rows else "the store has no rows; 'softlabel generate' with the same options goes on with it"


class _Sums:
    def __init__(self, sample: RowSample) -> None:
        members = sample.reader.members
        self._reader = sample.reader
        self._weights_M = torch.tensor(sample.reader.weights, dtype=torch.float64)
        self.rows = self.labelled = 0
        self.agreed_MM, self.nats_MM = np.zeros((members, members)), np.zeros((members, members))
        self.infinite_MM = np.zeros((members, members), np.bool_)
        self.information = 0.0
        self.edges = np.linspace(0, math.log(members), HISTOGRAM_BINS + 1)
        self.counts = np.zeros(HISTOGRAM_BINS, np.int64)
        # Of each member, of the mean of all, and of the means without each one: right rows, and nats.
        self.right, self.nats = np.zeros(2 * members + 1), np.zeros(2 * members + 1)
        self.shortlist = Shortlist(EXAMPLES)

    def add(self, log_p_RMC: Tensor, labels_R: NDArray[np.int64], rows_R: NDArray[np.int64]) -> None:
        """Take in log-probabilities, float64."""
        p_RMC = log_p_RMC.exp()
        if torch.isinf(log_p_RMC.sum()):
            # A class that a member rules out: it counts nothing in its own entropy, and the divergence of a member that
            # does not is infinite.
            ruled_out_MM = torch.einsum("rmc,rnc->mn", p_RMC, torch.isneginf(log_p_RMC).double())
            self.infinite_MM |= (ruled_out_MM > 0).numpy()
            log_p_RMC = log_p_RMC.masked_fill(torch.isneginf(log_p_RMC), 0.0)
        self_nats_RM = (p_RMC * log_p_RMC).sum(dim=2)
        crossed_MM = torch.bmm(p_RMC, log_p_RMC.transpose(1, 2)).sum(dim=0)
        self.nats_MM += (self_nats_RM.sum(dim=0)[:, None] - crossed_MM).numpy()
        top_RM = p_RMC.numpy().argmax(axis=2)  # many times faster than torch's
        self.agreed_MM += (top_RM[:, :, None] == top_RM[:, None, :]).sum(axis=0)
        mean_RC = torch.einsum("rmc,m->rc", p_RMC, self._weights_M)
        mean_entropy_R = -torch.xlogy(mean_RC, mean_RC).sum(dim=1)
        information_R = (mean_entropy_R + self_nats_RM @ self._weights_M).clamp_min(0).numpy()
        self.information += float(information_R.sum())
        # Rounding may put the largest just above ln M.
        self.counts += np.histogram(np.minimum(information_R, self.edges[-1]), bins=self.edges)[0]
        self.shortlist.add(-information_R, rows_R)
        self.rows += len(rows_R)
        labelled_R = np.flatnonzero(labels_R >= 0)
        if len(labelled_R):
            chosen = torch.from_numpy(labelled_R)
            self._add_labelled(p_RMC[chosen], mean_RC[chosen], torch.from_numpy(labels_R[labelled_R]))

    def _add_labelled(self, p_RMC: Tensor, mean_RC: Tensor, labels_R: Tensor) -> None:
        self.labelled += len(labels_R)
        members = p_RMC.shape[1]
        weights_M = self._weights_M
        without = [
            (mean_RC - weights_M[member] * p_RMC[:, member]).clamp_min(0) / (1 - weights_M[member])
            for member in range(members)
        ]
        for place, answers_RC in enumerate([*p_RMC.unbind(dim=1), mean_RC, *without]):
            self.right[place] += int((answers_RC.numpy().argmax(axis=1) == labels_R.numpy()).sum())
            self.nats[place] -= float(answers_RC.gather(1, labels_R[:, None]).log().sum())

    def result(self, examples: ExampleReader | None) -> Ensemble:
        members = self._reader.members
        divergence_MM = np.where(self.infinite_MM, math.inf, np.maximum(self.nats_MM / self.rows, 0.0))
        np.fill_diagonal(divergence_MM, 0.0)
        accuracy, nats = (self._divide(one) for one in (self.right, self.nats))
        all_nats, without_nats = nats[members], nats[members + 1 :]
        droppable = None
        if all_nats is not None:
            best = min(range(members), key=lambda member: without_nats[member] or 0.0)
            droppable = best if (without_nats[best] or 0.0) < all_nats else None
        found = self.shortlist.rows
        return Ensemble(
            rows=self.rows,
            names=name_members([member.spec for member in self._reader.run.members]),
            accuracy=accuracy[:members],
            cross_entropy=nats[:members],
            agreement=tuple(tuple(row) for row in (self.agreed_MM / self.rows).tolist()),
            divergence=tuple(tuple(row) for row in divergence_MM.tolist()),
            disagreement=Histogram(edges=tuple(self.edges.tolist()), counts=tuple(self.counts.tolist())),
            mean_disagreement=self.information / self.rows,
            all_accuracy=accuracy[members],
            all_cross_entropy=all_nats,
            without_accuracy=accuracy[members + 1 :],
            without_cross_entropy=without_nats,
            droppable=droppable,
            examples=()
            if examples is None
            else examples.read(found["number"].tolist(), scores=found["score"].tolist()),
        )

    def _divide(self, sums: NDArray[np.float64]) -> tuple[float | None, ...]:
        return tuple(float(one) / self.labelled if self.labelled else None for one in sums)


def name_members(specs: Sequence[str]) -> tuple[str, ...]:
    """The SPECs, with a number behind those that occur several times."""
    counts, seen = Counter(specs), Counter[str]()
    names = []
    for spec in specs:
        seen[spec] += 1
        names.append(f"{spec} ({seen[spec]})" if counts[spec] > 1 else spec)
    return tuple(names)
