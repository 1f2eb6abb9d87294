"""Check that a store has a row for every sample of a source. Legend: B rows."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from softlabel.common.multi_hot import stack_labels
from softlabel.dataset import Source, open_source, report_source
from softlabel.inputs.content import changed_content, comparable, hashes_of, why_not_comparable
from softlabel.loader.hard_labels import convert_labels, find_contradictions, read_hard_labels
from softlabel.maintain.documents import tokenize_as_stored
from softlabel.store.reader import Store

CHUNK = 4096  # samples read at a time
LISTED = 3  # keys listed in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """A source compared with a store; the first `LISTED` keys and counts of all.

    Attributes:
        samples: samples in the source.
        missing, missing_count: samples without a row that the store does not list as bad.
        surplus_count: rows whose key is not in the source.
        changed, changed_count: samples whose content differs from the labelled ones.
        relabelled, relabelled_count: samples whose hard label differs from the one in the store, where both are known.
        compared: samples whose content hashes could be compared.
        unknown: why the first incomparable sample could not be compared; None if all could.
    """

    samples: int
    missing: tuple[str, ...]
    missing_count: int
    surplus_count: int
    changed: tuple[str, ...]
    changed_count: int
    relabelled: tuple[str, ...]
    relabelled_count: int
    compared: int
    unknown: str | None = None

    @property
    def ok(self) -> bool:
        return not (self.missing_count or self.surplus_count or self.changed_count or self.relabelled_count)


def coverage(store: Store, data: str | Source, *, progress: bool | None = None) -> Coverage:
    """Check that a store has rows for exactly the samples of a source, of the same content and hard labels."""
    source = open_source(data)
    report_source(source)
    source = tokenize_as_stored(source, store)
    bad = store.bad
    missing: list[str] = []
    changed: list[str] = []
    relabelled: list[str] = []
    missing_count = changed_count = relabelled_count = compared = found = 0
    unknown: str | None = None
    kinds = source.inputs.name, store.run.input
    hidden = None if progress is None else not progress
    with tqdm(total=len(source), unit=source.inputs.unit, unit_scale=True, desc="comparing", disable=hidden) as bar:
        for start in range(0, len(source), CHUNK):
            samples = source.read(range(start, min(start + CHUNK, len(source))))
            keys = [sample.key for sample in samples]
            rows_B = store.lookup(keys, missing="mask")
            absent = [key for key, row in zip(keys, rows_B.tolist(), strict=True) if row < 0 and key not in bad]
            missing_count += len(absent)
            missing += absent[: LISTED - len(missing)] if len(missing) < LISTED else []
            found += int((rows_B >= 0).sum())
            there = np.flatnonzero(rows_B >= 0)
            stored = store.content[rows_B[there]]
            now = hashes_of([samples[place].raw for place in there.tolist()], source.inputs.content_hash)
            unknown = unknown or why_not_comparable(now, stored, kinds=kinds)
            compared += int(comparable(now, stored).sum())
            others = there[changed_content(now, stored)].tolist()
            changed_count += len(others)
            changed += [keys[place] for place in others[: max(0, LISTED - len(changed))]]
            labels = stack_labels([samples[place].label for place in there.tolist()], source.label_width)
            theirs = read_hard_labels(store, rows_B[there])
            others = there[find_contradictions(convert_labels(labels, source, store.run), theirs)].tolist()
            relabelled_count += len(others)
            relabelled += [keys[place] for place in others[: max(0, LISTED - len(relabelled))]]
            bar.update(len(samples))
    per_view = len(store) // store.run.views.count
    return Coverage(
        samples=len(source),
        missing=tuple(missing),
        missing_count=missing_count,
        surplus_count=per_view - found,
        changed=tuple(changed),
        changed_count=changed_count,
        relabelled=tuple(relabelled),
        relabelled_count=relabelled_count,
        compared=compared,
        unknown=unknown,
    )
