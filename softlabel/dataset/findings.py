"""Findings about a source, reported in the first lines of every run."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from softlabel.dataset.suffixes import suffix_of

_CLASSES_SHOWN = 5  # first classes shown of many, with the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Where the labels of a source come from, and which data was left out.

    Attributes:
        labels_from: for example "column 'label'", "the class folders"; None if there are no labels.
        without_labels: why there are no labels, and the option that adds some.
        left_out: warnings about data or digits that are ignored, or much memory, each with a remedy.
        notes: notes of minor importance, for example about other files beside the images.
    """

    labels_from: str | None = None
    without_labels: str | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def list_classes(names: Sequence[str]) -> str:
    """Return ``3 classes: 0 ant, 1 bee, 2 cat``, shortened if there are many."""
    numbered = [f"{number} {name}" for number, name in enumerate(names)]
    if len(numbered) > 2 * _CLASSES_SHOWN:
        numbered = [*numbered[:_CLASSES_SHOWN], "...", numbered[-1]]
    return f"{len(names):,} class{'' if len(names) == 1 else 'es'}: {', '.join(numbered)}"


def count_suffixes(names: Iterable[str]) -> str:
    """Return ``3 .txt, 1 .csv, 1 without a suffix``, the most frequent ones first."""
    counts = Counter(suffix_of(name) for name in names)
    return ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in counts.most_common())


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names as text."""
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")
