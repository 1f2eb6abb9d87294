"""Documents of a store as the page shows them: the text of each token, and what is measured of it.

Legend: L tokens of a document, P positions of several, K measures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabel.report.agreement import explain_drawn
from softlabel.report.document_figures import DocumentList, Documents, Measure, ShownDocument
from softlabel.report.document_pass import TOKEN_NAMES, make_block
from softlabel.report.figures import Absent
from softlabel.report.measure_documents import DocumentFigures
from softlabel.report.positions import PositionJudge
from softlabel.report.probabilities import LabelReader
from softlabel.report.token_students import Divergences
from softlabel.store.reader import Store
from softlabel.store.sample_rows import sample_rows

F64 = NDArray[np.float64]
_MOST_TOKENS = 240  # of a document
_RULED_OUT = 1e4  # nats, in place of infinity: more than those of any stretch
_STRONGEST = 0.95  # of the shown values lie below the strongest colour
_ENTROPY, _SURPRISE, _DISAGREEMENT = "entropy", "surprise", "disagreement"
_MEANINGS = {
    _ENTROPY: "entropy of the teacher before the token, in nats: how open it found what comes",
    _SURPRISE: "-log p(token) of the teacher, in nats: how little it expected the token that came",
    _DISAGREEMENT: "mutual information of the members before the token, in nats: how far they differ",
}


def show_documents(store: Store, figures: DocumentFigures, divergences: Sequence[Divergences]) -> Documents | Absent:
    """Read the documents that surprise the teacher most, and those on which students are furthest from it.

    Args:
        store: that was measured.
        figures: of it.
        divergences: of students on these documents.
    """
    reader = LabelReader(store)
    if reader.is_drawn:
        return Absent(reason=explain_drawn("how sure the teacher is of a token"))
    if isinstance(figures.agreement, Absent):
        return figures.agreement
    rows, scores = figures.surprising
    asked = [("The most surprising documents", "mean NLL", _SURPRISE, rows, scores)]
    asked += [
        (f"Where {one.run} is furthest from its teacher", "mean KL", _name_divergence(one), one.rows, one.scores)
        for one in divergences
        if len(one.rows)
    ]
    read = _Reading(store, reader, np.unique(np.concatenate([one[3] for one in asked])), divergences)
    lists = tuple(
        DocumentList(
            title=title,
            score=score,
            documents=tuple(
                read.show(int(row), float(value), measure, figures.texts.split)
                for row, value in zip(rows.tolist(), scores.tolist(), strict=True)
            ),
        )
        for title, score, measure, rows, scores in asked
    )
    return Documents(measures=read.describe(lists), lists=lists, note=figures.texts.note)


class _Reading:
    """Some rows with their values by measure."""

    def __init__(
        self, store: Store, reader: LabelReader, rows: NDArray[np.int64], divergences: Sequence[Divergences]
    ) -> None:
        found = sample_rows(store, rows, ["key", "content", *TOKEN_NAMES, *reader.columns])
        block = make_block(found, PositionJudge(reader))
        judged = block.judged
        assert judged is not None
        of_position: dict[str, F64] = {_ENTROPY: judged.entropy[reader.judged], _SURPRISE: judged.nll}
        if judged.information is not None:
            of_position[_DISAGREEMENT] = judged.information
        self._rows, self._keys = {row: place for place, row in enumerate(rows.tolist())}, found.keys
        ends = np.cumsum(block.lengths)
        self._ids = np.split(block.tokens, ends[:-1])
        starts = ends - block.lengths
        self.values: dict[str, list[F64]] = {}
        chosen_P = np.flatnonzero(block.predicted)
        at = starts[block.document[chosen_P]] + block.place[chosen_P] + 1  # the token that comes then
        for name, values_P in of_position.items():
            whole = np.full(len(block.tokens), np.nan)
            whole[at] = values_P[chosen_P]
            self.values[name] = np.split(whole, ends[:-1])
        for one in divergences:
            self.values[_name_divergence(one)] = [
                _shift(one.by_row, row, int(length))
                for row, length in zip(rows.tolist(), block.lengths.tolist(), strict=True)
            ]

    def show(self, row: int, score: float, measure: str, split: Any) -> ShownDocument:
        """A document, or the stretch of it with the highest values of a measure."""
        place = self._rows[row]
        ids = self._ids[place]
        first = _find_stretch(self.values[measure][place])
        stretch = slice(first, first + _MOST_TOKENS)
        return ShownDocument(
            key=self._keys[place],
            length=len(ids),
            first=first,
            score=score,
            tokens=split(ids[: stretch.stop].tolist())[stretch],
            values=tuple(
                tuple(None if np.isnan(one) else float(f"{one:.4g}") for one in values[place][stretch].tolist())
                for values in self.values.values()
            ),
        )

    def describe(self, lists: Sequence[DocumentList]) -> tuple[Measure, ...]:
        measures = []
        for number, name in enumerate(self.values):
            shown = [
                value
                for part in lists
                for document in part.documents
                for value in document.values[number]
                if value is not None and np.isfinite(value)
            ]
            scale = float(f"{np.quantile(shown, _STRONGEST):.3g}") if shown else 0.0
            meaning = _MEANINGS.get(name, f"{name} before the token, in nats: how far the student is off")
            measures.append(Measure(name=name, meaning=meaning, scale=scale))
        return tuple(measures)


def _name_divergence(one: Divergences) -> str:
    return f"KL(teacher || {one.run})"


def _shift(by_row: Mapping[int, F64], row: int, length: int) -> F64:
    """Values of positions as those of the tokens that follow them."""
    found = np.full(length, np.nan)
    if row in by_row:
        found[1:] = by_row[row][:-1]
    return found


def _find_stretch(values_L: F64) -> int:
    """The first token of the stretch with the highest sum."""
    if len(values_L) <= _MOST_TOKENS:
        return 0
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values_L, posinf=_RULED_OUT))])
    return int(np.argmax(sums[_MOST_TOKENS:] - sums[:-_MOST_TOKENS]))
