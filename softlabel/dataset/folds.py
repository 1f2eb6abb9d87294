"""Folds of a source for cross-fitting, and the options that name them: ``fold=``, ``without_fold=``, ``labelled=``.

The fold of a sample is a function of its key and a seed alone, so that it depends neither on the order of the data nor
on how much of it there is.

Legend: N samples.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from softlabel.common.keys import Keys
from softlabel.common.multi_hot import Labels, is_labelled
from softlabel.common.spec import quote_path
from softlabel.dataset.source import FileStamp, Source, span
from softlabel.errors import SpecError
from softlabel.inputs.base import Sample

_MOST_FOLDS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which samples of a source to take.

    Attributes:
        fold: number of a fold, from 1; None: any.
        folds: how many there are.
        seed: of the folds.
        outside: take the other folds instead of `fold`.
        labelled: take only samples with a hard label.
    """

    fold: int | None = None
    folds: int = 1
    seed: int = 0
    outside: bool = False
    labelled: bool = False

    def name(self, source: str) -> str:
        """Return the SOURCE that names these samples of another SOURCE."""
        options = []
        if self.fold is not None:
            options.append(f"{'without_fold' if self.outside else 'fold'}={self.fold}/{self.folds}")
            options += [f"fold_seed={self.seed}"] if self.seed else []
        options += ["labelled=only"] if self.labelled else []
        if os.path.exists(os.path.expanduser(source)):
            source = quote_path(source)
        return f"{source}{'&' if '?' in source else '?'}{'&'.join(options)}" if options else source


class ChosenSource(Source):
    """The samples `rows_N` of another source, ascending indices int64 (N,). Keys and labels are in memory."""

    def __init__(self, base: Source, rows_N: NDArray[np.int64], choice: Choice, *, name: str) -> None:
        self.base, self.rows_N, self.choice = base, rows_N, choice
        self.copy_attributes(base)
        self.lengths = None if base.lengths is None else base.lengths[rows_N]
        self.name = name
        self._keys = base.key_table().take(rows_N)
        labels = base.labels()
        self._labels, self._highest = labels[rows_N], int(labels.max(initial=-1))
        self.has_labels = bool(is_labelled(self._labels).any())

    def __len__(self) -> int:
        return len(self.rows_N)

    def stamp(self) -> tuple[FileStamp, ...] | None:
        return self.base.stamp()

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        return self.key_table(start, stop).to_list()

    def key_table(self, start: int = 0, stop: int | None = None) -> Keys:
        return self._keys.slice(*span(start, stop, len(self)))

    def labels(self, start: int = 0, stop: int | None = None) -> Labels:
        return self._labels[slice(*span(start, stop, len(self)))].copy()

    def highest_label(self) -> int:
        return self._highest

    def blocks(self) -> list[tuple[int, int]]:
        edges = np.searchsorted(self.rows_N, [start for start, _ in self.base.blocks()]).tolist()
        return [(first, last) for first, last in zip(edges, [*edges[1:], len(self)], strict=True) if first < last]

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        return self.base.read(self.rows_N[np.asarray(indices, dtype=np.int64)])


def assign_folds(keys: Sequence[str] | Keys, folds: int, seed: int = 0) -> NDArray[np.int64]:
    """Return the fold of each key, from 0: the xxh3-64 of its UTF-8 bytes with a seed, modulo the number of folds."""
    listed = keys.to_list() if isinstance(keys, Keys) else keys
    hashes = (xxhash.xxh3_64_intdigest(key.encode(), seed) % folds for key in listed)
    return np.fromiter(hashes, np.int64, len(listed))


def choose_samples(source: Source, choice: Choice, *, name: str) -> ChosenSource:
    """Return the chosen samples of a source; `name` is their SOURCE."""
    chosen_N = np.ones(len(source), np.bool_)
    if choice.fold is not None:
        chosen_N = (assign_folds(source.key_table(), choice.folds, choice.seed) == choice.fold - 1) != choice.outside
    if choice.labelled:
        chosen_N &= is_labelled(source.labels())
    return ChosenSource(source, np.flatnonzero(chosen_N), choice, name=name)


def read_choice(options: dict[str, str], *, subject: str) -> Choice | None:
    """Remove the options that choose samples from those of a SOURCE and parse them; None without any.

    Raises:
        SpecError: an option has another form, or they do not fit together.
    """
    given = {name: options.pop(name) for name in ("fold", "without_fold", "fold_seed", "labelled") if name in options}
    if not given:
        return None
    if given.get("labelled", "only") != "only":
        raise SpecError(f"{subject}: labelled: expected only, found {given['labelled']!r}")
    labelled = "labelled" in given
    named = [name for name in ("fold", "without_fold") if name in given]
    if len(named) == 2:
        raise SpecError(f"{subject}: expected fold= or without_fold=, found both; leave one of them out")
    if not named:
        if "fold_seed" in given:
            raise SpecError(f"{subject}: fold_seed: expected fold= or without_fold= beside it, found neither")
        return Choice(labelled=labelled)
    number, _, count = given[named[0]].partition("/")
    seed = given.get("fold_seed", "0")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= _MOST_FOLDS):
        raise SpecError(
            f"{subject}: {named[0]}: expected NUMBER/FOLDS, such as 1/4, with at most {_MOST_FOLDS} folds, found "
            f"{given[named[0]]!r}"
        )
    if not (seed.isdecimal() and int(seed) < 2**63):
        raise SpecError(f"{subject}: fold_seed: expected a whole number of at least 0, found {seed!r}")
    return Choice(
        fold=int(number), folds=int(count), seed=int(seed), outside=named[0] == "without_fold", labelled=labelled
    )
