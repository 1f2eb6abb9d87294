"""Runs and students in a report, against plain numpy on the files of small real runs and stores."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from softlabel import TrainConfig, generate, open_store, train
from softlabel.errors import DataError, MismatchError, SoftLabelError, SpecError, UsageError
from softlabel.models import build_model
from softlabel.report.figures import Reliability
from softlabel.report.runs import describe_runs, make_grid, read_runs
from softlabel.report.student_figures import Comparison
from softlabel.report.students import compare_students
from tests.inputs.test_tensor_samples import LABELS, MODULE, TABLE, build_mlp, write_weights
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, decode_by_pillow, make_digit_jpegs
from tests.support.stores import draw_logits, make_run, write_logits, write_store
from tests.support.texts import plain_logits, save_classifier
from tests.support.training_runs import ROWS, make_config, make_keys, read_history, write_digits

HELD_OUT = 60
Numbers = NDArray[np.float64]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.parquet and its store; eval.parquet with samples that have no label; eval-store without some rows."""
    folder = write_digits(tmp_path_factory.mktemp("digits"))
    images, labels = make_digit_jpegs()
    images, labels = images[ROWS : ROWS + HELD_OUT], labels[ROWS : ROWS + HELD_OUT]
    keys = [f"held-out/{number}" for number in range(HELD_OUT)]
    known = [None if number % 7 == 0 else label for number, label in enumerate(labels)]
    write_parquet(folder / "eval.parquet", images, keys=keys, labels=known, class_names=DIGITS)
    logits_NC = draw_logits(HELD_OUT, 10, seed=5)
    logits_NC[np.arange(HELD_OUT), labels] += 6
    np.save(folder / "eval.npy", logits_NC)
    kept = [number for number in range(HELD_OUT) if number % 5]
    write_logits(
        folder / "eval-store",
        [keys[number] for number in kept],
        logits_NC[kept],
        images=[images[number] for number in kept],
        class_names=DIGITS,
    )
    return folder


@pytest.fixture(scope="module")
def grid(digits: Path) -> Path:
    settings = {"temperature": [1.0, 4.0], "soft_weight": [0.0, 0.5, 0.9], "eval_data": digits / "eval.parquet"}
    train(make_config(digits, digits / "grid", **settings, epochs=2))
    return digits / "grid"


def answer(run: Path, images: list[bytes]) -> Numbers:
    """The student's logits, its images prepared by hand: these are 16 x 16 as it takes them."""
    made = json.loads((run / "model.json").read_text())["preprocessing"]
    pixels = np.stack([decode_by_pillow(image) for image in images]) / 255
    mean, std = (np.array(made[name])[:, None, None] for name in ("mean", "std"))
    model = build_model(f"run:{run}").eval()
    with torch.inference_mode():
        return model(torch.from_numpy((pixels - mean) / std).float()).double().numpy()


def mean_or_none(values: Numbers) -> object:
    return None if not len(values) else pytest.approx(values.mean(), rel=1e-6)


def assert_reliable(found: Reliability | None, logits_NC: Numbers, labels: NDArray[np.int64]) -> None:
    p = softmax(logits_NC, axis=1)
    right, confidence = p.argmax(axis=1) == labels, p.max(axis=1)
    assert found is not None
    for place in range(15):
        inside = (confidence > place / 15) & (confidence <= (place + 1) / 15)
        assert found.counts[place] == inside.sum()
        assert found.confidence[place] == mean_or_none(confidence[inside])
        assert found.accuracy[place] == mean_or_none(right[inside])
    gaps = [n * abs(a - c) for n, a, c in zip(found.counts, found.accuracy, found.confidence, strict=True) if n]
    assert found.calibration_error == pytest.approx(sum(gaps) / len(labels), abs=1e-9)
    log_p = log_softmax(logits_NC, axis=1)
    assert found.cross_entropy == pytest.approx(-log_p[np.arange(len(labels)), labels].mean(), rel=1e-6)


