"""Training a student: what it computes, what it leaves behind, and that an interruption changes nothing."""

import json
import math
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import softlabel
from softlabel import train
from softlabel.errors import DataError, MismatchError, MissingKeyError, TrainingError, UsageError
from softlabel.evaluation.plots import plot_runs
from softlabel.loader import SoftLabelLoader
from softlabel.models import build_model
from softlabel.models.teacher import student_preprocessing
from softlabel.views import CropFlip
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.stores import draw_logits, write_logits
from tests.support.training_runs import (
    ROWS,
    STUDENT,
    finish_training,
    have_equal_weights,
    make_config,
    make_keys,
    make_settings,
    read_history,
    read_weights,
    start_training,
    wait_for_file,
    write_digits,
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


# ---- what it computes ----


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_equals_a_plain_loop(digits: Path, tmp_path: Path, optimizer: str) -> None:
    """The same steps written out in plain torch: schedule, loss and optimiser by their formulas, float64."""
    lr = 0.05 if optimizer == "sgd" else 0.002
    student = "python:tests.support.students:build_smooth_student?resize=none"
    given = make_config(
        digits,
        tmp_path / "run",
        student=student,
        epochs=2,
        optimizer=optimizer,
        lr=lr,
        warmup_epochs=0.5,
        temperature=2.0,
        seed=5,
    )
    result = train(given)

    torch.manual_seed(5)
    model = build_model(student, num_classes=10)
    loader = SoftLabelLoader(
        digits / "data.parquet", digits / "store", batch_size=32, seed=5, tail="drop", augment=CropFlip(padding=4)
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    if optimizer == "sgd":
        optimiser: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
    else:
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=5e-4)
    steps, warmup = 2 * len(loader), round(0.5 * len(loader))
    assert steps == 6
    done, losses = 0, []
    for _ in range(2):
        for batch in loader:
            rate = (
                lr * (done + 1) / (warmup + 1)
                if done < warmup
                else lr * (1 + math.cos(math.pi * (done - warmup) / (steps - warmup))) / 2
            )
            optimiser.param_groups[0]["lr"] = rate
            z = model((batch.inputs / 255 - mean) / std).double()
            teacher = batch.target.scaled_logits.double() * 4 / 2
            p, log_p = teacher.softmax(1), teacher.log_softmax(1)
            soft = 4 * (p * (log_p - (z / 2).log_softmax(1))).sum(1).mean()
            hard = -z.log_softmax(1).gather(1, batch.labels[:, None]).mean()
            loss = 0.9 * soft + 0.1 * hard
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            done += 1
    for name, value in read_weights(tmp_path / "run").items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-4, atol=1e-5), name
    assert [epoch.loss for epoch in result.history] == pytest.approx(
        [np.mean(losses[:3]), np.mean(losses[3:])], rel=1e-4
    )


