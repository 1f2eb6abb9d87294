"""Stores that lack something, are tiny or huge, or have several labels at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss

import softlabel
from softlabel.convert import convert_store
from softlabel.errors import MismatchError, StoreCorruptError, UsageError
from softlabel.report import store_pass
from softlabel.report.confusion import link
from softlabel.report.figures import Absent, Confusion, Coverage
from softlabel.report.measure import StoreFigures, measure_store
from softlabel.store.encodings import Float32, Sampled
from softlabel.store.manifest import Combine, DatasetInfo
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from tests.report import store_reference as reference
from tests.report.test_measure_store import C, N, check_pairs, draw, make_members, write
from tests.support.stores import Samples, make_run, write_store


def measure(store: Store) -> StoreFigures:
    with store:
        return measure_store(store, progress=False)


def test_drawn_classes_have_no_most_probable_one(tmp_path: Path) -> None:
    write(tmp_path / "exact", *draw()).close()
    convert_store(tmp_path / "exact", tmp_path / "store", encoding=Sampled(samples=20), progress=False)
    store = open_store(tmp_path / "store")
    rows = reference.Rows(store, judged=4.0)
    found = measure(store)
    for section in (found.agreement, found.noise, found.calibration, found.sharpness):
        assert isinstance(section, Absent)
        assert "drawn at random" in section.reason
    assert isinstance(found.confusion, Confusion)
    assert found.confusion.matrix is not None
    means = np.stack([rows.p_stored_NC[rows.labels == one].mean(axis=0) for one in range(C)])
    np.testing.assert_allclose(found.confusion.matrix, means, rtol=1e-5)


def test_without_hard_labels(tmp_path: Path) -> None:
    logits, labels = draw()
    none = np.full_like(labels, -100)
    store = write(
        tmp_path / "store", logits, none, dataset=DatasetInfo(kind="x", rows=N, fingerprint="0", has_labels=False)
    )
    rows = reference.Rows(store)
    found = measure(store)
    for section in (found.agreement, found.noise, found.calibration):
        assert isinstance(section, Absent)
        assert "hard label" in section.reason
    assert isinstance(found.confusion, Confusion)
    assert found.confusion.by == "prediction"
    top = rows.p_NC.argmax(axis=1)
    check_pairs(found.confusion, np.stack([rows.p_stored_NC[top == one].mean(axis=0) for one in range(C)]))
    assert found.about.seen == "out-of-sample"
    assert (found.coverage.with_hard_label, sum(found.coverage.class_samples)) == (0, 0)
    assert found.coverage.duplicates.conflicting == 0


@pytest.mark.parametrize("label", [2, 0, -100])
def test_a_single_row(tmp_path: Path, label: int) -> None:
    run = make_run(samples=1, classes=C, encoding=Float32())
    logits = np.arange(C, dtype=np.float32)[::-1].reshape(1, 1, C) - (C - 1)
    samples = Samples(
        keys=["a"],
        labels=np.array([label]),
        content=np.array([0], np.uint64),
        logits=logits,
        columns={"logits": logits},
    )
    write_store(tmp_path / "store", run, samples)
    found = measure(open_store(tmp_path / "store"))
    assert found.coverage.with_hard_label == (label >= 0)
    if label < 0:
        assert isinstance(found.noise, Absent)
        return
    assert not isinstance(found.agreement, Absent)
    assert not isinstance(found.noise, Absent)
    assert not isinstance(found.calibration, Absent)
    assert found.agreement.accuracy == (label == 0)
    p = np.float64(reference.softmax(logits[0, 0] * np.float64(4)))
    # The only class with a threshold is the row's own, which it just reaches.
    assert (found.noise.candidates, found.noise.share) == (0, 0.0)
    assert found.noise.thresholds[label] == pytest.approx(p[label], rel=1e-5)
    assert found.noise.thresholds.count(None) == C - 1
    curve = found.calibration.curves[0]
    assert curve.before.cross_entropy == pytest.approx(-np.log(p[label]), rel=1e-5)
    if label == 0:  # the sharper the better
        assert curve.fitted_temperature is None
        assert curve.after is None
        assert "right on all" in curve.note


def test_rows_at_their_threshold_and_classes_without_rows(tmp_path: Path) -> None:
    # Every row of a class is the same, so that each probability is its own threshold; classes 5 and 6 have no rows.
    logits = np.zeros((1, 60, 1, C), np.float32)
    labels = np.arange(60) % 5
    logits[0, np.arange(60), 0, labels] = 3 + labels
    logits[0, :, 0, 6] = np.where(labels == 4, 20, 0)  # class 6 is the most probable one and has no threshold
    found = measure(write(tmp_path / "store", logits, labels))
    assert not isinstance(found.noise, Absent)
    assert not isinstance(found.agreement, Absent)
    assert not isinstance(found.confusion, Absent)
    assert found.noise.candidates == 0
    assert found.noise.thresholds[5:] == (None, None)
    assert found.agreement.class_accuracy == (1.0, 1.0, 1.0, 1.0, 0.0, None, None)
    assert found.confusion.matrix is not None
    assert not any(found.confusion.matrix[5])
    assert [merge[2] for merge in found.confusion.merges][-2:] == pytest.approx([1.0, 1.0])


def test_masked_classes(tmp_path: Path) -> None:
    logits, labels = draw()
    logits[:, ::3, :, 4] = -np.inf
    store = write(tmp_path / "store", logits, labels)
    rows = reference.Rows(store)
    found = measure(store)
    assert not isinstance(found.sharpness, Absent)
    assert not isinstance(found.calibration, Absent)
    assert found.sharpness.at[0].mean_entropy == pytest.approx(reference.entropy(rows.p_NC).mean(), rel=1e-5)
    has = (rows.labels >= 0) & (rows.p_NC[np.arange(len(rows.labels)), np.maximum(rows.labels, 0)] > 0)
    assert has.sum() < (rows.labels >= 0).sum()
    expected = log_loss(rows.labels[has], rows.p_NC[has], labels=range(C))
    assert found.calibration.curves[0].before.cross_entropy == pytest.approx(expected, rel=1e-4)


def test_ten_thousand_classes_in_shards_of_one_class_each(tmp_path: Path) -> None:
    classes, rows = 10_000, 64
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (1, rows, 1, classes)).astype(np.float32)
    labels = np.repeat([3, 9_999, 17, 4_000], 16)  # a shard has 16 rows
    logits[0, np.arange(rows), 0, np.where(np.arange(rows) % 4 == 0, 5_000, labels)] += 12
    store = write(tmp_path / "store", logits, labels)
    reference_rows = reference.Rows(store)
    found = measure(store)
    assert not isinstance(found.agreement, Absent)
    assert not isinstance(found.noise, Absent)
    assert not isinstance(found.confusion, Absent)
    right = reference_rows.p_NC.argmax(axis=1) == reference_rows.labels
    assert found.agreement.accuracy == right.mean()
    assert found.noise.candidates == 0  # class 5,000 has no rows, so that it is no suggestion
    assert (found.confusion.matrix, found.confusion.merges) == (None, ())
    for label, other, p in found.confusion.pairs:
        here = reference_rows.labels == label
        assert p == pytest.approx(reference_rows.p_stored_NC[here, other].mean(), rel=1e-5)
    means = np.stack([reference_rows.p_stored_NC[reference_rows.labels == one].mean(axis=0) for one in set(labels)])
    means[range(4), list(set(labels))] = 0
    largest = np.sort(means.ravel())[::-1][:50]
    assert [p for *_, p in found.confusion.pairs] == pytest.approx(largest, rel=1e-5)


def test_figures_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_pass, "SAMPLE_BYTES", 100 * 4 * C)
    store = write(tmp_path / "store", *draw(views=2))
    rows = reference.Rows(store)
    found = measure(store)
    chosen = np.setdiff1d(store_pass.choose_samples(N, 50), (11, 17))
    keys = {f"k{one:05d}" for one in chosen.tolist()}
    inside = np.array([key in keys for key in rows.keys])
    assert found.about.measured == inside.sum() == 2 * len(chosen)
    assert not isinstance(found.sharpness, Absent)
    assert found.sharpness.at[0].mean_entropy == pytest.approx(reference.entropy(rows.p_NC[inside]).mean(), rel=1e-5)
    assert not isinstance(found.agreement, Absent)
    assert found.agreement.labelled == (rows.labels >= 0).sum()


def test_hard_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    logits, labels = draw()
    labels[40] = C
    with pytest.raises(MismatchError, match="expected 0 to 6, the teachers' classes, found 7"):
        measure(write(tmp_path / "store", logits, labels))


def test_equal_distances_and_two_classes() -> None:
    assert link(np.array([[0.0, 0.25], [0.25, 0.0]])) == ((0, 1, 0.25, 2),)
    merges = link(1.0 - np.eye(4))
    assert [merge[2] for merge in merges] == [1.0, 1.0, 1.0]
    assert sorted(one for merge in merges for one in merge[:2]) == list(range(6))
    assert link(np.zeros((1, 1))) == ()


def make_multi_hot(root: Path, members: int = 1) -> tuple[Store, NDArray[np.int8], NDArray[np.float64]]:
    """A store of independent sigmoids: its labels (N, C) and probabilities (N, C) at temperature 1."""
    rng = np.random.default_rng(0)
    hot = rng.integers(0, 2, (N, C)).astype(np.int8)
    hot[rng.random((N, C)) < 0.1] = -1
    hot[::20] = -1
    logits = (rng.normal(0, 2, (N, members, C)) + 2 * np.where(hot == 1, 1, -1)[:, None]).astype(np.float32)
    changes: dict[str, Any] = {"combine": Combine(rule="keep", weights=(0.7, 0.3))} if members > 1 else {}
    run = make_run(
        samples=N, classes=C, encoding=Float32(), activation="sigmoid", members=make_members(members, C), **changes
    )
    samples = Samples.of(run)
    content = samples.content.copy()
    content[:4] = 1, 1, 2, 2
    hot[0], hot[1] = hot[1], hot[1]
    stored = {"logits": (logits / 4).reshape(1, N, -1)}
    write_store(root, run, replace(samples, columns=stored, content=content, multi_hot=hot, labels=np.full(N, -100)))
    p = 1 / (1 + np.exp(-np.float64(logits)))
    return open_store(root), hot, np.einsum("nmc,m->nc", p, np.array(run.combine.weights or (1.0,)))


@pytest.mark.parametrize("members", [1, 2])
def test_independent_sigmoids(tmp_path: Path, members: int) -> None:
    store, hot, p = make_multi_hot(tmp_path / "store", members)
    found, known = measure(store), hot >= 0
    assert not isinstance(found.agreement, Absent)
    assert not isinstance(found.calibration, Absent)
    assert not isinstance(found.sharpness, Absent)
    assert not isinstance(found.confusion, Absent)
    right = (p > 0.5) == (hot == 1)
    assert found.agreement.labelled == known.any(axis=1).sum()
    assert found.agreement.accuracy == pytest.approx(right[known].mean())
    assert found.agreement.top5 is None
    assert found.agreement.class_rows == tuple(known.sum(axis=0))
    p_label = np.where(hot == 1, p, 1 - p)
    for one in range(C):
        assert found.agreement.class_accuracy[one] == pytest.approx(right[known[:, one], one].mean())
        assert found.agreement.class_p_label[one] == pytest.approx(p_label[known[:, one], one].mean(), rel=1e-5)
    assert isinstance(found.noise, Absent)
    curve = found.calibration.curves[0].before
    assert len(found.calibration.curves) == (1 if members == 1 else 3)
    counts, error = reference.reliability(p[known], hot[known] == 1)
    assert curve.counts == tuple(counts)
    assert curve.calibration_error == pytest.approx(error, abs=1e-5)
    assert curve.cross_entropy == pytest.approx(log_loss(hot[known], p[known]), rel=1e-4)
    at_one = next(one for one in found.sharpness.at if one.temperature == 1.0)
    nats = reference.entropy(np.stack([p.ravel(), 1 - p.ravel()], axis=1)).reshape(N, C).mean(axis=1)
    assert at_one.mean_entropy == pytest.approx(nats.mean(), rel=1e-4)
    assert at_one.one_hot == pytest.approx(((p > 0.999) | (p < 0.001)).mean())
    assert at_one.entropy.edges[-1] == pytest.approx(np.log(2))
    stored = 1 / (1 + np.exp(-np.log(p / (1 - p)) / 4)) if members == 1 else None
    if stored is not None:
        assert found.confusion.matrix is not None
        means = np.stack([stored[hot[:, one] == 1].mean(axis=0) for one in range(C)])
        np.testing.assert_allclose(found.confusion.matrix, means, rtol=1e-4)
    assert found.coverage.class_samples == tuple((hot == 1).sum(axis=0))
    assert found.coverage.with_hard_label == known.any(axis=1).sum()
    assert (found.coverage.duplicates.groups, found.coverage.duplicates.conflicting) == (2, 1)
    store = open_store(tmp_path / "store")
    assert measure(store) == found


@pytest.mark.parametrize(("activation", "wrong"), [("softmax", np.nan), ("softmax", np.inf), ("sigmoid", np.nan)])
def test_labels_that_are_not_finite_are_named_and_nothing_is_measured_of_them(
    tmp_path: Path, activation: str, wrong: float
) -> None:
    """Of a store that was opened without a check of its values; with one it is refused."""
    run = make_run(samples=20, classes=4, activation=activation)
    logits = np.zeros((1, 20, 4), np.float16)
    logits[0, 3:5, 1] = wrong
    hot = {"multi_hot": np.ones((20, 4), np.int8), "labels": np.full(20, -100)} if activation == "sigmoid" else {}
    write_store(tmp_path / "labels", run, replace(Samples.of(run), columns={"logits": logits}, **hot))
    page = tmp_path / "page.html"
    with pytest.raises(StoreCorruptError):
        softlabel.write_report(tmp_path / "labels", out=page, progress=False)
    store = open_store(tmp_path / "labels", verify="sizes")
    found = softlabel.write_report(store, out=page, progress=False).report
    assert isinstance(found.coverage, Coverage)
    assert found.coverage.non_finite == 2
    assert isinstance(found.agreement, Absent)
    (sentence,) = [one for one in found.summary if one.section == "coverage"]
    assert sentence.level == "act"
    assert sentence.text.startswith("2 rows hold numbers that are not finite")
    assert "2 of 20 rows of the store hold numbers that are not finite" in page.read_text()
    with pytest.raises(UsageError, match="accuracy was not measured: 2 of 20 rows"):
        softlabel.write_report(store, out=page, fail_if=["accuracy<0.9"], progress=False)
