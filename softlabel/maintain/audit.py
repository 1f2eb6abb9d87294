"""Compare stored labels with the teachers' logits today.

Legend: B rows, C classes, M members.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.generation.features import encode_features
from softlabel.generation.input_reader import DecodedBatch
from softlabel.generation.job import Job
from softlabel.generation.token_lane import TokenLane
from softlabel.inputs.content import changed_content
from softlabel.store.columns import Array
from softlabel.store.fidelity import Fidelity
from softlabel.store.manifest import Run
from softlabel.store.reader import Store
from softlabel.store.sample_rows import sample_rows
from softlabel.store.stored_rows import StoredRows
from softlabel.store.token_rows import COUNTS
from softlabel.store.view_columns import DIFFERENCE

# Tolerances of `recompute`: how much lower today's logit of the stored top class may be, relative to the largest logit
# (another device, half precision); share of rows beyond that; nats, in addition to the loss of the encoding.
_ROUNDING = 0.02
_POSITIONS = 8  # of a document that are compared at most
_MOST_OTHERS = 0.01
_ALLOWED = {"fp32": 1e-3}
# Of features: relative to their norm.
_FEATURES_ALLOWED = {"fp32": 1e-2, "half": 5e-2, "int8": 5e-2}
_ALLOWED_BELOW = 1e-2  # in lower precision
_ALLOWED_DRAWN = 0.5  # for random draws, whose mean over a few hundred rows is far from the expectation


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """Comparison of stored rows with today's, in scaled logits with each row's maximum at 0.

    Of independent sigmoids the logits are as they are, each class counts by itself, and its answer is whether it is
    more probable than not.

    Attributes:
        rows: number of rows compared.
        mean_difference: mean absolute difference over rows and classes, of encoding topk over the kept ones.
        worst_difference: largest absolute difference.
        top1_disagreement: share of rows whose top class differs.
        clearly_other: share of rows whose top class differs by more than rounding; 0 for random draws.
        nats: mean KL(today || stored) at the store's temperature; for random draws the cross entropy of today's
            distribution under them minus its entropy, which is 0 in expectation.
        allowed: nats that encoding and precision can explain.
    """

    rows: int
    mean_difference: float
    worst_difference: float
    top1_disagreement: float
    clearly_other: float
    nats: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether encoding and rounding explain the differences."""
        return self.clearly_other <= _MOST_OTHERS and abs(self.nats) <= self.allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputedFeatures:
    """Comparison of stored features with today's.

    Attributes:
        rows: number of rows compared.
        differences: by name, the mean over rows of the norm of the difference relative to the norm of today's.
        allowed: difference that storing and precision can explain.
    """

    rows: int
    differences: Mapping[str, float]
    allowed: float

    @property
    def ok(self) -> bool:
        return all(difference <= self.allowed for difference in self.differences.values())


def recompute_features(store: Store, job: Job, rows: int, *, seed: int = 0) -> RecomputedFeatures | None:
    """The same as `recompute` of what rows have beside logits, differences along noise among it; None: they have
    nothing."""
    run, lane = store.run, job.labeller.lane
    of_noise = [DIFFERENCE] if run.views.directions else []
    if run.features is None and not of_noise:
        return None
    asked, wanted_B = _draw_rows(store, job, rows, seed, [*(one.name for one in run.feature_columns), *of_noise])
    names = () if run.features is None else run.features.names
    stored: dict[str, Array] = {name: getattr(asked, name) for name in names}
    stored |= {name: asked.columns[name].astype(np.float32) for name in of_noise}
    differences: dict[str, list[float]] = {name: [] for name in stored}
    for part, batch in _iter_batches(job, asked, wanted_B):
        columns: dict[str, Tensor] = {}
        with torch.inference_mode():
            (answers,) = lane.answer_with_copies([batch])
            if run.features is not None:
                columns, _ = encode_features(run.features, lane.probes, answers.features)
            if of_noise:
                columns[DIFFERENCE] = lane.halve_differences(answers.copies)
        now = replace(asked, columns={name: column.cpu().numpy() for name, column in columns.items()})
        for name, values in stored.items():
            found = now.columns[name].astype(np.float32) if name == DIFFERENCE else getattr(now, name)
            found = found.reshape(len(part), -1)
            apart = np.linalg.norm(values[part].reshape(len(part), -1) - found, axis=1)
            differences[name] += (apart / np.maximum(np.linalg.norm(found, axis=1), 1e-12)).tolist()
    coarse = run.embedding is not None and run.embedding.type == "int8"
    exact = all(member.precision == "fp32" for member in run.members)
    return RecomputedFeatures(
        rows=len(asked),
        differences={name: float(np.mean(found)) for name, found in differences.items()},
        allowed=_FEATURES_ALLOWED["fp32" if exact else "half"] + (_FEATURES_ALLOWED["int8"] if coarse else 0.0),
    )


