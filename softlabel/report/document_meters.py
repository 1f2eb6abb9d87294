"""What a report gathers of documents beside their next tokens: sharpness, what truncation costs, coverage, vocabulary.

Legend: N documents, P positions, C tokens of the vocabulary.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from softlabel.inputs.tokens import EMPTY
from softlabel.report.agreement import explain_drawn
from softlabel.report.coverage import BAD_LISTED, GROUPS_LISTED, OF_A_GROUP, find_equal
from softlabel.report.document_figures import (
    DocumentCoverage,
    EqualDocuments,
    KeptMass,
    LengthRange,
    TokenUse,
    VocabularyUse,
)
from softlabel.report.document_pass import DocumentBlock
from softlabel.report.figures import Absent, Sharpness
from softlabel.report.next_token import LISTED, list_ranges, number_range
from softlabel.report.positions import PositionJudge
from softlabel.report.probabilities import LabelReader
from softlabel.report.sharpness import EntropySums
from softlabel.store.reader import Store
from softlabel.store.sample_rows import sample_rows

_MOST = 0.9  # of the probability
_SHARES = 0.5, 0.9, 0.99  # of the documents


class PositionMeter:
    """Entropy at each temperature, and the mass that truncated labels keep, over all positions that count."""

    def __init__(self, reader: LabelReader) -> None:
        self._reader = reader
        self._temperatures = () if reader.is_drawn else PositionJudge(reader).temperatures
        highest = math.log(max(2, reader.run.num_classes))
        self._entropy = {at: EntropySums(highest=highest) for at in self._temperatures}
        self._kept: dict[float, NDArray[np.float64]] = {}  # sum, below most, lowest; of truncated labels alone
        self.positions = self.non_finite = 0

    def add(self, block: DocumentBlock) -> None:
        if (judged := block.judged) is None:
            return
        broken_P = np.zeros(len(block.place), np.bool_)
        for entropy_P in judged.entropy.values():
            broken_P |= ~np.isfinite(entropy_P)
        self.non_finite += int(broken_P.sum())
        chosen_P = np.flatnonzero(block.counts & ~broken_P)
        self.positions += len(chosen_P)
        for at in self._temperatures:
            self._entropy[at].add(judged.entropy[at][chosen_P], judged.sure[at][chosen_P].astype(np.float64))
        for at, kept_P in judged.kept.items():
            chosen = kept_P[chosen_P]
            kept = self._kept.setdefault(at, np.array([0.0, 0.0, 1.0]))
            kept[:2] += chosen.sum(), (chosen < _MOST).sum()
            kept[2] = min(kept[2], chosen.min(initial=1.0))

    def summarize_sharpness(self) -> Sharpness | Absent:
        if self._reader.is_drawn:
            return Absent(reason=explain_drawn("the entropy of a position"))
        if not self.positions:
            return Absent(reason="no position of the store counts; label data whose mask has some that do")
        # A next token is open where a class is not: a temperature is not suggested by the same rule.
        at = tuple(sums.result(temperature) for temperature, sums in self._entropy.items())
        return Sharpness(at=at, suggested_temperature=None)

    def summarize_kept(self) -> tuple[KeptMass, ...]:
        if not self.positions:
            return ()
        return tuple(
            KeptMass(
                temperature=at,
                mean=float(total) / self.positions,
                lowest=float(lowest),
                below_90=float(below) / self.positions,
            )
            for at, (total, below, lowest) in self._kept.items()
        )


class DocumentCoverageMeter:
    """Counts of documents, tokens and positions, and the content hashes."""

    def __init__(self, store: Store) -> None:
        assert store.run.tokens is not None
        self._store, self._max_length = store, store.run.tokens.max_length
        self._documents = self._tokens = self._positions = self._counted = self._predicted = self._at_limit = 0
        self._ranges = list_ranges()
        self._lengths = np.zeros(len(self._ranges), np.int64)
        self._content: list[NDArray[np.uint64]] = []

    def add(self, block: DocumentBlock) -> None:
        self._documents += len(block)
        self._tokens += int(block.lengths.sum())
        self._positions += len(block.place)
        self._counted += int(block.counts.sum())
        self._predicted += int(block.predicted.sum())
        self._at_limit += int((block.lengths == self._max_length).sum())
        lengths_B = block.lengths[block.lengths > 0]
        self._lengths += np.bincount(number_range(lengths_B), minlength=len(self._ranges))
        self._content.append(block.content)

    def result(self, *, non_finite: int) -> DocumentCoverage:
        run, bad = self._store.run, self._store.bad
        return DocumentCoverage(
            samples=run.dataset.rows,
            documents=self._documents,
            tokens=self._tokens,
            positions=self._positions,
            counted=self._counted,
            predicted=self._predicted,
            max_length=self._max_length,
            at_limit=self._at_limit,
            lengths=tuple(
                LengthRange(first=first, last=last, documents=count)
                for (first, last), count in zip(self._ranges, self._lengths.tolist(), strict=True)
                if count
            ),
            bad_count=len(bad),
            empty=sum(reason == EMPTY for reason in bad.values()),
            bad=tuple(list(bad.items())[:BAD_LISTED]),
            missing=max(0, run.dataset.rows - len(bad) - self._documents),
            non_finite=non_finite,
            duplicates=self._find_duplicates(),
        )

    def _find_duplicates(self) -> EqualDocuments:
        content_N = np.concatenate([np.zeros(0, np.uint64), *self._content])
        hashed_N = np.flatnonzero(content_N)
        members, sizes = find_equal(content_N[hashed_N])
        rows = hashed_N[members]
        firsts = np.cumsum(sizes) - sizes
        shown = np.argsort(rows[firsts] if len(sizes) else firsts, kind="stable")[:GROUPS_LISTED]
        groups = [rows[firsts[one] : firsts[one] + min(sizes[one], OF_A_GROUP)].tolist() for one in shown]
        keys: Mapping[int, str] = {}
        if listed := sorted(row for group in groups for row in group):
            keys = dict(zip(listed, sample_rows(self._store, listed, ["key"]).keys, strict=True))
        return EqualDocuments(
            groups=len(sizes),
            samples=int(sizes.sum()),
            keys=tuple(tuple(keys[row] for row in group) for group in groups),
            compared=len(hashed_N),
        )


class VocabularyMeter:
    """How often each token occurs, and how often it is the most probable one."""

    def __init__(self, reader: LabelReader) -> None:
        self._is_drawn, classes = reader.is_drawn, reader.run.num_classes
        self._count_C, self._top_C = np.zeros(classes, np.int64), np.zeros(classes, np.int64)

    def add(self, block: DocumentBlock) -> None:
        self._count_C += np.bincount(block.tokens, minlength=len(self._count_C))
        if block.judged is not None:
            self._top_C += np.bincount(block.judged.top[block.counts], minlength=len(self._top_C))

    def result(self, name: Callable[[int], str], *, unknown: int | None) -> VocabularyUse:
        """What was found.

        Args:
            name: of a token by its id.
            unknown: id of the token for what the tokenizer does not know; None for none.
        """
        order = np.lexsort((np.arange(len(self._count_C)), -self._count_C))
        sums = np.cumsum(self._count_C[order])
        total = int(sums[-1])
        return VocabularyUse(
            size=len(self._count_C),
            used=int((self._count_C > 0).sum()),
            predicted=None if self._is_drawn else int((self._top_C > 0).sum()),
            covering=tuple(
                (share, int(np.searchsorted(sums, math.ceil(share * total))) + 1) for share in _SHARES if total
            ),
            unknown=None if unknown is None else int(self._count_C[unknown]),
            frequent=tuple(
                TokenUse(
                    id=one,
                    token=name(one),
                    count=int(self._count_C[one]),
                    predicted=None if self._is_drawn else int(self._top_C[one]),
                )
                for one in order[:LISTED].tolist()
                if self._count_C[one]
            ),
        )
