"""Several students in one pass: each is what it would be alone, and what they share is done once."""

import csv
import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from softlabel import TrainConfig, train
from softlabel.errors import TrainingError, UsageError
from softlabel.store.reader import Store
from softlabel.training.grid import students_of
from softlabel.training.metrics import EpochMetrics
from softlabel.training.summary import StudentResult, TrainResult, write_summary
from tests.support.commands import run_softlabel
from tests.support.digits import decode_by_pillow
from tests.support.training_runs import (
    STUDENT,
    finish_training,
    have_equal_weights,
    make_config,
    make_settings,
    read_history,
    start_training,
    wait_for_file,
    write_digits,
)

OTHER = "python:tests.support.students:build_dropout_student?resize=16&crop=16"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("student", [STUDENT, [STUDENT, OTHER]], ids=["several at once", "one draws random numbers"])
def test_a_student_of_a_pass_is_what_it_is_alone(digits: Path, tmp_path: Path, student: str | list[str]) -> None:
    """Bit for bit, weights and curves; also with other students' random numbers drawn in between."""
    torch.set_num_threads(1)
    grid = {"student": student, "temperature": [1.0, 4.0], "lr": [0.003, 0.01], "eval_data": digits / "data.parquet"}
    result = train(make_config(digits, tmp_path / "pass", **grid, students_at_once=2))
    assert len(result.students) == (4 if isinstance(student, str) else 8)
    for made in students_of(make_config(digits, tmp_path / "pass", **grid)):
        alone = tmp_path / "alone" / made.name
        given = {"student": made.student, "temperature": made.temperature, "lr": made.lr}
        train(make_config(digits, alone, **{**grid, **given}))
        assert have_equal_weights(Path(made.out), alone), made.name
        assert read_history(Path(made.out)) == read_history(alone), made.name


class Counting(Dataset[tuple[torch.Tensor, int]]):
    """Images as tensors, and how often each was asked for."""

    def __init__(self, digits: Path) -> None:
        import pyarrow.parquet as pq

        table = pq.read_table(digits / "data.parquet").to_pylist()
        self.images = [torch.from_numpy(decode_by_pillow(row["image"]["bytes"]).copy()) for row in table]
        self.labels = [row["label"] for row in table]
        self.keys = [row["image"]["path"] for row in table]
        self.read = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read += 1
        return self.images[index], self.labels[index]