def _draw_rows(
    store: Store, job: Job, rows: int, seed: int, columns: Sequence[str]
) -> tuple[StoredRows, NDArray[np.int64]]:
    """Random rows, and the places of their samples in the data."""
    if rows < 1:
        raise UsageError(f"recompute: expected at least 1 row, found {rows}")
    drawn_B = np.sort(np.random.default_rng(seed).choice(len(store), size=min(rows, len(store)), replace=False))
    asked = sample_rows(store, drawn_B, ["key", "content", *columns])
    position = {key: index for index, key in enumerate(job.labeller.source.keys())}
    return asked, np.array([position[key] for key in asked.keys], np.int64)


def recompute(store: Store, job: Job, rows: int, *, seed: int = 0) -> Recomputed:
    """Run the teachers again on random rows and compare.

    Args:
        store: an open store.
        job: its teachers and data, see `reload_job`.
        rows: number of rows.
        seed: of the choice of rows.

    Raises:
        UsageError: `rows` is not positive.
        MismatchError: an image is not the one that was labelled.
    """
    beside = [] if store.run.tokens is None else list(COUNTS.values())
    labels = [one.name for one in store.run.label_columns]
    asked, wanted_B = _draw_rows(store, job, rows, seed, [*beside, *labels])
    stored, now, columns = (_label_rows if store.run.tokens is None else _label_positions)(job, asked, wanted_B)
    if store.run.activation == "sigmoid":
        return _compare_sigmoids(stored, now, _choose_allowed(store.run, store.manifest.totals.fidelity))
    stored -= stored.max(axis=-1, keepdims=True)
    now -= now.max(axis=-1, keepdims=True)
    drawn = store.run.encoding.drawn
    log_stored, log_now = _log_softmax(stored), _log_softmax(now)
    if drawn:
        nats = _cross_entropy(log_stored, log_now) - _cross_entropy(log_now, log_now)
    else:
        nats = _cross_entropy(log_now, log_stored) - _cross_entropy(log_now, log_now)
    below = -np.take_along_axis(now, stored.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    largest = np.abs(np.where(np.isfinite(now), now, 0.0)).max(axis=-1)
    finite = np.isfinite(stored) & np.isfinite(now)
    difference = np.abs(np.where(finite, stored - now, 0.0))
    if store.run.encoding.sparse and not drawn:  # what is stored of the others is their sum alone
        index = columns["index"].astype(np.int64).reshape(*difference.shape[:-1], -1)
        difference = np.take_along_axis(difference, index, axis=-1)
    return Recomputed(
        rows=len(stored),
        mean_difference=float(difference.mean()),
        worst_difference=float(difference.max()),
        top1_disagreement=float((stored.argmax(axis=-1) != now.argmax(axis=-1)).mean()),
        clearly_other=0.0 if drawn else float((below > _ROUNDING * (1 + largest)).mean()),
        nats=float(nats.mean()),
        allowed=_choose_allowed(store.run, store.manifest.totals.fidelity),
    )


def _compare_sigmoids(stored: NDArray[np.float64], now: NDArray[np.float64], allowed: float) -> Recomputed:
    difference = np.abs(stored - now)
    other = (stored > 0) != (now > 0)
    largest = np.abs(now).max(axis=-1, keepdims=True)
    on, off = -np.logaddexp(0, -now), -np.logaddexp(0, now)
    nats = np.exp(on) * (on + np.logaddexp(0, -stored)) + np.exp(off) * (off + np.logaddexp(0, stored))
    return Recomputed(
        rows=len(stored),
        mean_difference=float(difference.mean()),
        worst_difference=float(difference.max()),
        top1_disagreement=float(other.mean()),
        clearly_other=float((other & (np.abs(now) > _ROUNDING * (1 + largest))).mean()),
        nats=float(nats.mean()),
        allowed=allowed,
    )


def _cross_entropy(log_shares: NDArray[np.float64], log_others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cross entropy of the second distribution under the first, over the last axis, with 0 log 0 = 0."""
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(log_shares), 0.0, -np.exp(log_shares) * log_others)
    nats: NDArray[np.float64] = terms.sum(axis=-1)
    return nats


def _choose_allowed(run: Run, fidelity: Fidelity | None) -> float:
    if run.encoding.drawn:
        return _ALLOWED_DRAWN
    rounding = max(_ALLOWED.get(member.precision, _ALLOWED_BELOW) for member in run.members)
    return rounding + (0.0 if fidelity is None else fidelity.worst_t)


def _log_softmax(scaled_logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log softmax over the last axis of rows whose maximum is 0."""
    logs: NDArray[np.float64] = scaled_logits - np.log(np.exp(scaled_logits).sum(axis=-1, keepdims=True))
    return logs


def _iter_batches(
    job: Job, asked: StoredRows, wanted_B: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], DecodedBatch]]:
    """Yield (places among the rows, their samples) of batches of one view.

    Raises:
        MismatchError: a sample is not the one that was labelled.
    """
    size = job.labeller.batch_size
    for view in np.unique(asked.views).tolist():
        places = np.flatnonzero(asked.views == view)
        for start in range(0, len(places), size):
            part = places[start : start + size]
            yield part, _read_batch(job, wanted_B[part].tolist(), view, asked.content[part])


