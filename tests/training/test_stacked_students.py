"""Students that train as one network: each is what it is alone, up to rounding, in weights, statistics and files."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from softlabel import TrainConfig, train
from softlabel.errors import UsageError
from softlabel.evaluation.evaluate import evaluate
from softlabel.training.run_folder import load_checkpoint
from tests.support.commands import run_softlabel
from tests.support.training_runs import (
    STUDENT,
    have_equal_weights,
    make_config,
    make_settings,
    read_history,
    start_training,
    wait_for_file,
    write_digits,
)

MODULE = "python:tests.support.students:build_{}_student?resize=16&crop=16"
DOUBLE = MODULE.format("double")
EVERYTHING = {"optimizer": "adamw", "lr": [0.001, 0.01], "weight_decay": 0.1, "ema": 0.9, "clip_norm": 0.5} | {
    "accumulate": 2,
    "schedule": "one-cycle",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def assert_equal_runs(one: Path, other: Path) -> None:
    """The same files with the same names in them, and numbers that are equal up to rounding."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    _assert_equal_states(load_checkpoint(one), load_checkpoint(other), "checkpoint")
    assert (one / "checkpoint.pt").stat().st_size == pytest.approx((other / "checkpoint.pt").stat().st_size, rel=0.01)
    for here, there in zip(read_history(one), read_history(other), strict=True):
        assert here.keys() == there.keys()
        for name, value in here.items():
            assert value == there[name] or float(value) == pytest.approx(float(there[name]), rel=1e-3, abs=1e-4), name