def assert_comparison(
    found: Comparison,
    student_NC: Numbers,
    scaled_NC: Numbers,
    labels: NDArray[np.int64],
    keys: list[str],
    *,
    temperature: float,
    known: NDArray[np.bool_] | None = None,
    judged: float = 1.0,
) -> None:
    """Every field; `scaled_NC` are the teacher's logits over the temperature, of the samples that are `known`."""
    known = np.ones(len(labels), np.bool_) if known is None else known
    labelled = labels >= 0
    classes = student_NC.shape[1]
    assert (found.samples, found.with_teacher) == (len(labels), known.sum())
    right = student_NC.argmax(axis=1) == labels
    assert found.accuracy == mean_or_none(right[labelled])
    if labelled.any():
        assert_reliable(found.student, student_NC[labelled], labels[labelled])
    else:
        assert found.student is None
    # From here on: samples with a row.
    z, y = student_NC[known], labels[known]
    keys = [key for key, one in zip(keys, known, strict=True) if one]
    top, best = scaled_NC.argmax(axis=1), z.argmax(axis=1)
    log_p, log_q = log_softmax(scaled_NC, axis=1), log_softmax(z / temperature, axis=1)
    nats = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    has_label = y >= 0
    assert found.teacher_accuracy == mean_or_none((top == y)[has_label])
    assert found.agreement == pytest.approx((top == best).mean())
    assert found.divergence == pytest.approx(nats.mean(), rel=1e-4)
    groups = y if has_label.any() else top
    for c in range(classes):
        assert found.class_agreement[c] == mean_or_none((top == best)[groups == c])
        of_class = nats[groups == c]
        assert found.class_divergence[c] == (None if not len(of_class) else pytest.approx(of_class.mean(), rel=1e-4))
    p = softmax(scaled_NC * temperature / judged, axis=1)
    entropy = -np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0.0).sum(axis=1) / np.log(classes)
    for place, value in enumerate(found.divergence_by_entropy):
        inside = np.minimum((entropy * 10).astype(int), 9) == place
        assert value == (None if not inside.any() else pytest.approx(nats[inside].mean(), rel=1e-4))
    if not has_label.any():
        assert (found.joint, found.teacher, found.corners) == (None, None, ())
        return
    if judged == 1:
        assert_reliable(found.teacher, scaled_NC[has_label] * temperature, y[has_label])
    else:
        assert found.teacher is None
    rows = np.flatnonzero(has_label)
    p_label = p[rows, y[rows]]
    q = softmax(z / judged, axis=1)
    q_label = q[rows, y[rows]]
    edges = np.linspace(0, 1, 21)
    assert np.array_equal(np.array(found.joint), np.histogram2d(p_label, q_label, bins=(edges, edges))[0])
    gap = np.abs(p_label - q_label)
    assert [corner.name for corner in found.corners] == [
        "both right",
        "teacher alone right",
        "student alone right",
        "both wrong",
    ]
    for corner in found.corners:
        inside = (top[rows] == y[rows]) == (corner.name in ("both right", "teacher alone right"))
        inside &= (best[rows] == y[rows]) == (corner.name in ("both right", "student alone right"))
        order = np.flatnonzero(inside)[np.argsort(-gap[inside], kind="stable")][:24]
        assert corner.count == inside.sum()
        assert [example.key for example in corner.examples] == [keys[rows[place]] for place in order]
        for example, place in zip(corner.examples, order, strict=True):
            row = rows[place]
            assert (example.view, example.label, example.suggestion) == (0, y[row], top[row])
            assert example.p_label == pytest.approx(p_label[place], rel=1e-5)
            assert example.p_suggestion == pytest.approx(p[row].max(), rel=1e-5)
            assert example.score == pytest.approx(-gap[place], abs=1e-6)
            assert example.student == best[row]
            assert example.p_student == pytest.approx(q_label[place], rel=1e-5)


def read_scaled(store: Path) -> Numbers:
    opened = open_store(store)
    return opened.take(range(len(opened))).scaled_logits.astype(np.float64)