def test_hard_labels_alone_soft_labels_alone_and_a_mix(digits: Path, tmp_path: Path) -> None:
    hard = train(make_config(digits, tmp_path / "hard", labels=None))
    assert hard.history[-1].soft_loss is None
    assert hard.history[-1].hard_loss == pytest.approx(hard.history[-1].loss)
    soft = train(make_config(digits, tmp_path / "soft", data=digits / "unlabelled.parquet"))
    assert soft.history[-1].hard_loss is None
    assert soft.history[-1].train_accuracy is None
    assert soft.history[-1].loss == pytest.approx(0.9 * soft.history[-1].soft_loss)
    images, labels = make_digit_jpegs()
    more = write_parquet(
        tmp_path / "more.parquet",
        images[: ROWS + 40],
        keys=make_keys(ROWS + 40),
        labels=labels[: ROWS + 40],
        class_names=DIGITS,
    )
    both = train(make_config(digits, tmp_path / "mixed", data=more, missing="hard-only"))
    assert both.history[-1].step == 3 * (160 // 32)
    assert np.isfinite(both.history[-1].loss)


def test_soft_labels_teach_what_hard_labels_are_not_there_to_teach(digits: Path, tmp_path: Path) -> None:
    train(make_config(digits, tmp_path / "run", data=digits / "unlabelled.parquet", epochs=25, lr=0.05, augment="none"))
    found = softlabel.evaluate(tmp_path / "run", digits / "data.parquet", digits / "store", device="cpu")
    assert found.accuracy is not None
    assert found.accuracy > 0.8
    assert found.teacher_accuracy is not None
    assert found.agreement is not None
    assert found.teacher_accuracy > 0.9


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"workers": 2}, {"augment": "none"}, {"augment": "crop"}])
def test_options_train_too(digits: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    result = train(make_config(digits, tmp_path / "run", epochs=2, **changes))
    assert result.history[1].loss < result.history[0].loss


def test_workers_do_not_change_the_weights(digits: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        train(make_config(digits, tmp_path / str(workers), epochs=2, workers=workers))
    assert have_equal_weights(tmp_path / "0", tmp_path / "2")


# ---- what it leaves behind ----


def test_a_run_folder_holds_metrics_settings_and_a_model_that_is_a_spec(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(make_config(digits, out, eval_data=digits / "data.parquet", tensorboard=True))
    assert [epoch.epoch for epoch in result.history] == [1, 2, 3]
    assert [row["epoch"] for row in read_history(out)] == ["1", "2", "3"]
    assert yaml.safe_load((out / "config.yaml").read_text())["student"] == STUDENT
    assert json.loads((out / "model.json").read_text())["num_classes"] == 10

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6, 9]
    accuracy = softlabel.evaluate(f"run:{out}", digits / "data.parquet", device="cpu").accuracy
    assert float(read_history(out)[-1]["eval_accuracy"]) == pytest.approx(accuracy)
    assert events.Scalars("eval/accuracy")[-1].value == pytest.approx(accuracy)
    # Read by torch alone, without executing anything in it.
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 3
    assert not list(out.glob("*.tmp"))

    other = tmp_path / "hard"
    train(make_config(digits, other, labels=None))
    picture = plot_runs({"distilled": out, "hard": other}, tmp_path / "curves.png", title="digits")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"metrics.csv: expected the metrics of a run"):
        plot_runs({"nothing": tmp_path / "nowhere"}, tmp_path / "none.png")


def test_a_finished_run_is_reported_and_another_one_refused(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = train(make_config(digits, out))
    before = read_weights(out)
    again = train(make_config(digits, out, workers=1))
    assert again.already_done
    assert again.history == first.history
    with pytest.raises(MismatchError, match=r"holds another run; epochs: 3 there, 4 here\. Use another --out"):
        train(make_config(digits, out, epochs=4))
    with pytest.raises(MismatchError, match=r"store: .* there, None here"):
        train(make_config(digits, out, labels=None, soft_weight=0.0))
    with pytest.raises(MismatchError, match=r"hard labels .* there"):
        train(make_config(digits, out, data=digits / "unlabelled.parquet"))
    assert all(torch.equal(before[name], value) for name, value in read_weights(out).items())
    fresh = train(make_config(digits, out, epochs=1, overwrite=True))
    assert not fresh.already_done
    assert len(read_history(out)) == 1
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "checkpoint.pt").write_bytes(b"something")
    with pytest.raises(UsageError, match="not known"):
        train(make_config(digits, tmp_path / "elsewhere"))


# ---- interruptions ----


@pytest.mark.parametrize("student", [STUDENT, "python:tests.support.students:build_dropout_student"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(digits: Path, tmp_path: Path, student: str) -> None:
    """kill -9 at random instants, several times; the weights at the end are those of a run left alone, bit for bit."""
    rest = {"student": student, "epochs": 12, "optimizer": "adamw", "lr": 0.001, "checkpoint_minutes": 1e-4}
    straight = make_settings(digits, tmp_path / "straight", **rest)
    left_alone = start_training(straight)
    killed = make_settings(digits, tmp_path / "killed", **rest)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    kills = 0
    randomness = random.Random(7)
    for _ in range(3):
        before = checkpoint.read_bytes() if checkpoint.exists() else b""
        process = start_training(killed)
        wait_for_file(checkpoint, process, before)
        time.sleep(randomness.uniform(0, 0.1))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    finish_training(killed)
    _, errors = left_alone.communicate()
    assert left_alone.returncode == 0, errors
    assert have_equal_weights(tmp_path / "straight", tmp_path / "killed")
    assert read_history(tmp_path / "straight") == read_history(tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_ctrl_c_saves_the_step_and_the_same_run_goes_on(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    given = make_settings(digits, out, epochs=200)
    process = start_training(given)
    wait_for_file(out / "checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert 0 < state["epoch"] < 200
    assert not (out / "model.json").exists()
    assert len(read_history(out)) == state["epoch"]


def test_stopping_between_steps_changes_nothing(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the middle of an epoch, in this process: the next call starts at that very step."""
    train(make_config(digits, tmp_path / "straight"))
    original = SoftLabelLoader.__iter__

    def interrupted(loader: SoftLabelLoader):  # type: ignore[no-untyped-def]
        for step, batch in enumerate(original(loader)):
            if loader.epoch == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(SoftLabelLoader, "__iter__", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(digits, tmp_path / "stopped"))
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    state = torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)
    result = train(make_config(digits, tmp_path / "stopped"))
    assert result.resumed_from == 1
    assert have_equal_weights(tmp_path / "straight", tmp_path / "stopped")
    assert read_history(tmp_path / "straight") == read_history(tmp_path / "stopped")


def test_two_processes_cannot_train_in_one_folder(digits: Path, tmp_path: Path) -> None:
    process = start_training(make_settings(digits, tmp_path / "run", epochs=500))
    wait_for_file(tmp_path / "run" / "run.json", process)
    with pytest.raises(UsageError, match="another process is training there"):
        train(make_config(digits, tmp_path / "run", epochs=500))
    process.kill()
    process.communicate()


def test_a_damaged_checkpoint_is_named(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(make_config(digits, out))
    (out / "model.json").unlink()
    checkpoint = out / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"checkpoint.pt: damaged .* --overwrite"):
        train(make_config(digits, out))


# ---- requests that cannot be ----


def test_a_loss_that_is_not_a_number_ends_the_run_clearly(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is not finite .* lower --lr"):
        train(make_config(digits, tmp_path / "run", lr=1e30, warmup_epochs=0))
    assert not (tmp_path / "run" / "model.json").exists()


def test_wrong_requests_say_what_is_wrong(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    images, labels = make_digit_jpegs()
    with pytest.raises(UsageError, match="needs soft labels; give --labels"):
        make_config(digits, out, labels=None, soft_weight=0.5)
    with pytest.raises(UsageError, match="nothing to learn from"):
        make_config(digits, out, soft_weight=0, hard_weight=0)
    with pytest.raises(UsageError, match="epochs: expected a number of at least 1, found 0"):
        make_config(digits, out, epochs=0)
    with pytest.raises(DataError, match=r"no sample has a label|no labels"):
        train(make_config(digits, out, data=digits / "unlabelled.parquet", labels=None))
    with pytest.raises(UsageError, match="fp16 trains on CUDA only"):
        train(make_config(digits, out, precision="fp16"))
    more = write_parquet(
        tmp_path / "more.parquet", images[:200], keys=make_keys(200), labels=labels[:200], class_names=DIGITS
    )
    with pytest.raises(MissingKeyError, match=r"'0120\.jpg'"):
        train(make_config(digits, out, data=more))
    eleven = write_parquet(
        tmp_path / "eleven.parquet", images[:50], keys=make_keys(50), labels=[10] * 50, class_names=[*DIGITS, "x"]
    )
    with pytest.raises(MismatchError, match=r"'0000.jpg' has label 10, .* 10 classes"):
        train(make_config(digits, out, data=eleven))
    with pytest.raises(MismatchError, match="expected 10 classes as in the target, found 3"):
        train(
            make_config(digits, out, student="python:tests.support.students:build_three_class_student", overwrite=True)
        )
    write_logits(tmp_path / "mixed", make_keys(ROWS), draw_logits(ROWS, 10), rule="probs", members=2)
    with pytest.raises(MismatchError, match="re-temper"):
        train(make_config(digits, out, labels=tmp_path / "mixed", temperature=1.0, overwrite=True))


def test_the_student_s_preprocessing_is_used_and_kept(digits: Path, tmp_path: Path) -> None:
    student = "zoo:cnn2?resize=8&crop=8&mean=0.1,0.2,0.3&std=1,1,1"
    train(make_config(digits, tmp_path / "run", student=student, epochs=1))
    kept = student_preprocessing(f"run:{tmp_path / 'run'}")
    assert (kept.resize, kept.crop, kept.mean) == (8, 8, (0.1, 0.2, 0.3))
