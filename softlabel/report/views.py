"""Views of one sample against each other: agreement, divergence, crops that lose the object.

Rows of one sample lie in different shards. Over all rows a few bytes a sample are kept; what needs whole rows is
measured on a sample of them, which has the same samples in every view.

Legend: N samples, R rows of a block, S rows of the sample, G samples that have all views, V views, C classes.
"""

import numpy as np
from numpy.typing import NDArray

from softlabel.report.agreement import explain_drawn
from softlabel.report.examples import ExampleReader
from softlabel.report.figures import Absent, Example, Views
from softlabel.report.shortlist import Shortlist
from softlabel.report.store_pass import Block, RowSample
from softlabel.store.manifest import Run
from softlabel.views import Views as ViewMaker

EXAMPLES = 60
MOST_SAMPLES = 10_000_000  # of which a few bytes each are kept; of more, one in so many evenly
LOST = 0.1  # of the best view's probability of the label, below which a view has lost the object
_VALUES = 1 << 20  # decoded at a time


class ViewMeter:
    """What each sample's views agree on, over all rows; see `Meter`.

    Args:
        run: of the store.
        most_samples: how many samples are followed at most; of a larger dataset one in every so many.
    """

    def __init__(self, run: Run, most_samples: int = MOST_SAMPLES) -> None:
        self._absent = _find_reason(run)
        self._step = max(1, -(-run.dataset.rows // most_samples))
        count = 0 if self._absent is not None else -(-run.dataset.rows // self._step)
        self._views = run.views.count
        self._seen_N = np.zeros(count, np.int32)
        self._top_N = np.zeros(count, np.int32)
        self._same_N = np.ones(count, np.bool_)
        self._lowest_N, self._highest_N = np.full(count, np.inf, np.float32), np.full(count, -np.inf, np.float32)

    def add(self, block: Block) -> None:
        if self._absent is not None:
            return
        judged = block.judged
        assert judged is not None
        followed_R = np.flatnonzero(block.samples % self._step == 0)
        place_R = block.samples[followed_R] // self._step
        top_R, p_label_R = judged.top[followed_R], judged.p_label[followed_R]
        self._same_N[place_R] &= (self._seen_N[place_R] == 0) | (self._top_N[place_R] == top_R)
        self._top_N[place_R] = top_R
        self._seen_N[place_R] += 1
        self._lowest_N[place_R] = np.fmin(self._lowest_N[place_R], p_label_R)
        self._highest_N[place_R] = np.fmax(self._highest_N[place_R], p_label_R)

    def result(self, sample: RowSample, examples: ExampleReader) -> Views | Absent:
        """The section.

        Args:
            sample: that the same pass returned.
            examples: of the store that was read.
        """
        if self._absent is not None:
            return Absent(reason=self._absent)
        whole_N = self._seen_N == self._views
        if not whole_N.any():
            return Absent(reason="no sample has all its views; 'softlabel generate' with the same options goes on")
        labelled_N = whole_N & np.isfinite(self._highest_N)
        lost_N = labelled_N & (self._lowest_N < LOST * self._highest_N)
        mixed = _Mixture(sample)
        return Views(
            samples=int(whole_N.sum()),
            agreement=float(self._same_N[whole_N].mean()),
            flips=mixed.flips / mixed.rows,
            divergence=mixed.nats / mixed.rows,
            lost=int(lost_N.sum()) if labelled_N.any() else None,
            examples=mixed.read_examples(examples),
            sampled=mixed.rows // self._views,
        )


def _find_reason(run: Run) -> str | None:
    """Why views cannot be compared; None where they can."""
    if run.views.count == 1:
        return (
            "the store has one view of each sample; 'softlabel generate --views 4 --augment crop-flip' labels several"
        )
    if ViewMaker.mixes(run):
        return (
            "each view is mixed from two samples, so that views of one sample show different things; label with "
            "--augment crop-flip to compare views"
        )
    if run.activation == "sigmoid":
        return (
            "labels of independent outputs have no single most probable class that views could agree on; the accuracy "
            "of each view is beside the agreement"
        )
    if run.encoding.drawn:
        return explain_drawn("the most probable class of a view")
    return None


class _Mixture:
    """Each view of the sampled samples against the mean over the views, a block of samples at a time."""

    def __init__(self, sample: RowSample) -> None:
        self._sample = sample
        reader, views = sample.reader, sample.reader.run.views.count
        place_GV = _group(sample.samples, sample.views, views)
        self.rows, self.flips, self.nats = place_GV.size, 0, 0.0
        self._shortlist = Shortlist(EXAMPLES)
        step = max(1, _VALUES // (views * reader.members * reader.run.num_classes))
        for start in range(0, len(place_GV), step):
            part_GV = place_GV[start : start + step]
            columns = {name: column[part_GV.ravel()] for name, column in sample.columns.items()}
            p_RC = reader.read_probabilities(columns, reader.judged).numpy().astype(np.float64)
            self._add(p_RC.reshape(*part_GV.shape, -1), part_GV)

    def _add(self, p_GVC: NDArray[np.float64], place_GV: NDArray[np.int64]) -> None:
        mean_GC = p_GVC.mean(axis=1)
        top_G = mean_GC.argmax(axis=1)
        self.flips += int((p_GVC.argmax(axis=2) != top_G[:, None]).sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            logs_GVC = np.where(p_GVC > 0, np.log(p_GVC) - np.log(mean_GC)[:, None], 0.0)
        nats_GV = np.maximum((p_GVC * logs_GVC).sum(axis=2), 0.0)
        self.nats += float(nats_GV.sum())
        # The view that has the least of the label, or, without one, of what the views say together.
        labels_G = self._sample.labels[place_GV[:, 0]]
        wanted_G = np.where(labels_G >= 0, labels_G, top_G)
        lowest_G = np.take_along_axis(p_GVC, wanted_G[:, None, None], axis=2)[:, :, 0].argmin(axis=1)
        rows_G = self._sample.rows[place_GV[np.arange(len(place_GV)), lowest_G]]
        self._shortlist.add(-nats_GV.mean(axis=1), rows_G, suggestion=top_G)

    def read_examples(self, examples: ExampleReader) -> tuple[Example, ...]:
        found = self._shortlist.rows
        return examples.read(
            found["number"].tolist(), scores=found["score"].tolist(), suggestions=found["suggestion"].tolist()
        )


def _group(samples_S: NDArray[np.int64], views_S: NDArray[np.int32], views: int) -> NDArray[np.int64]:
    """Places in the sample (G, V) of the samples that have all views, in the order of the dataset."""
    order_S = np.lexsort((views_S, samples_S))
    _, first_G, count_G = np.unique(samples_S[order_S], return_index=True, return_counts=True)
    place_GV: NDArray[np.int64] = order_S[first_G[count_G == views][:, None] + np.arange(views)]
    return place_GV