def test_every_figure_of_students_on_both_data(digits: Path, grid: Path) -> None:
    images, labels = make_digit_jpegs()
    found = compare_students(
        [grid],
        digits / "store",
        digits / "data.parquet",
        eval_data=digits / "eval.parquet",
        eval_labels=digits / "eval-store",
        batch_size=23,
        device="cpu",
    )
    runs = read_runs([grid])
    assert len(runs) == 5  # without a soft term there is no temperature
    assert [one.run for one in found.comparisons] == [str(run.folder) for run in runs for _ in range(2)]
    held_labels = np.array(labels[ROWS : ROWS + HELD_OUT])
    held_labels[::7] = -100
    known = np.arange(HELD_OUT) % 5 > 0
    for run, on_data, on_eval in zip(runs, found.comparisons[::2], found.comparisons[1::2], strict=True):
        assert (on_data.data, on_data.held_out) == (str(digits / "data.parquet"), False)
        assert (on_eval.data, on_eval.held_out) == (str(digits / "eval.parquet"), True)
        assert_comparison(
            on_data,
            answer(run.folder, images[:ROWS]),
            read_scaled(digits / "store"),
            np.array(labels[:ROWS]),
            make_keys(ROWS),
            temperature=4.0,
        )
        assert_comparison(
            on_eval,
            answer(run.folder, images[ROWS : ROWS + HELD_OUT]),
            read_scaled(digits / "eval-store"),
            held_labels,
            [f"held-out/{number}" for number in range(HELD_OUT)],
            temperature=4.0,
            known=known,
        )
    assert f"12 of 60 samples of {digits}/eval.parquet have no row in {digits}/eval-store" in " ".join(found.notes)
    # Neither the batch size nor the company changes a figure.
    alone = compare_students([runs[1].folder], digits / "store", digits / "data.parquet", device="cpu").comparisons[0]
    assert alone.corners == replace(found.comparisons[2], run=alone.run).corners


def test_settings_curves_and_the_grid(grid: Path) -> None:
    runs = read_runs([grid])
    facts = describe_runs(runs)
    for run, fact in zip(runs, facts, strict=True):
        history = read_history(run.folder)
        assert fact.run == str(run.folder)
        assert fact.curves["eval_accuracy"] == tuple((float(h["epoch"]), float(h["eval_accuracy"])) for h in history)
        assert fact.final["eval_accuracy"] == float(history[-1]["eval_accuracy"])
        assert fact.final["loss"] == float(history[-1]["loss"])
        assert "soft_loss" in fact.final or fact.settings["soft_weight"] == "0"
        assert fact.settings["student"] == "zoo:cnn2?resize=16&crop=16"
        assert "batch_size" not in fact.settings  # is the same for all
    by_name = {run.folder.name: fact for run, fact in zip(runs, facts, strict=True)}
    assert by_name["soft0"].settings["temperature"] == "none"
    assert by_name["T4-soft0.9"].settings["hard_weight"] == "0.1"
    found, notes = make_grid(runs)
    assert found is not None
    assert not notes
    assert (found.metric, found.row_setting, found.rows) == ("eval_accuracy", "temperature", ("1", "4"))
    assert (found.column_setting, found.columns) == ("soft_weight", ("0", "0.5", "0.9"))
    for row, temperature in enumerate(("T1", "T4")):
        for column, name in enumerate(("soft0", f"{temperature}-soft0.5", f"{temperature}-soft0.9")):
            assert found.values[row][column] == by_name[name].final["eval_accuracy"]
    # A part of the students is a grid with gaps, those of one setting are none.
    part, _ = make_grid(read_runs([grid / "T1-soft0.5", grid / "T4-soft0.9", grid / "T1-soft0.9"]))
    assert part is not None
    assert part.values[1][0] is None
    assert make_grid(read_runs([grid / "T1-soft0.5", grid / "T1-soft0.9"])) == (None, [])
    alone = compare_students([grid])
    assert alone.grid == found
    command = f"softlabel report {grid.parent}/store --runs {grid} --data {grid.parent}/data.parquet"
    assert alone.notes[0].endswith(f": {command}")