def test_images_and_labels_are_read_once_for_all_students(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    original = Store.take

    def take(store: Store, rows, *rest, **options):  # type: ignore[no-untyped-def]
        taken.append(len(rows))
        return original(store, rows, *rest, **options)

    monkeypatch.setattr(Store, "take", take)
    reads = {}
    for name, temperatures in (("one", 4.0), ("four", [1.0, 2.0, 4.0, 8.0])):
        dataset = Counting(digits)
        taken.clear()
        given = make_config(digits, tmp_path / name, temperature=temperatures, epochs=2, cache_mb=0, augment="none")
        train(given, data=dataset, key_fn=dataset.keys.__getitem__)
        reads[name] = (dataset.read, sum(taken))
    assert reads["four"] == reads["one"]
    assert reads["one"][1] >= 2 * 96


def test_a_student_that_fails_is_dropped_and_the_others_go_on(digits: Path, tmp_path: Path) -> None:
    grid = {"lr": [0.003, 1e30, 0.01], "warmup_epochs": 0}
    result = train(make_config(digits, tmp_path / "pass", **grid))
    failed = [student for student in result.students if student.failure is not None]
    assert [student.name for student in failed] == ["lr1e+30"]
    assert "the loss is not finite" in str(failed[0].failure)
    assert "lr1e+30: given up: student" in result.table()
    assert not (tmp_path / "pass" / "lr1e+30" / "model.json").exists()
    train(make_config(digits, tmp_path / "alone", lr=0.01, warmup_epochs=0))
    assert have_equal_weights(tmp_path / "pass" / "lr0.01", tmp_path / "alone")
    again = train(make_config(digits, tmp_path / "pass", **grid))
    assert [student.already_done for student in again.students] == [True, False, True]
    assert again.students[1].failure == failed[0].failure
    with pytest.raises(TrainingError, match="the loss is not finite"):
        train(make_config(digits, tmp_path / "all", lr=[1e29, 1e30], warmup_epochs=0))


def test_more_students_join_those_that_are_done(digits: Path, tmp_path: Path) -> None:
    train(make_config(digits, tmp_path / "pass", temperature=[1.0, 4.0]))
    result = train(make_config(digits, tmp_path / "pass", temperature=[1.0, 2.0, 4.0]))
    assert [student.already_done for student in result.students] == [True, False, True]
    assert set(json.loads((tmp_path / "pass" / "students.json").read_text())) == {"T1", "T2", "T4"}


@pytest.mark.slow
def test_a_killed_pass_goes_on_as_if_nothing_had_happened(digits: Path, tmp_path: Path) -> None:
    """kill -9 at random instants, also between the checkpoints of two students of the same step."""
    rest = {"temperature": [1.0, 2.0, 4.0], "epochs": 8, "optimizer": "adamw", "lr": 0.001, "ema": 0.9}
    rest |= {"checkpoint_minutes": 1e-4, "students_at_once": 2}
    straight, killed = (
        make_settings(digits, tmp_path / "straight", **rest),
        make_settings(digits, tmp_path / "killed", **rest),
    )
    left_alone = start_training(straight)
    checkpoint = tmp_path / "killed" / "T2" / "checkpoint.pt"
    kills, randomness = 0, random.Random(11)
    for _ in range(3):
        before = checkpoint.read_bytes() if checkpoint.exists() else b""
        process = start_training(killed)
        wait_for_file(checkpoint, process, before)
        time.sleep(randomness.uniform(0, 0.05))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    finish_training(killed)
    _, errors = left_alone.communicate()
    assert left_alone.returncode == 0, errors
    for name in ("T1", "T2", "T4"):
        assert have_equal_weights(tmp_path / "straight" / name, tmp_path / "killed" / name)
        assert read_history(tmp_path / "straight" / name) == read_history(tmp_path / "killed" / name)


def test_students_at_different_steps_end_at_the_same_one(digits: Path, tmp_path: Path) -> None:
    """As a kill between two checkpoints leaves them: one is two epochs behind."""
    train(make_config(digits, tmp_path / "straight", temperature=[1.0, 4.0]))
    train(make_config(digits, tmp_path / "mixed", temperature=[1.0, 4.0]))
    for name in ("model.json", "model.safetensors", "checkpoint.pt"):
        (tmp_path / "mixed" / "T1" / name).unlink()
    result = train(make_config(digits, tmp_path / "mixed", temperature=[1.0, 4.0]))
    assert [student.already_done for student in result.students] == [False, True]
    for name in ("T1", "T4"):
        assert have_equal_weights(tmp_path / "straight" / name, tmp_path / "mixed" / name)


def test_the_command_line_makes_a_grid_a_table_and_a_picture(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    command = ["train", "--data", digits / "data.parquet", "--labels", digits / "store", "--out", out, "--epochs", 1]
    command += ["--student", STUDENT, "--student", "zoo:cnn4?resize=16&crop=16", "--temperature", 1, 4]
    command += ["--soft-weight", 0, 0.9, "--batch-size", 32, "--eval-data", digits / "data.parquet"]
    done = run_softlabel(*command)
    names = {f"cnn{n}-{rest}" for n in (2, 4) for rest in ("soft0", "T1-soft0.9", "T4-soft0.9")}
    assert names <= set(done.stdout.split())
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    with (out / "results.csv").open(newline="") as file:
        assert {row["student"] for row in csv.DictReader(file)} == names
    # The file that a student's folder keeps makes that student by itself.
    run_softlabel("train", "--config", out / "cnn2-T4-soft0.9" / "config.yaml", "--out", tmp_path / "again")
    assert have_equal_weights(out / "cnn2-T4-soft0.9", tmp_path / "again")
    with pytest.raises(UsageError, match="holds the run folders of several students"):
        train(make_config(digits, out))
    train(make_config(digits, tmp_path / "one", epochs=1))
    with pytest.raises(UsageError, match="holds the run of a single student"):
        train(make_config(digits, tmp_path / "one", temperature=[1.0, 4.0]))


def test_a_refused_run_leaves_its_folder_to_the_corrected_one(digits: Path, tmp_path: Path) -> None:
    """Refused once its data and networks are there: of one student, then of several, then neither is in the way."""
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="needs a CUDA device"):
        train(make_config(digits, out, step="graph"))
    with pytest.raises(UsageError, match="needs a CUDA device"):
        train(make_config(digits, out, step="graph", temperature=[1.0, 4.0]))
    assert [path.name for path in out.rglob("*") if path.is_file() and path.name != ".lock"] == []
    train(make_config(digits, out, epochs=1))
    (out / "model.safetensors").unlink()  # as if it had been killed after its checkpoint
    with pytest.raises(UsageError, match="needs a CUDA device"):
        train(make_config(digits, out, epochs=1, step="graph"))
    assert (out / "checkpoint.pt").exists()
    assert (out / "run.json").exists()


def test_wrong_grids_say_what_is_wrong(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"takes images of resize 8, .* students of one pass share"):
        train(make_config(digits, tmp_path / "run", student=[STUDENT, "zoo:cnn2?resize=8&crop=8"]))
    with pytest.raises(UsageError, match="temperature: expected different values"):
        make_config(digits, tmp_path / "run", temperature=[4.0, 4.0])
    with pytest.raises(UsageError, match=r"temperature: .* needs soft labels"):
        make_config(digits, tmp_path / "run", labels=None, temperature=4.0)
    with pytest.raises(UsageError, match="soft_weight is 0, so there is no soft term"):
        make_config(digits, tmp_path / "run", soft_weight=0, temperature=4.0)
    with pytest.raises(UsageError, match="expected one student, found 2"):
        _ = train(make_config(digits, tmp_path / "two", temperature=[1.0, 4.0], epochs=1)).history


def test_names_say_what_differs() -> None:
    def names(**options: object) -> list[str]:
        given = TrainConfig(data="d", out="o", **{"labels": "l", **options})  # type: ignore[arg-type]
        return [student.name for student in students_of(given)]

    assert names(student="zoo:resnet8") == ["resnet8"]
    assert names(student=["run:runs/a b", "python:x.y:make"]) == ["a-b", "make"]
    assert names(student=["zoo:resnet8?resize=32", "zoo:resnet8?resize=16"]) == ["resnet8", "resnet8-2"]
    # Without a soft term there is no temperature: one student stands for all of them.
    assert names(student="zoo:resnet8", temperature=[1.0, 4.0], soft_weight=[0.0, 0.5]) == [
        "soft0",
        "T1-soft0.5",
        "T4-soft0.5",
    ]


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_table_of_students_of_which_one_was_given_up(order: slice, tmp_path: Path) -> None:
    """Whatever the others were measured by, and whichever of them is the first."""
    epoch = EpochMetrics(
        epoch=1, step=1, lr=0.1, loss=2.0, soft_loss=None, hard_loss=2.0, train_accuracy=0.5, seconds=1.0,
        images_per_second=1.0, eval_perplexity=3.25,
    )  # fmt: skip
    students = (
        StudentResult(name="lost", out="lost", history=(), failure="loss is not finite"),
        StudentResult(name="sound", out="sound", history=(epoch,)),
    )[order]
    assert "3.2500" in TrainResult(out="grid", students=students, seconds=1.0).table()
    write_summary(tmp_path, students)
    with (tmp_path / "results.csv").open(newline="") as file:
        assert {row["student"]: row["perplexity"] for row in csv.DictReader(file)} == {"lost": "", "sound": "3.2500"}
