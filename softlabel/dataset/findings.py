"""What was found when a source was opened: the first lines of every run, before a teacher or student sees an image."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from softlabel.dataset.suffixes import suffix_of

_CLASSES_SHOWN = 5  # of many: the first ones, and the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Where the labels of a source come from, and what of it is no sample or no label.

    Attributes:
        labels_from: "column 'label'", "the class folders"; None where it has no labels.
        without_labels: why it has none, and the option that would give some.
        left_out: what a user may miss, each with the option that would take it.
        notes: what is only worth a word, such as files of other kinds beside the images.
    """

    labels_from: str | None = None
    without_labels: str | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def list_classes(names: Sequence[str]) -> str:
    """``3 classes: 0 ant, 1 bee, 2 cat``, with those in the middle of many left out."""
    numbered = [f"{number} {name}" for number, name in enumerate(names)]
    if len(numbered) > 2 * _CLASSES_SHOWN:
        numbered = [*numbered[:_CLASSES_SHOWN], "...", numbered[-1]]
    return f"{len(names):,} class{'' if len(names) == 1 else 'es'}: {', '.join(numbered)}"


def count_suffixes(names: Iterable[str]) -> str:
    """``3 .txt, 1 .csv, 1 without a suffix``, the most frequent ones first."""
    counts = Counter(suffix_of(name) for name in names)
    return ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in counts.most_common())


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of several names."""
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")
