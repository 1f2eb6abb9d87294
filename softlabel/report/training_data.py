"""Which samples a run was trained on, as far as its folder, its store of labels and its data still say so.

A run folder has the fingerprint of the training data's keys, and the places of data and store as they were given. Keys
are from any of these that still fits the fingerprint, content hashes from the store, else from the data as it is now.

Legend: N samples in question, T samples of the training data, R some of either.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from softlabel.common.keys import Keys
from softlabel.common.places import absolute_source
from softlabel.common.spec import parse_spec
from softlabel.dataset import Source, open_source
from softlabel.dataset.tokenize import TokenizedSource
from softlabel.errors import SoftLabelError, SpecError, TrainingError
from softlabel.inputs.content import comparable, hashes_of
from softlabel.report.stored_documents import StoredDocuments
from softlabel.store.key_index import KeyIndex
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.training.run_folder import DATA_KEYS, recorded_config, recorded_identity

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
Mask = NDArray[np.bool_]

_CHUNK = 4096  # samples read at a time
_CONTINUED = 8  # runs that started from one another


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """How many samples were in the training data of a run, or of the runs that it started from.

    Attributes:
        trained: how many were; None where that is not known.
        by_keys: how many of these are counted for their keys alone: no content hashes of both could be compared.
        untold: it started from other weights than those of runs, whose data is not known.
    """

    trained: int | None
    by_keys: int = 0
    untold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedAs:
    """What content hashes are of: those of other samples say nothing about each other.

    Attributes:
        kind: of the samples.
        tokenizer, template, bos, eos: of documents of tokens; see `softlabel.store.token_rows.TokenRun`.
        max_length: of these; a longer document is hashed without the rest. None: samples are whole.
    """

    kind: str
    tokenizer: str | None = None
    template: str | None = None
    bos: int | None = None
    eos: int | None = None
    max_length: int | None = None

    @classmethod
    def of_store(cls, store: Store) -> "HashedAs":
        if (tokens := store.run.tokens) is None:
            return cls(kind=store.run.input)
        return cls(
            kind=store.run.input,
            tokenizer=tokens.tokenizer,
            template=tokens.template,
            bos=tokens.bos,
            eos=tokens.eos,
            max_length=tokens.max_length,
        )

    @classmethod
    def of_source(cls, source: Source) -> "HashedAs":
        if isinstance(source, StoredDocuments):
            return cls.of_store(source.store)
        if not isinstance(source, TokenizedSource):
            return cls(kind=source.inputs.name)
        made = source.tokenization
        return cls(
            kind=source.inputs.name,
            tokenizer=made.vocabulary,
            template=made.template,
            bos=made.bos,
            eos=made.eos,
            max_length=made.max_length,
        )

    def find_whole_length(self, other: "HashedAs") -> float | None:
        """Samples of fewer tokens can be compared, as both are hashed whole; None: none can be.

        Returns:
            inf where all can, as both were cut alike or not at all.
        """
        if replace(self, max_length=other.max_length) != other:
            return None
        if self.max_length == other.max_length:
            return math.inf
        return min(one for one in (self.max_length, other.max_length) if one is not None)


class Samples(Protocol):
    """Samples in question: `fingerprint` of all keys of their data, `place` of it, None if it has none, what they are
    hashed as, N keys."""

    fingerprint: str
    place: str | None
    hashed_as: HashedAs
    keys: Keys

    def hash(self, rows_R: I64) -> U64:
        """Content hashes of some, uint64 (R,), 0 for none."""

    def count_tokens(self, rows_R: I64) -> I64:
        """Tokens of some documents, int64 (R,)."""


class StoredSamples:
    """The labelled samples of a store, by their rows of view 0."""

    def __init__(self, store: Store) -> None:
        self._store, self._rows_N = store, np.flatnonzero(store.views == 0)
        self.fingerprint = store.run.dataset.fingerprint
        self.place, self.hashed_as = _find_place(store.manifest.recorded.get("data")), HashedAs.of_store(store)
        self.keys = store.keys if len(self._rows_N) == len(store) else store.keys.take(self._rows_N)

    def hash(self, rows_R: I64) -> U64:
        return self._store.content[self._rows_N[rows_R]]

    def count_tokens(self, rows_R: I64) -> I64:
        return np.diff(self._store.spans.offsets["token"])[self._rows_N[rows_R]]


class SourceHashes:
    """Content hashes of the samples of a source, each found once: from a store where it has labels of them, else read.

    Args:
        source: the data.
        store: with labels of exactly these samples, None: there is none.
    """

    def __init__(self, source: Source, store: Store | None = None) -> None:
        self.source, self._store = source, store
        self.keys = source.key_table()
        self._found_N, self._known_N = np.zeros(len(self.keys), np.uint64), np.zeros(len(self.keys), np.bool_)

    def find(self, samples_R: I64) -> U64:
        """Those of some samples, uint64 (R,), 0 for none."""
        new_R = samples_R[~self._known_N[samples_R]]
        if self._store is not None:
            self._found_N[new_R] = _hash_stored(self._store, self.keys.take(new_R))
        unread_R = new_R[self._found_N[new_R] == 0]
        for start in range(0, len(unread_R), _CHUNK):
            part = unread_R[start : start + _CHUNK]
            raws = [sample.raw for sample in self.source.read(part)]
            self._found_N[part] = hashes_of(raws, self.source.inputs.content_hash)
        self._known_N[new_R] = True
        return self._found_N[samples_R]


class ReadSamples:
    """Samples of a source.

    Args:
        hashes: of all its samples.
        chosen_N: indices into the source; None: all.
    """

    def __init__(self, hashes: SourceHashes, chosen_N: I64 | None = None) -> None:
        self._hashes, source, keys = hashes, hashes.source, hashes.keys
        self._chosen_N = np.arange(len(keys)) if chosen_N is None else chosen_N
        self.fingerprint, self.place = source.fingerprint(), _find_place(source.name)
        self.hashed_as = HashedAs.of_source(source)
        self.keys = keys if len(self._chosen_N) == len(keys) else keys.take(self._chosen_N)

    def hash(self, rows_R: I64) -> U64:
        return self._hashes.find(self._chosen_N[rows_R])

    def count_tokens(self, rows_R: I64) -> I64:
        lengths_N = self._hashes.source.lengths
        assert lengths_N is not None
        return lengths_N[self._chosen_N[rows_R]].astype(np.int64)


def count_trained(
    folder: Path, samples: Samples, *, stores: Sequence[Store] = (), sources: Sequence[Source] = ()
) -> Overlap:
    """Count the samples that a run was trained on.

    Args:
        folder: of the run.
        samples: N of them.
        stores, sources: open ones, one of which it may have been trained with.
    """
    trained_N, by_keys_N = (np.zeros(len(samples.keys), np.bool_) for _ in range(2))
    known, untold = True, False
    for run in _list_continued(folder):
        identity = recorded_identity(run)
        untold = _starts_otherwise(identity)
        found = _mark_trained(run, identity, samples, stores, sources)
        if found is None:
            known = False
            continue
        by_keys_N = (by_keys_N | found.by_keys) & ~(trained_N & ~by_keys_N) & ~(found.trained & ~found.by_keys)
        trained_N |= found.trained
    count = int(trained_N.sum())
    return Overlap(trained=count if known or count else None, by_keys=int(by_keys_N.sum()), untold=untold)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Marks:
    """bool (N,) each, see `Overlap`."""

    trained: Mask
    by_keys: Mask


def _list_continued(folder: Path) -> Iterator[Path]:
    """Yield a run and those that it started from."""
    for _ in range(_CONTINUED):
        yield folder
        try:
            spec = parse_spec(str(recorded_identity(folder).get("student")))
        except SpecError:
            return
        if spec.kind != "run":
            return
        folder = Path(spec.name)


def _starts_otherwise(identity: Mapping[str, Any]) -> bool:
    """Whether a run started from weights that no run made, or from weights that are not known."""
    try:
        spec = parse_spec(str(identity["student"]))
    except (KeyError, SpecError):
        return True
    return spec.kind != "run" and spec.starts_trained


def _mark_trained(
    run: Path, identity: Mapping[str, Any], samples: Samples, stores: Sequence[Store], sources: Sequence[Source]
) -> _Marks | None:
    """Mark the samples that one run was trained on; None where that is not known."""
    fingerprint = identity.get(DATA_KEYS)
    if not isinstance(fingerprint, str):
        return None
    try:
        config = recorded_config(run)
    except TrainingError:
        config = {}
    store = _find_store(identity.get("store"), config.get("labels"), stores)
    with_store = None if store is None else StoredSamples(store)
    found = next((one for one in sources if one.fingerprint() == fingerprint), None)
    data: Source | None = None
    if store is None or (found is None and store.run.dataset.fingerprint != fingerprint):
        data = _open_data(config.get("data"), fingerprint)
    whole = data or found
    if whole is not None:
        then: Samples = ReadSamples(SourceHashes(whole, store))
    elif with_store is not None:
        then = with_store
    elif fingerprint == samples.fingerprint:
        all_N = np.ones(len(samples.keys), np.bool_)
        return _Marks(trained=all_N, by_keys=all_N)
    else:
        return None
    if store is not None:
        marks = _compare_all(samples, then.keys, _hash_stored(store, then.keys), HashedAs.of_store(store))
    else:
        marks = _compare_common(samples, then, readable=data is not None)
    if whole is None and store is not None and store.run.dataset.fingerprint != fingerprint:
        # It was trained on a part of the store, or on more: only samples that are not in it are known.
        is_part = identity.get("missing", "error") == "error"
        return marks if is_part and not marks.trained.any() else None
    return marks


def _find_store(wanted: Any, place: Any, stores: Sequence[Store]) -> Store | None:
    """Return the store that a run was trained with, by its id."""
    if not isinstance(wanted, str):
        return None
    for store in stores:
        if store.manifest.store_id == wanted:
            return store
    if not isinstance(place, str):
        return None
    try:
        opened = open_store(place, verify="sizes")
        return opened if opened.manifest.store_id == wanted else None
    except (SoftLabelError, OSError):
        return None


def _open_data(place: Any, fingerprint: str) -> Source | None:
    """Open the data that a run was given, if it is there and has the same keys still."""
    if not isinstance(place, str | list):
        return None
    try:
        source = open_source(place)
        return source if source.fingerprint() == fingerprint else None
    except (SoftLabelError, OSError):
        return None


def _find_place(name: Any) -> str | None:
    try:
        return absolute_source(name) if isinstance(name, str) else None
    except SpecError:
        return None


def _hash_stored(store: Store, keys: Keys) -> U64:
    """Hashes of the labelled samples that have these keys, uint64 (T,), 0 for none."""
    rows_T = store.lookup(keys, missing="mask")
    found_T = np.zeros(len(keys), np.uint64)
    found_T[rows_T >= 0] = store.content[rows_T[rows_T >= 0]]
    return found_T


def _find_common(keys: Keys, of: Keys) -> I64:
    """Where each key is among others, int64 (N,), -1 for none."""
    one_T = np.zeros(len(of), np.int32)
    return KeyIndex(of, one_T, where="the training data")(keys, 0, one_T)


def _compare_all(samples: Samples, keys: Keys, content_T: U64, hashed_as: HashedAs) -> _Marks:
    """Compare by content, and where hashes are unknown or of something else by key.

    Args:
        keys, content_T, hashed_as: of the training data.
    """
    place_N = _find_common(samples.keys, keys)
    then_N = np.zeros(len(place_N), np.uint64)
    then_N[place_N >= 0] = content_T[place_N[place_N >= 0]]
    length = samples.hashed_as.find_whole_length(hashed_as)
    if length is None or not content_T.any():
        return _Marks(trained=place_N >= 0, by_keys=place_N >= 0)
    all_N = np.arange(len(samples.keys))
    now_N = samples.hash(all_N)
    by_keys_N = (place_N >= 0) & ~comparable(now_N, then_N)
    if length < math.inf:
        by_keys_N |= (place_N >= 0) & (samples.count_tokens(all_N) >= length)
    # The same content under another key is the same sample too.
    trained_N = (now_N != 0) & np.isin(now_N, content_T[content_T != 0])
    return _Marks(trained=trained_N | by_keys_N, by_keys=by_keys_N & ~trained_N)


def _compare_common(samples: Samples, then: Samples, *, readable: bool) -> _Marks:
    """Compare samples of equal keys alone, as the training data itself has to be read for its hashes.

    Args:
        readable: `then` is the training data; else only its keys are.
    """
    place_N = _find_common(samples.keys, then.keys)
    trained_N = place_N >= 0
    none_N = np.zeros(len(place_N), np.bool_)
    if not readable:
        return _Marks(trained=trained_N, by_keys=trained_N)
    if then.place is not None and then.place == samples.place:
        return _Marks(trained=trained_N, by_keys=none_N)
    if then.hashed_as != samples.hashed_as:  # texts and their tokens have other hashes
        return _Marks(trained=trained_N, by_keys=trained_N)
    by_keys_N = none_N
    common = np.flatnonzero(trained_N)
    # A spread part first: where all of it is the same, the rest is too.
    part = common[np.unique(np.linspace(0, max(0, len(common) - 1), _CHUNK).astype(np.int64))[: len(common)]]
    for rows_R in (part, np.setdiff1d(common, part)):
        now_R, then_R = samples.hash(rows_R), then.hash(place_N[rows_R])
        known_R = comparable(now_R, then_R)
        by_keys_N[rows_R] = ~known_R
        trained_N[rows_R] = ~known_R | (now_R == then_R)
        if trained_N[part].all() and not by_keys_N[part].any():
            break
    return _Marks(trained=trained_N, by_keys=by_keys_N)