def _label_rows(
    job: Job, asked: StoredRows, wanted_B: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], dict[str, Array]]:
    """Scaled logits as stored and as the teachers give them now, and the stored columns."""
    stored = np.asarray(asked.scaled_logits, dtype=np.float64)
    now = np.empty_like(stored)
    for part, batch in _iter_batches(job, asked, wanted_B):
        (scaled,) = job.labeller.lane.scaled_logits(batch)
        now[part] = scaled.double().cpu().numpy()
    return stored, now, asked.columns


def _label_positions(
    job: Job, asked: StoredRows, wanted_B: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], dict[str, Array]]:
    """The same of a few positions of each document."""
    lane = job.labeller.lane
    assert isinstance(lane, TokenLane)
    starts_B = np.cumsum([0, *asked.positions])
    stored, now, found_columns = [], [], []
    for part, batch in _iter_batches(job, asked, wanted_B):
        for found, ordinals_P in lane.sample_positions(batch, _POSITIONS):
            rows_P = starts_B[part[found.documents.numpy()]] + ordinals_P
            columns = {one.name: asked.columns[one.name][rows_P] for one in asked.run.label_columns}
            found_columns.append(columns)
            stored.append(replace(asked, columns=columns).scaled_logits.astype(np.float64))
            now.append(lane.combine(found.logits).double().cpu().numpy())
    if not stored:
        raise UsageError("recompute: the chosen documents have no labelled position; give a larger number of rows")
    names = found_columns[0]
    together = {name: np.concatenate([one[name] for one in found_columns]) for name in names}
    return np.concatenate(stored), np.concatenate(now), together


def _read_batch(job: Job, samples: Sequence[int], view: int, stored_B: NDArray[np.uint64]) -> DecodedBatch:
    batch = job.labeller.reader.batch(samples, view=view)
    if batch.bad:
        raise MismatchError(
            f"sample {batch.bad[0].key!r}: was labelled, but cannot be decoded now: {batch.bad[0].reason}"
        )
    changed = np.flatnonzero(changed_content(batch.content, stored_B))
    if len(changed):
        raise MismatchError(
            f"sample {batch.keys[int(changed[0])]!r} is not the one that was labelled (its content differs); give the "
            "data that was labelled as --data"
        )
    return batch