def test_a_grid_over_three_settings_shows_the_best_of_the_third(digits: Path, tmp_path: Path) -> None:
    settings = {"temperature": [1.0, 4.0], "soft_weight": [0.5, 0.9], "lr": [0.003, 0.03], "epochs": 1}
    train(make_config(digits, tmp_path / "grid", **settings))
    found, notes = make_grid(read_runs([tmp_path / "grid"]))
    assert found is not None
    assert (found.metric, found.rows, found.columns) == ("train_accuracy", ("1", "4"), ("0.5", "0.9"))
    for row, temperature in enumerate((1, 4)):
        for column, weight in enumerate((0.5, 0.9)):
            names = [f"lr{lr}-T{temperature}-soft{weight}" for lr in (0.003, 0.03)]
            values = [float(read_history(tmp_path / "grid" / name)[-1]["train_accuracy"]) for name in names]
            assert found.values[row][column] == max(values)
    assert notes == ["the grid shows the best student of each cell over lr"]


def test_a_student_with_its_best_weights_has_the_figures_of_that_epoch(digits: Path, tmp_path: Path) -> None:
    eval_data = digits / "eval.parquet"
    train(make_config(digits, tmp_path / "run", epochs=4, select="best", lr=0.1, eval_data=eval_data))
    history = read_history(tmp_path / "run")
    accuracy = [float(epoch["eval_accuracy"]) for epoch in history]
    (facts,) = describe_runs(read_runs([tmp_path / "run"]))
    assert facts.final["eval_accuracy"] == max(accuracy)
    assert facts.final["loss"] == float(history[int(np.argmax(accuracy))]["loss"])
    (found,) = compare_students([tmp_path / "run"], eval_data=eval_data, device="cpu").comparisons
    assert found.accuracy == pytest.approx(max(accuracy))


@pytest.mark.parametrize("augment", ["crop-flip", "mixup"])
def test_students_see_the_views_that_their_teacher_saw(digits: Path, grid: Path, tmp_path: Path, augment: str) -> None:
    data = str(digits / "data.parquet")
    student = grid / "T4-soft0.9"
    fixed = {"views": 2, "augment": augment, "encoding": "float32", "device": "cpu"}
    generate(data, teachers=[f"run:{student}"], out=tmp_path / "labels", **fixed)  # type: ignore[arg-type]
    found = compare_students([student], tmp_path / "labels", data, device="cpu")
    (one,) = found.comparisons
    # The student is its own teacher here: on the same views it says the same.
    assert (one.agreement, one.with_teacher) == (1.0, ROWS)
    assert one.divergence == pytest.approx(0, abs=1e-6)
    assert "compared on view 0 of each sample" in found.notes[0]
    if augment == "mixup":
        assert found.notes[0].endswith("which has no hard label where two samples are mixed")
        assert sum(corner.count for corner in one.corners) < ROWS / 2
        return
    opened = open_store(tmp_path / "labels")
    first = opened.take(np.flatnonzero(opened.views == 0))
    right = first.scaled_logits.argmax(axis=1) == first.labels
    assert one.accuracy == one.teacher_accuracy == pytest.approx(right.mean())


