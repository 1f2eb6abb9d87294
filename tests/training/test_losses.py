"""Every `--loss` while training: its presets, its labels, and its exactness over parts, processes and stacks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import softlabel
from softlabel import TrainConfig, open_store, train
from softlabel.errors import MismatchError, UsageError
from softlabel.loss import decoupled_kd, multi_level_kd
from softlabel.report.runs import describe_runs, read_runs
from softlabel.training.grid import students_of
from softlabel.training.losses import LOSSES
from softlabel.training.run_folder import recorded_config
from tests.support.commands import run_softlabel
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.training_runs import (
    ROWS,
    STUDENT,
    have_equal_weights,
    make_config,
    make_keys,
    make_settings,
    read_history,
    read_weights,
    train_in_ranks,
    write_digits,
)

SMOOTH = "python:tests.support.students:build_smooth_student?resize=16&crop=16"
NAMES = list(LOSSES)
# One student for each loss; of a batch of 31 two processes get 15 and 16 rows, and filler.
ALL = {"loss": NAMES, "student": SMOOTH, "epochs": 2, "batch_size": 31, "lr": 0.001}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As for others; of some.parquet every third sample has a label, and the store misses some rows."""
    folder = write_digits(tmp_path_factory.mktemp("digits"))
    images, labels = make_digit_jpegs()
    some = [label if number % 3 == 0 else None for number, label in enumerate(labels[: ROWS + 20])]
    write_parquet(
        folder / "some.parquet", images[: ROWS + 20], keys=make_keys(ROWS + 20), labels=some, class_names=DIGITS
    )
    return folder


def assert_near(one: Path, other: Path) -> None:
    for a, b in zip(read_history(one), read_history(other), strict=True):
        for name in ("loss", "soft_loss", "hard_loss", "train_accuracy"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-4, abs=2e-5), name
    ours, theirs = read_weights(one), read_weights(other)
    for name in ours:
        np.testing.assert_allclose(ours[name].numpy(), theirs[name].numpy(), rtol=2e-3, atol=2e-4)


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of every loss, whole batches in one process, with some labels and some soft labels."""
    out = tmp_path_factory.mktemp("whole") / "runs"
    train(make_config(digits, out, data=digits / "some.parquet", missing="hard-only", **ALL))
    return out


def test_losses_have_students_that_differ(whole: Path) -> None:
    assert [json.loads((whole / name / "run.json").read_text()).get("loss", "kd") for name in NAMES] == NAMES
    for number, name in enumerate(NAMES):
        assert float(read_history(whole / name)[-1]["soft_loss"]) > 0
        assert not any(have_equal_weights(whole / name, whole / other) for other in NAMES[:number])


def test_a_report_names_them_and_their_own_settings_make_them(whole: Path) -> None:
    runs = read_runs([str(whole)])
    shown = [facts.settings for facts in describe_runs(runs)]
    assert [settings["loss"] for settings in shown] == NAMES
    temperatures = dict(zip(NAMES, (settings["temperature"] for settings in shown), strict=True))
    assert (temperatures["kd"], temperatures["dkd"]) == ("the store's", "4")
    assert (temperatures["mse"], temperatures["mlkd"]) == ("1", "2, 3, 4, 5, 6")
    for name in NAMES:
        assert train(TrainConfig(**recorded_config(whole / name))).already_done


def test_parts_and_processes_add_up_to_the_batch(digits: Path, tmp_path: Path, whole: Path) -> None:
    rest = {"data": digits / "some.parquet", "missing": "hard-only", **ALL}
    train(make_config(digits, tmp_path / "parts", accumulate=3, **rest))
    train_in_ranks(make_settings(digits, tmp_path / "ranks", accumulate=2, **rest), ranks=2)
    for name in NAMES:
        assert_near(whole / name, tmp_path / "parts" / name)
        assert_near(whole / name, tmp_path / "ranks" / name)


def test_stacked_students_of_several_losses_are_those_alone(digits: Path, tmp_path: Path, whole: Path) -> None:
    rest = {"data": digits / "some.parquet", "missing": "hard-only", **ALL}
    train(make_config(digits, tmp_path / "stack", stack="on", **rest))
    for name in NAMES:
        assert_near(whole / name, tmp_path / "stack" / name)
    with pytest.raises(UsageError, match=r"stack: .*a loss of a batch as a whole needs the logits of all of its parts"):
        train(make_config(digits, tmp_path / "parts", stack="on", accumulate=2, **rest))


def test_a_step_minimises_the_loss_with_its_published_numbers(digits: Path, tmp_path: Path) -> None:
    """The figures of a first step, by hand from the store and the student as it begins."""
    rest = {"student": SMOOTH, "batch_size": ROWS, "epochs": 1, "augment": "none", "lr": 0.0}
    train(make_config(digits, tmp_path / "run", loss=["dkd", "mlkd"], **rest))
    store = open_store(digits / "store")
    rows = store.take(np.arange(ROWS))
    raw_NC = torch.from_numpy(rows.scaled_logits).float() * store.run.temperature
    labels_N = torch.from_numpy(rows.labels)
    logits_NC = answer(tmp_path / "run" / "dkd", digits)
    expected = {
        "dkd": float(decoupled_kd(logits_NC, raw_NC, labels_N, temperature=4.0)),
        "mlkd": float(multi_level_kd(logits_NC, raw_NC)),
    }
    hard = float(torch.nn.functional.cross_entropy(logits_NC, labels_N))
    weights = {"dkd": (1 / 20, 1.0), "mlkd": (0.9, 0.1)}  # the first of 20 epochs of warm-up
    for name, soft in expected.items():
        last = read_history(tmp_path / "run" / name)[-1]
        assert float(last["soft_loss"]) == pytest.approx(soft, rel=1e-4)
        assert float(last["loss"]) == pytest.approx(weights[name][0] * soft + weights[name][1] * hard, rel=1e-4)


def test_statistics_of_batch_norms_are_taken_once_a_step(digits: Path, tmp_path: Path) -> None:
    """A batch in parts goes forward twice for a loss of the whole batch."""
    rest = {"student": STUDENT, "accumulate": 2, "epochs": 1, "lr": 0.0, "weight_decay": 0.0}
    train(make_config(digits, tmp_path, loss=["kd", "mlkd"], **rest))
    assert have_equal_weights(tmp_path / "kd", tmp_path / "mlkd")


def answer(run: Path, digits: Path) -> torch.Tensor:
    """A student's logits, up to a constant a row, which no loss here sees."""
    store = run.with_name("answers")
    options = {"temperature": 1.0, "encoding": "float32", "device": "cpu", "progress": False}
    softlabel.generate(digits / "data.parquet", teachers=[f"run:{run}"], out=store, **options)  # type: ignore[arg-type]
    return torch.from_numpy(open_store(store).take(np.arange(ROWS)).scaled_logits).float()


