"""Every number about a store against plain numpy, scipy and scikit-learn, over encodings, members and views."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

from softlabel.convert import convert_store
from softlabel.report.figures import Absent, Confusion
from softlabel.report.measure import StoreFigures, measure_store
from softlabel.store.encodings import Encoding, Float16, Float32, Head, Int8, TopK
from softlabel.store.manifest import Combine, Member
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from tests.report import store_reference as reference
from tests.support.stores import Samples, make_run, write_head_store, write_store

N, C = 400, 7


def draw(
    rows: int = N, classes: int = C, members: int = 1, views: int = 1, *, seed: int = 0, sharp: float = 3.0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits (V, N, M, C) of teachers that are often right, and labels (N,) of which some are wrong, some missing."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, rows)
    labels = np.where(rng.random(rows) < 0.15, rng.integers(0, classes, rows), true)
    labels[rng.random(rows) < 0.1] = -100
    logits = rng.normal(0, 1.5, (views, rows, members, classes)) + rng.normal(0, 0.7, (1, rows, 1, classes))
    logits[:, np.arange(rows), :, true] += sharp
    return logits.astype(np.float32), labels


def write(root: Path, logits_VNMC: NDArray[np.float32], labels: NDArray[Any], **changes: Any) -> Store:
    """Write a float32 store at temperature 4 whose rows are these logits."""
    views, rows, members, classes = logits_VNMC.shape
    settings: dict[str, Any] = {"encoding": Float32(), "members": make_members(members, classes), **changes}
    run = make_run(samples=rows, classes=classes, views=views, **settings)
    scaled = logits_VNMC / np.float32(run.temperature)
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    content = np.random.default_rng(1).integers(1, 2**63, rows, dtype=np.uint64)
    content[::9] = 0
    content[[3, 30, 31]], content[[5, 50]] = content[3], content[5]
    stored = scaled.astype(run.columns[0].numpy).reshape(views, rows, members * classes)
    samples = Samples(
        keys=[f"k{place:05d}" for place in range(rows)], labels=labels, content=content, logits=scaled,
        columns={"logits": stored},
    )  # fmt: skip
    write_store(root, run, samples, bad=(11, 17))
    return open_store(root, verify="full")


def make_members(count: int, classes: int) -> tuple[Member, ...]:
    return tuple(Member(spec=f"zoo:m{one}", sha256=f"{one:064x}", num_classes=classes) for one in range(count))


KEEP = Combine(rule="keep", weights=(0.5, 0.3, 0.2))


def converted(encoding: Encoding) -> Callable[[Path], Store]:
    def make(root: Path) -> Store:
        write(root / "exact", *draw()).close()
        convert_store(root / "exact", root / "store", encoding=encoding, progress=False)
        return open_store(root / "store")

    return make


def head(root: Path) -> Store:
    run = make_run(samples=N, classes=C, encoding=Head(width=12))
    samples, rng = Samples.of(run), np.random.default_rng(2)
    top = write_head_store(root / "first", run, samples).argmax(axis=1)
    labels = np.where(rng.random(N) < 0.3, rng.integers(0, C, N), top)
    write_head_store(root / "store", run, replace(samples, labels=np.where(samples.labels < 0, -100, labels)))
    return open_store(root / "store")


STORES: dict[str, Callable[[Path], Store]] = {
    "float16": lambda root: write(root / "store", *draw(), encoding=Float16()),
    "hdf5": lambda root: write(root / "store", *draw(), format="hdf5"),
    "many classes": lambda root: write(root / "store", *draw(700, 60)),
    "flat": lambda root: write(root / "store", *draw(sharp=0.6)),  # most rows have to be read again
    "views": lambda root: write(root / "store", *draw(views=3)),
    "members": lambda root: write(root / "store", *draw(members=3), combine=KEEP),
    "members and views": lambda root: write(root / "store", *draw(members=3, views=2), combine=KEEP),
    "mean of probabilities": lambda root: write(
        root / "store", *draw(), combine=Combine(rule="probs", weights=(0.5, 0.5)), members=make_members(2, C)
    ),
    "int8": converted(Int8()),
    "topk at 1 and 4": converted(TopK(k=3, temperatures=(1.0, 4.0))),
    "topk at 4": converted(TopK(k=3, temperatures=(4.0,))),
    "head": head,
}
# Where the labels of temperature 1 do not follow from the store.
AT_STORED = {"mean of probabilities", "topk at 4"}


def rows_of(name: str, store: Store) -> reference.Rows:
    found = reference.Rows(store, judged=4.0 if name in AT_STORED else 1.0)
    if name == "topk at 1 and 4":  # the tail at 1 is known by itself
        run, columns = store.run, store.take(range(len(store))).columns
        at_one = {**columns, "value": columns["value"].astype(np.float32) * 4}
        found.logits_NMC = np.float64(run.encoding.decode(at_one, num_classes=C, temperature=1.0))[:, None]
        found.p_NC = found.combine(found.to_probabilities(found.logits_NMC))
    return found


@pytest.fixture(scope="module", params=STORES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = STORES[request.param](tmp_path_factory.mktemp("report"))
    figures = measure_store(store, progress=False)
    yield store, figures, rows_of(request.param, store)
    store.close()


def test_agreement(case: tuple[Store, StoreFigures, reference.Rows]) -> None:
    store, figures, rows = case
    found, labelled = figures.agreement, rows.labels >= 0
    assert not isinstance(found, Absent)
    labels, p_RC = rows.labels[labelled], rows.p_NC[labelled]
    top = p_RC.argmax(axis=1)
    classes = p_RC.shape[1]
    assert found.labelled == labelled.sum()
    assert found.accuracy == pytest.approx(accuracy_score(labels, top))
    if isinstance(store.run.encoding, TopK):  # it names three
        assert found.top5 is None
    else:
        assert found.top5 == pytest.approx(top_k_accuracy_score(labels, p_RC, k=5, labels=range(classes)))
    for one in range(classes):
        here = labels == one
        assert found.class_rows[one] == here.sum()
        assert found.class_accuracy[one] == (pytest.approx((top[here] == one).mean()) if here.any() else None)
        assert found.class_p_label[one] == (pytest.approx(p_RC[here, one].mean(), rel=1e-5) if here.any() else None)
    views = rows.views[labelled]
    expected = [(top[views == one] == labels[views == one]).mean() for one in range(store.run.views.count)]
    assert found.view_accuracy == pytest.approx(tuple(expected))


def test_noise(case: tuple[Store, StoreFigures, reference.Rows]) -> None:
    store, figures, rows = case
    found, first = figures.noise, rows.views == 0
    assert not isinstance(found, Absent)
    expected = reference.learn_confidently(rows.p_NC[first], rows.labels[first])
    assert found.judged == (rows.labels[first] >= 0).sum()
    assert found.candidates == len(expected["wrong"])
    assert found.share == pytest.approx(expected["share"], rel=1e-9)
    assert found.thresholds == pytest.approx(expected["thresholds"], rel=1e-5)
    assert [(-count, label, other) for label, other, count in found.pairs] == expected["pairs"]
    shown = found.examples
    assert len(shown) == min(400, found.candidates)
    # Probabilities that differ by less than float32 can tell may stand in either order.
    assert [one.p_label for one in shown] == pytest.approx(
        [one[0] for one in expected["wrong"][: len(shown)]], abs=2e-6
    )
    assert [one.p_label for one in shown] == sorted(one.p_label for one in shown if one.p_label is not None)
    by_key = {rows.keys[row]: (margin, row, other) for _, margin, row, other in expected["wrong"]}
    tops_NM = rows.logits_NMC.argmax(axis=2)
    combined_top = rows.p_NC.argmax(axis=1)
    for one in shown:
        margin, row, suggestion = by_key[one.key]
        assert (one.label, one.suggestion, one.view) == (rows.labels[row], suggestion, 0)
        assert one.score == pytest.approx(margin, abs=2e-6)
        assert one.p_label == pytest.approx(rows.p_NC[row, one.label], abs=2e-6)
        assert one.p_suggestion == pytest.approx(rows.p_NC[row, suggestion], abs=2e-6)
        members = int((tops_NM[row] == suggestion).sum()) if store.run.kept else None
        assert one.members_agreeing == members
        same = [at for at, key in enumerate(rows.keys) if key == one.key]
        views = int((combined_top[same] == suggestion).sum()) if store.run.views.count > 1 else None
        assert one.views_agreeing == views


def test_calibration(case: tuple[Store, StoreFigures, reference.Rows]) -> None:
    store, figures, rows = case
    found, labelled = figures.calibration, rows.labels >= 0
    assert not isinstance(found, Absent)
    labels = rows.labels[labelled]
    assert found.rows == labelled.sum()
    kept = store.run.kept
    assert [one.name for one in found.curves] == ["labels", *(m.spec for m in store.run.members if kept)]
    logits = [np.log(rows.p_NC) if kept else rows.logits_NMC[:, 0], *(rows.logits_NMC.swapaxes(0, 1) if kept else ())]
    for one, logits_NC in zip(found.curves, logits, strict=True):
        assert one.fitted_temperature is not None
        assert one.after is not None
        assert one.fitted_temperature == pytest.approx(reference.fit_temperature(logits_NC[labelled], labels), rel=1e-3)
        for curve, temperature in ((one.before, 1.0), (one.after, one.fitted_temperature)):
            p_RC = np.float64(reference.softmax(logits_NC[labelled] / temperature, axis=1))
            counts, error = reference.reliability(p_RC.max(axis=1), p_RC.argmax(axis=1) == labels)
            assert curve.counts == tuple(counts)
            assert curve.calibration_error == pytest.approx(error, abs=1e-5)
            assert curve.cross_entropy == pytest.approx(log_loss(labels, p_RC, labels=range(p_RC.shape[1])), rel=1e-4)


def test_sharpness(case: tuple[Store, StoreFigures, reference.Rows]) -> None:
    store, figures, rows = case
    found = figures.sharpness
    assert not isinstance(found, Absent)
    expected = {4.0: rows.p_stored_NC} | ({1.0: rows.p_NC} if rows.judged == 1.0 else {})
    assert [one.temperature for one in found.at] == sorted(expected)
    for one in found.at:
        nats = reference.entropy(expected[one.temperature])
        assert one.mean_entropy == pytest.approx(nats.mean(), rel=1e-4)
        assert one.effective_classes == pytest.approx(np.exp(nats).mean(), rel=1e-4)
        assert one.one_hot == (expected[one.temperature].max(axis=1) > 0.999).mean()
        assert one.entropy.edges == pytest.approx(np.linspace(0, np.log(store.run.num_classes), 31))
        counts = np.histogram(nats, 30, (0, np.log(store.run.num_classes)))[0]
        assert np.abs(np.array(one.entropy.counts) - counts).sum() <= 2  # a row at an edge
        assert sum(one.entropy.counts) == len(store)


def test_confusion(case: tuple[Store, StoreFigures, reference.Rows]) -> None:
    store, figures, rows = case
    found, classes = figures.confusion, store.run.num_classes
    assert isinstance(found, Confusion)
    assert found.by == "label"
    means = np.stack([rows.p_stored_NC[rows.labels == one].mean(axis=0) for one in range(classes)])
    if classes <= 50:
        assert found.matrix is not None
        np.testing.assert_allclose(found.matrix, means, rtol=1e-5)
    else:
        assert found.matrix is None
    check_pairs(found, means)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    tree = linkage(squareform(1 - unit @ unit.T, checks=False), "average")
    np.testing.assert_allclose([merge[2:] for merge in found.merges], tree[:, 2:], atol=1e-6)
    np.testing.assert_array_equal([merge[:2] for merge in found.merges], tree[:, :2])


def check_pairs(found: Confusion, means: NDArray[np.float64]) -> None:
    off = means.copy()
    np.fill_diagonal(off, -1)
    largest = np.sort(off.ravel())[::-1][: len(found.pairs)]
    assert len(found.pairs) == min(50, int((off > 0).sum()))
    assert [p for *_, p in found.pairs] == pytest.approx(largest, rel=1e-5)
    assert all(p == pytest.approx(means[label, other], rel=1e-5) for label, other, p in found.pairs)


def test_coverage_and_encoding(case: tuple[Store, StoreFigures, reference.Rows]) -> None:
    store, figures, rows = case
    found, first = figures.coverage, rows.views == 0
    assert found.samples == store.run.dataset.rows
    assert found.with_hard_label == (rows.labels[first] >= 0).sum()
    labelled = rows.labels[first][rows.labels[first] >= 0]
    assert found.class_samples == tuple(np.bincount(labelled, minlength=store.run.num_classes))
    assert found.bad_count == len(store.bad)
    assert found.bad == tuple(store.bad.items())
    assert found.missing == 0
    groups: dict[int, list[int]] = {}
    for row in np.flatnonzero(first & (rows.content != 0)).tolist():
        groups.setdefault(int(rows.content[row]), []).append(row)
    same = [group for group in groups.values() if len(group) > 1]
    assert found.duplicates.groups == len(same)
    assert found.duplicates.samples == sum(map(len, same))
    assert found.duplicates.compared == (first & (rows.content != 0)).sum()
    differ = [len({rows.labels[row] for row in group if rows.labels[row] >= 0}) > 1 for group in same]
    assert found.duplicates.conflicting == sum(differ)
    order = sorted(range(len(same)), key=lambda at: (not differ[at], same[at][0]))
    listed = [[one.key for one in group] for group in found.duplicates.examples]
    assert listed == [[rows.keys[row] for row in same[at]] for at in order]
    assert figures.encoding.row_bytes == sum(column.row_bytes for column in store.run.columns)
    assert figures.encoding.store_bytes == sum(record.bytes for record in store.shards)
    assert figures.about.judged_temperature == rows.judged
    assert figures.about.measured == len(store)


def test_two_passes_are_equal(case: tuple[Store, StoreFigures, reference.Rows]) -> None:
    store, figures, _ = case
    assert measure_store(store, progress=False) == figures
