"""Members against each other and views against each other, against plain numpy on small stores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from softlabel import open_store
from softlabel.report.ensemble import measure_ensemble
from softlabel.report.examples import ExampleReader
from softlabel.report.figures import Absent, Ensemble, Views
from softlabel.report.measure import measure_store
from softlabel.report.probabilities import LabelReader
from softlabel.report.store_pass import run_pass
from softlabel.report.views import ViewMeter
from softlabel.store.encodings import Sampled, TopK
from softlabel.store.manifest import Combine, DatasetInfo, Member
from softlabel.store.reader import Store
from tests.support.stores import Samples, make_run, write_store

SAMPLES, CLASSES = 90, 6
SPECS = ("zoo:resnet8", "zoo:resnet8", "zoo:resnet20")
BAD = (4, 40)


def make_members(rule: str, specs: tuple[str, ...] = SPECS, **changes: object) -> dict[str, object]:
    members = tuple(Member(spec=spec, sha256=f"{place:064d}", num_classes=CLASSES) for place, spec in enumerate(specs))
    weights = (1 / len(specs),) * len(specs)
    return {"members": members, "combine": Combine(rule=rule, weights=weights), "classes": CLASSES, **changes}


def write_kept(root: Path, *, temperature: float = 4.0, labelled: bool = True) -> tuple[Store, Samples]:
    """Two members that agree in most rows and one that is worse; two samples are bad."""
    run = make_run(samples=SAMPLES, temperature=temperature, **make_members("keep"))
    samples = Samples.of(run, seed=3)
    rng = np.random.default_rng(0)
    noise_NMC = rng.normal(size=(SAMPLES, 3, CLASSES)) * np.array([0.5, 0.5, 4])[:, None]
    logits_NMC = rng.normal(0, 1, (SAMPLES, 1, CLASSES)) + noise_NMC
    labels = samples.labels if labelled else np.full(SAMPLES, -100)
    logits_NMC[np.arange(SAMPLES), :, np.maximum(labels, 0)] += 2
    scaled_NMC = (logits_NMC - logits_NMC.max(axis=2, keepdims=True)) / temperature
    columns = {"logits": scaled_NMC.reshape(1, SAMPLES, -1).astype(np.float16)}
    made = Samples(keys=samples.keys, labels=labels, content=samples.content, logits=samples.logits, columns=columns)
    write_store(root, run, made, BAD)
    return open_store(root), made


def measure_members(store: Store, **options: int) -> Ensemble | Absent:
    reader = LabelReader(store)
    return measure_ensemble(run_pass(store, reader, [], progress=False, **options), ExampleReader(store, reader))


def measure_views(store: Store, sample_rows: int = 50_000, **options: int) -> Views | Absent:
    meter = ViewMeter(store.run, **options)
    reader = LabelReader(store)
    sample = run_pass(store, reader, [meter], sample_rows=sample_rows, progress=False)
    return meter.result(sample, ExampleReader(store, reader))


def mean_nats(p: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    return float(-np.log(p[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
def test_every_figure_of_an_ensemble(tmp_path: Path, labelled: bool) -> None:
    store, made = write_kept(tmp_path / "store", labelled=labelled)
    found = measure_store(store, progress=False).ensemble
    assert isinstance(found, Ensemble)
    good = np.setdiff1d(np.arange(SAMPLES), BAD)
    logits_NMC = made.columns["logits"][0, good].astype(np.float64).reshape(len(good), 3, CLASSES) * 4
    log_p, p, y = log_softmax(logits_NMC, axis=2), softmax(logits_NMC, axis=2), made.labels[good]
    known = y >= 0
    assert (found.rows, found.names) == (len(good), ("zoo:resnet8 (1)", "zoo:resnet8 (2)", "zoo:resnet20"))
    mean = p.mean(axis=1)
    top = p.argmax(axis=2)
    for i in range(3):
        for j in range(3):
            assert found.agreement[i][j] == pytest.approx((top[:, i] == top[:, j]).mean())
            nats = (p[:, i] * (log_p[:, i] - log_p[:, j])).sum(axis=1).mean()
            assert found.divergence[i][j] == pytest.approx(nats, rel=1e-5, abs=1e-12)
    information = entropy(mean, axis=1) - entropy(p, axis=2).mean(axis=1)
    edges = np.linspace(0, np.log(3), 31)
    assert found.disagreement.edges == pytest.approx(edges)
    assert found.disagreement.counts == tuple(np.histogram(information, bins=edges)[0])
    assert found.mean_disagreement == pytest.approx(information.mean(), rel=1e-5)
    order = np.argsort(-information, kind="stable")[:60]
    assert [one.key for one in found.examples] == [made.keys[good[row]] for row in order]
    for one, row in zip(found.examples, order, strict=True):
        assert one.score == pytest.approx(-information[row], rel=1e-4)
        assert one.suggestion == mean[row].argmax()
        assert one.members_agreeing == (top[row] == one.suggestion).sum()
        assert one.label == (y[row] if y[row] >= 0 else None)
    if not labelled:
        nothing = (None, None, None)
        assert (found.accuracy, found.without_accuracy, found.without_cross_entropy) == (nothing, nothing, nothing)
        assert (found.all_accuracy, found.all_cross_entropy, found.droppable) == (None, None, None)
        return
    assert found.all_accuracy == pytest.approx((mean.argmax(axis=1) == y)[known].mean())
    assert found.all_cross_entropy == pytest.approx(mean_nats(mean[known], y[known]), rel=1e-5)
    for member in range(3):
        assert found.accuracy[member] == pytest.approx((top[:, member] == y)[known].mean())
        assert found.cross_entropy[member] == pytest.approx(mean_nats(p[known, member], y[known]), rel=1e-5)
        rest = np.delete(p, member, axis=1).mean(axis=1)
        assert found.without_accuracy[member] == pytest.approx((rest.argmax(axis=1) == y)[known].mean())
        assert found.without_cross_entropy[member] == pytest.approx(mean_nats(rest[known], y[known]), rel=1e-5)
    assert found.droppable == 2


def test_an_ensemble_is_measured_on_a_part_of_a_large_store(tmp_path: Path) -> None:
    store, _ = write_kept(tmp_path / "store")
    found = measure_members(store, sample_rows=20)
    assert isinstance(found, Ensemble)
    assert 15 <= found.rows <= 20
    assert found == measure_members(store, sample_rows=20)


VIEWS = 3


def write_views(root: Path, **changes: object) -> tuple[Store, Samples]:
    """Views of one sample resemble each other; in every ninth, view 1 has lost the object."""
    run = make_run(samples=SAMPLES, classes=CLASSES, views=VIEWS, **changes)
    samples = Samples.of(run, seed=7)
    rng = np.random.default_rng(1)
    logits_VNC = rng.normal(0, 1, (1, SAMPLES, CLASSES)) + rng.normal(0, 0.4, (VIEWS, SAMPLES, CLASSES))
    label_N = np.maximum(samples.labels, 0)
    logits_VNC[:, np.arange(SAMPLES), label_N] += 3
    logits_VNC[1, ::9, :] = rng.normal(0, 1, (len(range(0, SAMPLES, 9)), CLASSES))
    logits_VNC[1, np.arange(0, SAMPLES, 9), label_N[::9]] = -3
    scaled_VNC = (logits_VNC - logits_VNC.max(axis=2, keepdims=True)) / run.temperature
    made = Samples(keys=samples.keys, labels=samples.labels, content=samples.content, logits=scaled_VNC)
    write_store(root, run, made, BAD)
    return open_store(root), made


def test_every_figure_of_views(tmp_path: Path) -> None:
    store, made = write_views(tmp_path / "store")
    found = measure_store(store, progress=False).views
    assert isinstance(found, Views)
    good = np.setdiff1d(np.arange(SAMPLES), BAD)
    y = made.labels[good]
    p = softmax(made.logits[:, good].astype(np.float16).astype(np.float64) * 4, axis=2)
    top, mean = p.argmax(axis=2), p.mean(axis=0)
    nats = (p * np.log(p / mean)).sum(axis=2)
    assert (found.samples, found.sampled) == (len(good), len(good))
    assert found.agreement == pytest.approx((top == top[0]).all(axis=0).mean())
    assert found.flips == pytest.approx((top != mean.argmax(axis=1)).mean())
    assert found.divergence == pytest.approx(nats.mean(), rel=1e-4)
    p_label = p[:, np.arange(len(good)), np.maximum(y, 0)]
    assert found.lost == ((p_label.min(axis=0) < 0.1 * p_label.max(axis=0)) & (y >= 0)).sum() > 5
    order = np.argsort(-nats.mean(axis=0), kind="stable")[:60]
    assert [one.key for one in found.examples] == [made.keys[good[row]] for row in order]
    for one, row in zip(found.examples, order, strict=True):
        suggestion = mean[row].argmax()
        wanted = y[row] if y[row] >= 0 else suggestion
        assert (one.view, one.suggestion) == (p[:, row, wanted].argmin(), suggestion)
        assert one.views_agreeing == (top[:, row] == suggestion).sum()
        assert one.score == pytest.approx(-nats[:, row].mean(), rel=1e-4)
        assert one.p_suggestion == pytest.approx(p[one.view, row, suggestion], rel=1e-5)


def test_views_of_a_large_store_are_measured_on_a_part(tmp_path: Path) -> None:
    store, made = write_views(tmp_path / "store")
    part = measure_views(store, sample_rows=60, most_samples=30)
    assert isinstance(part, Views)
    followed = [row for row in range(0, SAMPLES, 3) if row not in BAD]
    assert part.samples == len(followed)
    top = made.logits[:, followed].argmax(axis=2)
    assert part.agreement == pytest.approx((top == top[0]).all(axis=0).mean())
    assert 10 <= part.sampled <= 20


def test_what_cannot_be_compared_says_why_and_what_to_do(tmp_path: Path) -> None:
    one = make_run(samples=20, classes=CLASSES)
    write_store(tmp_path / "one", one)
    mean = make_run(samples=20, **make_members("probs"))
    write_store(tmp_path / "mean", mean)
    for name, ensemble, views in (
        ("one", "give several --teacher to 'softlabel generate --combine keep'", "--views 4 --augment crop-flip"),
        ("mean", "holds the mean of its 3 members", "one view of each sample"),
    ):
        store = open_store(tmp_path / name)
        for found, text in ((measure_members(store), ensemble), (measure_views(store), views)):
            assert isinstance(found, Absent)
            assert text in found.reason
            assert "\n" not in found.reason


UNLABELLED = DatasetInfo(kind="test", rows=20, fingerprint="0" * 32, has_labels=False)


@pytest.mark.parametrize(
    ("changes", "columns", "reason"),
    [
        (
            {"activation": "sigmoid", "dataset": UNLABELLED},
            {"logits": ("<f2", CLASSES)},
            "no single most probable class",
        ),
        (
            {"encoding": Sampled(samples=4, draw="independent")},
            {"index": ("|u1", 4), "weight": ("<f4", 4)},
            "classes drawn at random",
        ),
    ],
    ids=["independent outputs", "drawn classes"],
)
def test_labels_without_a_most_probable_class(
    tmp_path: Path, changes: dict[str, object], columns: dict[str, tuple[str, int]], reason: str
) -> None:
    run = make_run(samples=20, views=2, **make_members("keep", SPECS[:2], **changes))
    samples = Samples.of(run)
    stored = {name: np.full((2, 20, 2 * width), 0.25).astype(dtype) for name, (dtype, width) in columns.items()}
    write_store(tmp_path / "store", run, replace(samples, columns=stored, multi_hot=None))
    store = open_store(tmp_path / "store")
    for found in (measure_members(store), measure_views(store)):
        assert isinstance(found, Absent)
        assert reason in found.reason
        assert ";" in found.reason  # and what to do


def test_a_class_that_a_member_rules_out(tmp_path: Path) -> None:
    """Of largest classes alone what is left out is spread evenly; of a masked class the divergence is infinite."""
    run = make_run(
        samples=20, temperature=1.0, encoding=TopK(k=2, temperatures=(1.0,)), **make_members("keep", SPECS[:2])
    )
    index = np.tile(np.array([0, 1, 1, 2], np.uint8), (1, 20, 1))
    value = np.tile(np.array([0, -1, 0, -1], np.float16), (1, 20, 1))
    tail = np.tile(np.array([-2, -np.inf], np.float32), (1, 20, 1))
    samples = Samples.of(run)
    made = Samples(
        keys=samples.keys,
        labels=samples.labels,
        content=samples.content,
        logits=samples.logits,
        columns={"index": index, "value": value, "tail": tail},
    )
    write_store(tmp_path / "store", run, made)
    found = measure_members(open_store(tmp_path / "store"))
    assert isinstance(found, Ensemble)
    first = softmax([0, -1, *[-2 - np.log(4)] * 4])
    second = softmax([-np.inf, 0, -1, -np.inf, -np.inf, -np.inf])
    assert found.divergence[0] == (0.0, np.inf)
    used = second > 0
    assert found.divergence[1][0] == pytest.approx((second[used] * np.log(second[used] / first[used])).sum(), rel=1e-5)
    assert found.mean_disagreement == pytest.approx(
        entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2, rel=1e-5
    )