def test_the_weight_of_the_soft_term_rises(digits: Path, tmp_path: Path) -> None:
    rest = {"student": SMOOTH, "batch_size": ROWS, "epochs": 4, "augment": "none", "lr": 0.0, "hard_weight": 0.0}
    result = train(make_config(digits, tmp_path / "run", soft_weight=0.8, soft_warmup=3.0, **rest))
    shares = [epoch.loss / (epoch.soft_loss or 1.0) for epoch in result.history]
    assert shares == pytest.approx([0.8 / 3, 1.6 / 3, 0.8, 0.8], rel=1e-5)


def test_presets_stand_for_what_is_absent(digits: Path, tmp_path: Path) -> None:
    def resolve(**given: object) -> list[tuple[object, ...]]:
        students = students_of(make_config(digits, tmp_path, **given))
        return [(one.name, one.temperature, one.soft_weight, one.soft_warmup, one.hard_weight) for one in students]

    assert resolve(loss="dkd") == [("cnn2", 4.0, 1.0, 20.0, 1.0)]
    assert resolve(loss="standardized", hard_weight=1.0) == [("cnn2", 2.0, 9.0, 0.0, 1.0)]
    # A loss with temperatures of its own is one student, and without a soft term one student stands for all losses.
    assert [name for name, *_ in resolve(loss=["kd", "mse"], temperature=[1.0, 2.0])] == ["kd-T1", "kd-T2", "mse"]
    assert [name for name, *_ in resolve(loss=["kd", "dkd"], soft_weight=[0.0, 1.0])] == [
        "soft0",
        "kd-soft1",
        "dkd-soft1",
    ]