def _assert_equal_states(one: Any, other: Any, name: str) -> None:
    assert type(one) is type(other), name
    if isinstance(one, dict):
        assert list(one) == list(other), name
        for key in one:
            if key not in ("seconds", "images_per_second"):
                _assert_equal_states(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for number, (here, there) in enumerate(zip(one, other, strict=True)):
            _assert_equal_states(here, there, f"{name}.{number}")
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype, name
        near = 1e-5 * float(one.double().abs().max()) + 1e-9 if one.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=near, msg=lambda text: f"{name}: {text}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4), name
    else:
        assert one == other, name


@pytest.mark.parametrize(
    "grid",
    [
        {"temperature": [1.0, 4.0], "soft_weight": [0.0, 0.9], "student": DOUBLE},
        {**EVERYTHING, "student": DOUBLE},
        {
            "label_smoothing": [0.0, 0.1],
            "labels": None,
            "mixup": 0.2,
            "student": "zoo:resnet8?resize=16&crop=16",
            "lr": 1e-4,
        },
        {"weight_decay": [0.0, 0.01], "student": MODULE.format("batchwise"), "nesterov": False},
        {"optimizer": ["sgd", "adamw"], "lr": 0.001, "student": DOUBLE},
    ],
    ids=["loss weights", "all that a step may have", "mixup", "no running statistics", "two optimisers"],
)
def test_a_stacked_student_is_what_it_is_alone(digits: Path, tmp_path: Path, grid: dict[str, Any]) -> None:
    rest = {"eval_data": digits / "data.parquet", **grid}
    result = train(make_config(digits, tmp_path / "stacked", stack="on", **rest))
    train(make_config(digits, tmp_path / "turn", **rest))
    assert len(result.students) > 1
    for student in result.students:
        assert not have_equal_weights(
            tmp_path / "stacked" / student.name, tmp_path / "stacked" / result.students[0].name
        ) or (student is result.students[0])
        assert_equal_runs(tmp_path / "turn" / student.name, tmp_path / "stacked" / student.name)


def test_students_that_start_from_other_weights_are_stacked(digits: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        train(make_config(digits, tmp_path / str(seed), student=DOUBLE, seed=seed, epochs=1))
    in_a_file = DOUBLE.replace("?", f"@{tmp_path / '2' / 'model.safetensors'}?")
    grid = {"student": [DOUBLE, f"run:{tmp_path / '1'}", in_a_file], "epochs": 2}
    result = train(make_config(digits, tmp_path / "stacked", stack="on", **grid))
    train(make_config(digits, tmp_path / "turn", **grid))
    for student in result.students:
        assert_equal_runs(tmp_path / "turn" / student.name, tmp_path / "stacked" / student.name)
    measured = [evaluate(student.out, str(digits / "data.parquet")).accuracy for student in result.students]
    assert len(set(measured)) > 1
    # The file that a student's folder keeps makes that student by itself.
    settings = yaml.safe_load((Path(student.out) / "config.yaml").read_text())
    train(TrainConfig(**{**settings, "out": str(tmp_path / "again")}))
    assert_equal_runs(tmp_path / "again", Path(student.out))


def test_a_killed_stack_goes_on_stacked_or_not(digits: Path, tmp_path: Path) -> None:
    rest = {"student": DOUBLE, "temperature": [1.0, 2.0, 4.0], "lr": 0.001, "ema": 0.9}
    train(make_config(digits, tmp_path / "turn", **rest))
    killed = make_settings(digits, tmp_path / "stacked", stack="on", checkpoint_minutes=1e-4, **rest)
    process = start_training(killed)
    wait_for_file(tmp_path / "stacked" / "T2" / "checkpoint.pt", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    train(make_config(digits, tmp_path / "stacked", stack="on", **rest))
    # One student is sent back to the start, beside one that is finished and one that has to be finished.
    for name, gone in (("T1", ("checkpoint.pt",)), ("T4", ())):
        for file in ("model.json", *gone):
            (tmp_path / "stacked" / name / file).unlink()
    result = train(make_config(digits, tmp_path / "stacked", stack="off", **rest))
    assert [student.already_done for student in result.students] == [False, True, False]
    for student in result.students:
        assert_equal_runs(tmp_path / "turn" / student.name, tmp_path / "stacked" / student.name)


def test_a_student_that_falls_behind_or_fails_leaves_its_stack(digits: Path, tmp_path: Path) -> None:
    rest = {"student": DOUBLE, "warmup_epochs": 0}
    grid = {"lr": [0.003, 1e30, 0.01, 0.02], **rest}
    result = train(make_config(digits, tmp_path / "stacked", stack="on", **grid))
    assert [student.failure is not None for student in result.students] == [False, True, False, False]
    assert "the loss is not finite" in str(result.students[1].failure)
    # One of the others is made again from the start; it has nobody to be stacked with until it has caught up.
    for file in ("model.json", "model.safetensors", "checkpoint.pt"):
        (tmp_path / "stacked" / "lr0.01" / file).unlink()
    (tmp_path / "stacked" / "lr0.02" / "model.json").unlink()
    train(make_config(digits, tmp_path / "stacked", stack="on", **grid))
    for lr in (0.003, 0.01, 0.02):
        train(make_config(digits, tmp_path / "alone" / str(lr), lr=lr, **rest))
        assert_equal_runs(tmp_path / "alone" / str(lr), tmp_path / "stacked" / f"lr{lr}")


@pytest.mark.parametrize(
    ("student", "changes", "reason"),
    [
        (MODULE.format("dropout"), {}, "draws random numbers in a step"),
        (MODULE.format("branching"), {}, r"torch\.func\.vmap fails on its network \(.*data-dependent control flow"),
        (MODULE.format("counting"), {}, "the gradient of student lr0.003 in a stack differ"),
        (STUDENT, {"compile": True}, "--compile compiles single students"),
        (STUDENT, {"precision": "bf16"}, "autocast does not reach the convolutions of torch"),
        (STUDENT, {"lr": 0.01}, "there is no other student of its architecture"),
    ],
    ids=["dropout", "control flow", "hidden state", "compile", "bf16", "one student"],
)
def test_what_cannot_be_stacked_is_refused_by_name(
    digits: Path, tmp_path: Path, student: str, changes: dict[str, Any], reason: str
) -> None:
    given = {"student": student, "lr": [0.003, 0.01], "epochs": 1, **changes}
    with pytest.raises(UsageError, match=f"stack: .*: cannot be stacked: {reason}.*; leave --stack out"):
        train(make_config(digits, tmp_path / "on", stack="on", **given))


def test_auto_trains_in_turn_what_cannot_be_stacked(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit as without the option: the trial leaves no trace."""
    caplog.set_level("INFO", logger="softlabel")
    torch.set_num_threads(1)
    given = {"student": [MODULE.format("dropout"), STUDENT], "lr": [0.003, 0.01], "epochs": 2}
    result = train(make_config(digits, tmp_path / "auto", stack="auto", **given))
    assert "not stacked: build_dropout_student-lr0.003, build_dropout_student-lr0.01: draws random" in caplog.text
    train(make_config(digits, tmp_path / "off", **given))
    for student in result.students:
        if "dropout" in student.name:
            assert have_equal_weights(Path(student.out), tmp_path / "off" / student.name)
        assert_equal_runs(tmp_path / "off" / student.name, Path(student.out))


def test_a_trial_is_recorded_and_kept_to(digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="softlabel")
    out = tmp_path / "grid"
    given = {"temperature": [1.0, 4.0], "epochs": 1}
    run_softlabel(
        *("train", "--data", digits / "data.parquet", "--labels", digits / "store", "--out", out, "--epochs", 1),
        *("--student", STUDENT, "--temperature", 1, 4, "--batch-size", 32, "--lr", 0.003, "--stack", "auto"),
        *("--device", "cpu", "--tensorboard", "false"),
    )
    (found,) = json.loads((out / "stacks.json").read_text())
    assert found["students"] == ["T1", "T4"]
    assert found["device"] == "cpu"
    assert found["stacked"] == (found["stacked_ms"] < found["in_turn_ms"])
    for stacked in (True, False):
        (out / "stacks.json").write_text(json.dumps([{**found, "stacked": stacked}]))
        for name in ("T1", "T4"):
            for file in ("model.json", "checkpoint.pt"):
                (out / name / file).unlink()
        caplog.clear()
        train(make_config(digits, out, stack="auto", **given))
        assert ("stacked: T1, T4" in caplog.messages) == stacked
        assert ("by an earlier trial" in caplog.text) != stacked