def test_a_run_that_is_not_finished_is_described_and_not_compared(digits: Path, grid: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(grid / "T1-soft0.9", tmp_path / "runs/whole")
    begun = shutil.copytree(grid / "T4-soft0.9", tmp_path / "runs/begun")
    (begun / "model.json").unlink()
    failed = shutil.copytree(begun, tmp_path / "runs/failed")
    (failed / "failed.json").write_text(json.dumps({"reason": "the loss is nan"}))
    found = compare_students([tmp_path / "runs"], digits / "store", digits / "data.parquet", device="cpu")
    assert {one.run for one in found.runs} == {str(whole), str(begun), str(failed)}
    assert [one.run for one in found.comparisons] == [str(whole)]
    assert any(note.startswith(f"{begun} is not finished (2 of 2 epochs)") for note in found.notes)
    assert f"{failed} was given up: the loss is nan" in found.notes


def test_held_out_data_without_labels_of_the_teacher_names_the_command(digits: Path, grid: Path) -> None:
    run = grid / "T4-soft0.9"
    found = compare_students([run], digits / "store", eval_data=digits / "eval.parquet", device="cpu")
    (one,) = found.comparisons
    images, labels = make_digit_jpegs()
    held_labels = np.array(labels[ROWS : ROWS + HELD_OUT])
    held_labels[::7] = -100
    logits_NC = answer(run, images[ROWS : ROWS + HELD_OUT])
    assert one.accuracy == pytest.approx((logits_NC.argmax(axis=1) == held_labels)[held_labels >= 0].mean())
    assert_reliable(one.student, logits_NC[held_labels >= 0], held_labels[held_labels >= 0])
    assert (one.samples, one.with_teacher, one.agreement, one.divergence, one.joint, one.corners) == (
        HELD_OUT,
        0,
        None,
        None,
        None,
        (),
    )
    assert set(one.class_agreement) == {None}
    command = f"softlabel generate --data {digits}/eval.parquet --teacher test --temperature 4"
    assert found.notes[0].endswith(
        f"; give --eval-labels {digits}/store-eval after: {command} --out {digits}/store-eval"
    )
    trained_on = compare_students([run], digits / "store", eval_data=digits / "data.parquet", device="cpu")
    assert not trained_on.comparisons[0].held_out


def test_stores_that_determine_one_temperature_or_no_top_class(digits: Path, grid: Path, tmp_path: Path) -> None:
    images, labels = make_digit_jpegs()
    images, labels = images[:ROWS], labels[:ROWS]
    logits_NC = draw_logits(ROWS, 10, seed=9)
    write_logits(tmp_path / "probs", make_keys(ROWS), logits_NC, images=images, labels=labels, rule="probs", members=2)
    run = grid / "T4-soft0.9"
    found = compare_students([run], tmp_path / "probs", digits / "data.parquet", device="cpu")
    assert_comparison(
        found.comparisons[0],
        answer(run, images),
        read_scaled(tmp_path / "probs"),
        np.array(labels),
        make_keys(ROWS),
        temperature=4.0,
        judged=4.0,
    )
    assert "determines the teacher's probabilities at T = 4 alone" in found.notes[0]
    unlabelled = compare_students([run], digits / "store", digits / "unlabelled.parquet", device="cpu").comparisons[0]
    assert_comparison(
        unlabelled,
        answer(run, images),
        read_scaled(digits / "store"),
        np.full(ROWS, -100),
        make_keys(ROWS),
        temperature=4.0,
    )


def train_on(data: str, labels: Path, student: str, out: Path) -> Path:
    config = {"augment": "none", "epochs": 1, "batch_size": 16, "lr": 0.01, "device": "cpu", "tensorboard": False}
    train(TrainConfig(data=data, labels=str(labels), student=student, out=str(out), **config))  # type: ignore[arg-type]
    return out


def test_students_of_arrays_and_a_store_that_keeps_its_members(tmp_path: Path) -> None:
    np.savez(tmp_path / "table.npz", x=TABLE, y=LABELS)
    data = f"{tmp_path}/table.npz?inputs=x&labels=y"
    specs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        write_weights(build_mlp, tmp_path / f"{seed}.safetensors")
        specs.append(f"python:{MODULE}:build_mlp@{tmp_path}/{seed}.safetensors")
    fixed = {"encoding": "float32", "temperature": 2.0, "device": "cpu", "combine": "keep"}
    generate(data, teachers=specs, out=tmp_path / "labels", **fixed)  # type: ignore[arg-type]
    run = train_on(data, tmp_path / "labels", f"python:{MODULE}:build_mlp", tmp_path / "run")
    (found,) = compare_students([run], tmp_path / "labels", data, device="cpu").comparisons
    with torch.inference_mode():
        student_NC = build_model(f"run:{run}").eval()(torch.from_numpy(TABLE).float()).double().numpy()
    scaled_NMC = read_scaled(tmp_path / "labels")
    mixed_NC = np.log(softmax(scaled_NMC, axis=-1).mean(axis=1))
    at_one_NC = np.log(softmax(scaled_NMC * 2, axis=-1).mean(axis=1))
    assert found.agreement == pytest.approx((at_one_NC.argmax(axis=1) == student_NC.argmax(axis=1)).mean())
    log_q = log_softmax(student_NC / 2, axis=1)
    assert found.divergence == pytest.approx((np.exp(mixed_NC) * (mixed_NC - log_q)).sum(axis=1).mean(), rel=1e-4)
    assert_reliable(found.teacher, at_one_NC, LABELS)


def test_students_of_texts(tmp_path: Path) -> None:
    teacher = save_classifier(tmp_path / "teacher")
    texts = [f"a film that {word} {number}" for number in range(10) for word in ("moves", "is dull", "delights")]
    labels = np.arange(len(texts)) % 3
    pq.write_table(
        pa.table({"id": [f"s{n}" for n in range(30)], "text": texts, "label": labels}), tmp_path / "t.parquet"
    )
    data = str(tmp_path / "t.parquet")
    fixed = {"encoding": "float32", "temperature": 1.0, "device": "cpu", "batch_size": 8}
    generate(data, teachers=[f"text:{teacher}"], out=tmp_path / "labels", **fixed)  # type: ignore[arg-type]
    student = save_classifier(tmp_path / "student", seed=1)
    run = train_on(data, tmp_path / "labels", f"text:{student}", tmp_path / "run")
    (found,) = compare_students([run], tmp_path / "labels", data, device="cpu", batch_size=7).comparisons
    scaled_NC = plain_logits(teacher, texts).double().numpy()
    assert found.teacher_accuracy == pytest.approx((scaled_NC.argmax(axis=1) == labels).mean())
    assert_reliable(found.teacher, scaled_NC, labels)
    assert found.samples == found.with_teacher == 30
    assert sum(corner.count for corner in found.corners) == 30


def test_independent_outputs_are_refused_in_one_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "table.npz", x=TABLE, y=LABELS)
    data = f"{tmp_path}/table.npz?inputs=x"
    write_weights(build_mlp, tmp_path / "1.safetensors")
    spec = f"python:{MODULE}:build_mlp@{tmp_path}/1.safetensors"
    generate(data, teachers=[spec], out=tmp_path / "labels", activation="sigmoid", device="cpu")
    run = train_on(data, tmp_path / "labels", f"python:{MODULE}:build_mlp", tmp_path / "run")
    found = compare_students([run], tmp_path / "labels", data, device="cpu")
    assert (len(found.runs), found.comparisons) == (1, ())
    (note,) = found.notes
    assert note.endswith(f": softlabel evaluate --data '{data}' --labels {tmp_path}/labels --model {run}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"runs": ["nowhere"]}, UsageError, "nowhere is not a folder"),
        ({"runs": ["store"]}, DataError, "store: expected the folder of a run"),
        ({"runs": ["broken"]}, DataError, "metrics.csv: expected one row an epoch"),
        ({"store": "eight"}, MismatchError, "T4-soft0.9: the student has 10 classes, .*eight has 8"),
        ({"store": "nowhere"}, SoftLabelError, "nowhere"),
        ({"data": "eval.parquet"}, DataError, "none of its 60 samples has a row in"),
        ({"eval_labels": "eval-store"}, UsageError, "give --eval-data SOURCE"),
        ({"data": "nowhere.parquet"}, SpecError, "nowhere.parquet"),
    ],
)
def test_mistakes_are_one_line(
    digits: Path, grid: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    if not (digits / "eight").exists():
        write_store(digits / "eight", make_run(samples=ROWS, classes=8))
        shutil.copytree(grid / "soft0", digits / "broken")
        (digits / "broken/metrics.csv").write_text("epoch,loss\n1,nothing\n")
    given = {"runs": ["grid/T4-soft0.9"], "store": "store", "data": "data.parquet", **change}
    paths = {name: str(digits / str(value)) for name, value in given.items() if name != "runs"}
    runs = [digits / str(one) for one in given["runs"]]  # type: ignore[attr-defined]
    with pytest.raises(error, match=message) as caught:
        compare_students(runs, **paths, device="cpu")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