def test_printed_options_make_the_same_run(digits: Path, tmp_path: Path) -> None:
    base = ["train", "--data", digits / "data.parquet", "--labels", digits / "store", "--student", SMOOTH]
    given = [*base, "--out", tmp_path / "run", "--loss", "wttm", "--epochs", 1, "--augment", "none"]
    printed = run_softlabel(*given, "--print_config").stdout
    shown = yaml.safe_load(printed)
    assert [shown[name] for name in ("temperature", "soft_weight", "soft_warmup", "hard_weight")] == [
        [5],
        [2],
        [0],
        [1],
    ]
    (tmp_path / "config.yaml").write_text(printed)
    assert "loss wttm, T = 5, soft weight 2, hard weight 1" in run_softlabel(*given).stderr
    assert "already trained" in run_softlabel("train", "--config", tmp_path / "config.yaml").stdout
    several = run_softlabel(*base, "--out", tmp_path / "two", "--loss", "dkd", "mse", "--print_config").stdout
    assert several.splitlines()[0] == "# dkd: temperature 4, soft_warmup 20, hard_weight 1"
    shown = yaml.safe_load(several)
    assert (shown["soft_weight"], shown["hard_weight"]) == ([1], None)


def test_runs_of_earlier_versions_go_on(digits: Path, tmp_path: Path) -> None:
    train(make_config(digits, tmp_path / "run", student=SMOOTH, epochs=1))
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    assert not {"loss", "soft_warmup"} & set(identity)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("encoding", ["topk", "sampled"])
def test_labels_that_a_loss_cannot_use_are_refused(
    digits: Path, tmp_path: Path, converted: dict[str, Path], name: str, encoding: str
) -> None:
    given = make_config(digits, tmp_path / "run", labels=converted[encoding], loss=name, student=SMOOTH, epochs=1)
    if name == "kd" or (name in ("js", "reverse") and encoding == "topk"):
        assert float(train(given).history[-1].soft_loss or 0) > 0
    elif name == "wttm" and encoding == "topk":  # the tail is stored at the temperature of the store
        with pytest.raises(MismatchError, match=r"loss wttm: .*its tail is known at temperature"):
            train(given)
    else:
        with pytest.raises(UsageError, match=f"loss {name}: needs .*; use --loss kd, or a store with a dense encoding"):
            train(given)
        assert not (tmp_path / "run").exists()  # where other students may be trained then


def test_top_k_labels_of_several_temperatures_have_a_power_sum(digits: Path, tmp_path: Path) -> None:
    """With every class kept they are the labels of all classes."""
    options = ["--encoding", "topk", "--top-k", 10, "--temperatures", 1, 4, 5]
    run_softlabel("convert", digits / "store", tmp_path / "topk", *options)
    rest = {"student": SMOOTH, "epochs": 1, "loss": "wttm", "confidence": "0.05:0.999"}
    for name, labels in (("topk", tmp_path / "topk"), ("dense", digits / "store")):
        train(make_config(digits, tmp_path / f"run-{name}", labels=labels, **rest))
    one, other = (read_history(tmp_path / f"run-{name}")[-1] for name in ("topk", "dense"))
    assert float(one["soft_loss"]) == pytest.approx(float(other["soft_loss"]), rel=1e-3)
    assert one["kept_share"] == other["kept_share"]


@pytest.fixture(scope="module")
def converted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    for encoding, options in (("topk", ["--top-k", 3]), ("sampled", ["--samples", 8])):
        run_softlabel("convert", digits / "store", folder / encoding, "--encoding", encoding, *options)
    return {encoding: folder / encoding for encoding in ("topk", "sampled")}


def test_mistakes_are_named(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="loss: dkd is of the soft term, which needs soft labels"):
        make_config(digits, tmp_path, labels=None, loss="dkd")
    with pytest.raises(UsageError, match="loss: soft_weight is 0"):
        make_config(digits, tmp_path, loss="dkd", soft_weight=0.0)
    with pytest.raises(UsageError, match="temperature: loss mse has temperatures of its own, found 4"):
        make_config(digits, tmp_path, loss="mse", temperature=4.0)
    with pytest.raises(UsageError, match="loss dkd: is defined by the hard label, which no sample has"):
        train(make_config(digits, tmp_path, data=digits / "unlabelled.parquet", loss="dkd", student=STUDENT))
    with pytest.raises(UsageError, match="loss: dist is of samples with one label each"):
        train(make_config(digits, tmp_path, student="lm:nowhere", batch_size=None, pack=8, loss="dist"))
