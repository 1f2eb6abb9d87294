"""Steps on tensors that stay in place, as a CUDA graph holds them: on a CPU the same function runs without one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softlabel import TrainConfig, train
from softlabel.dataset import open_source
from softlabel.errors import UsageError
from softlabel.store.open import open_store
from softlabel.training.distributed import Ranks
from softlabel.training.graphed_steps import GraphedSteps
from softlabel.training.grid import students_of
from softlabel.training.row_student import RowStudent
from softlabel.training.row_task import RowTask
from softlabel.training.stack import Stack
from softlabel.training.static_step import StaticStep, describe
from softlabel.training.step import Counts, RowStep
from tests.support.commands import run_softlabel
from tests.support.training_runs import have_equal_weights, make_config, write_digits

MODULE = "python:tests.support.students:build_{}_student?resize=16&crop=16"
DOUBLE, SMOOTH = MODULE.format("double"), MODULE.format("smooth")
EPOCHS = 2
WAYS: dict[str, dict[str, Any]] = {
    "batch norm": {"student": MODULE.format("batchwise")},
    "all that a step may have": {"student": SMOOTH}
    | {"optimizer": "adamw", "ema": 0.9, "clip_norm": 0.5, "label_smoothing": 0.1},
    "mixup": {"student": SMOOTH, "labels": None, "mixup": 0.2},
    "dropout": {"student": MODULE.format("dropout")},
    "stack": {"student": DOUBLE, "temperature": [1.0, 4.0], "lr": [0.001, 0.003]},
    "stack of adamw": {"student": DOUBLE, "optimizer": "adamw", "weight_decay": [0.0, 0.1]},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


class Bench:
    """Students, and the steps of a few epochs of theirs."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.ranks = config, Ranks("cpu")
        self._task = self._make_task()
        self._loader = self._task.open_loader(self.ranks, 0, None)

    def _make_task(self) -> RowTask:
        source = open_source(self.config.values("data")[0])
        store = None if self.config.labels is None else open_store(self.config.labels)
        return RowTask(self.config, students_of(self.config), source, store, "fp32", report=False)

    def make_students(self) -> list[RowStudent]:
        task, settings = self._make_task(), {"ranks": self.ranks, "steps": len(self._loader)}
        numbers = range(len(task.configs))
        return [task.make_student(number, temperature=4.0, **settings) for number in numbers]  # type: ignore[arg-type]

    def make_steps(self, students: list[RowStudent]) -> Iterator[RowStep]:
        for epoch in range(EPOCHS):
            self._loader.set_epoch(epoch, 0)
            for step, batch in enumerate(self._loader):
                cut, parts = self._task.cut(batch)
                whole = (
                    parts[0][1]
                    if len(parts) == 1
                    else Counts(rows=len(cut), soft=len(cut), hard=len(cut), both=0, units=1)
                )
                yield self._task.prepare(cut, parts, whole, students, epoch=epoch, step=step)
            for student in students:
                student.finish_epoch(None, 0.0)


def run_uncaptured(
    begin: Callable[[], None], warm_up: Callable[[], None], run: Callable[[], None], device: torch.device
) -> Callable[[], None]:
    """In place of a graph, the function that it would hold."""
    return run


def list_state(students: list[RowStudent]) -> list[Tensor]:
    return [tensor for student in students for tensor in student.list_tensors()]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_step_on_static_tensors_is_the_eager_one_bit_for_bit(
    digits: Path, tmp_path: Path, way: dict[str, Any]
) -> None:
    bench = Bench(make_config(digits, tmp_path / "run", **way))
    eager, other = bench.make_students(), bench.make_students()
    learner = Stack(other) if len(other) > 1 else other[0]
    alone = Stack(eager) if len(eager) > 1 else None
    static: StaticStep | None = None
    used = 0
    for work in bench.make_steps([*eager, *other]):
        if alone is None:
            eager[0].advance(work, alone=True)
        else:
            alone.advance(work)
        ((part, here),) = work.parts
        with learner.drawing():
            learner.begin_step()
            rows = learner.cut_rows(work, part)
            # As in training, the first step is an eager one, and so is that of the last, smaller batch.
            if static is not None and static.signature == describe(rows, here, work.whole):
                static.make(rows)
                used += 1
            else:
                learner.learn(rows, here, work.whole)
                if isinstance(learner, Stack):
                    learner.prepare()
                learner.change()
                static = static or StaticStep(learner, rows, here, work.whole)
            learner.note_step()
    assert used == EPOCHS * 3 - 1
    for one, found in zip(list_state(eager), list_state(other), strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=0)
    for student, found_in in zip(eager, other, strict=True):
        assert [epoch.loss for epoch in student.history] == [epoch.loss for epoch in found_in.history]


@pytest.mark.parametrize(
    ("step", "way"),
    [("auto" if name in ("dropout", "stack") else "graph", way) for name, way in WAYS.items()],
    ids=WAYS,
)
def test_a_trial_keeps_what_is_equal_and_leaves_no_trace(
    digits: Path, tmp_path: Path, step: str, way: dict[str, Any]
) -> None:
    """With the optimiser that a graph can hold, whose kernel rounds differently."""
    bench = Bench(make_config(digits, tmp_path / "run", step=step, **way))
    eager, other = bench.make_students(), bench.make_students()
    (tmp_path / "run").mkdir()
    graphs = GraphedSteps(bench.config, bench.ranks, other, run_uncaptured)
    stacks = [Stack(eager), Stack(other)] if len(eager) > 1 else None
    for work in bench.make_steps([*eager, *other]):
        if stacks is None:
            eager[0].advance(work, alone=True)
            assert graphs.advance(other, work) == []
        else:
            stacks[0].advance(work)
            graphs.advance_stack(stacks[1], work)
    for one, found in zip(list_state(eager), list_state(other), strict=True):
        # AdamW moves a weight by the sign of its gradient, also of one that is 0 but for rounding.
        near = 2e-2 if way.get("optimizer") == "adamw" and stacks is None else 2e-5
        torch.testing.assert_close(found, one, rtol=near, atol=near)
    recorded = tmp_path / "run" / "steps.json"
    assert recorded.exists() == (step == "auto")
    if step == "auto":
        (choice,) = json.loads(recorded.read_text())
        assert choice["students"] == [student.config.name for student in other]
        assert choice["graph"] == (choice["graph_ms"] < choice["eager_ms"])
        # A resumed run keeps to it.
        recorded.write_text(json.dumps([{**choice, "graph": False}]))
        again = bench.make_students()
        graphs = GraphedSteps(bench.config, bench.ranks, again, run_uncaptured)
        for work in bench.make_steps(again) if stacks is None else ():
            graphs.advance(again, work)
        if stacks is None:
            for one, found in zip(list_state(eager), list_state(again), strict=True):
                torch.testing.assert_close(found, one, rtol=0, atol=0)


def test_a_checkpoint_does_not_depend_on_the_form_of_the_optimizer(digits: Path, tmp_path: Path) -> None:
    for optimizer in ("sgd", "adamw"):
        chosen = {"step": "graph", "optimizer": optimizer, "student": SMOOTH}
        bench = Bench(make_config(digits, tmp_path / optimizer, **chosen))
        eager, other = bench.make_students(), bench.make_students()
        graphs = GraphedSteps(bench.config, bench.ranks, other, run_uncaptured)
        for work in bench.make_steps([*eager, *other]):
            eager[0].advance(work, alone=True)
            graphs.advance(other, work)
        states = []
        for student in (eager[0], other[0]):
            (tmp_path / optimizer).mkdir(exist_ok=True)
            student.save()
            states.append(torch.load(tmp_path / optimizer / "checkpoint.pt", weights_only=True)["optimizer"])
        assert states[0]["param_groups"] == [{**states[1]["param_groups"][0], "lr": states[0]["param_groups"][0]["lr"]}]
        assert states[1]["param_groups"][0]["lr"] == pytest.approx(states[0]["param_groups"][0]["lr"], rel=1e-6)
        assert states[0]["state"].keys() == states[1]["state"].keys()
        for number, state in states[0]["state"].items():
            assert {name: type(value) for name, value in state.items()} == {
                name: type(value) for name, value in states[1]["state"][number].items()
            }
        (resumed,) = bench.make_students()
        resumed.resume()
        for one, found in zip(list_state(other), list_state([resumed]), strict=True):
            torch.testing.assert_close(found, one, rtol=0, atol=0)


def fail(*_: object) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing")


def make_all_steps(bench: Bench, student: RowStudent, capture: Any) -> None:
    graphs = GraphedSteps(bench.config, bench.ranks, [student], capture)
    for work in bench.make_steps([student]):
        graphs.advance([student], work)


def forget(*_: object) -> Callable[[], None]:
    return lambda: None


@pytest.mark.parametrize(
    ("capture", "changes", "reason"),
    [
        (fail, {}, "a step cannot be captured as a CUDA graph .*not permitted when stream is capturing"),
        (forget, {}, r"what steps of a graph change in its weights differs .* by 1 of its norm, more than 0\.001"),
        (run_uncaptured, {"accumulate": 2}, "--accumulate 2 makes several passes of a step"),
        (run_uncaptured, {"batch_size": 128}, None),
    ],
    ids=["cannot be captured", "another result", "accumulate", "one step an epoch"],
)
def test_what_is_no_graph_is_refused_or_stays_eager(
    digits: Path, tmp_path: Path, capture: Any, changes: dict[str, Any], reason: str | None
) -> None:
    for step in ("graph", "auto"):
        bench = Bench(make_config(digits, tmp_path / step, step=step, student=SMOOTH, **changes))
        (tmp_path / step).mkdir()
        (student,), (eager,) = bench.make_students(), bench.make_students()
        if step == "graph" and reason is not None:
            with pytest.raises(UsageError, match=f"step.*: expected eager or auto, found graph: {reason}"):
                make_all_steps(bench, student, capture)
            continue
        graphs = GraphedSteps(bench.config, bench.ranks, [student], capture)
        for work in bench.make_steps([eager, student]):
            eager.advance(work, alone=True)
            for left in graphs.advance([student], work):
                left.advance(work, alone=True)
        near = 0.0 if reason is not None else 2e-5
        for one, found in zip(list_state([eager]), list_state([student]), strict=True):
            torch.testing.assert_close(found, one, rtol=near, atol=near)


def test_on_a_cpu_a_graph_is_refused_and_auto_is_eager(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="softlabel")
    torch.set_num_threads(1)
    refused = run_softlabel(
        *("train", "--data", digits / "data.parquet", "--student", "zoo:cnn2?resize=16&crop=16", "--device", "cpu"),
        *("--epochs", 1, "--out", tmp_path / "graph", "--step", "graph"),
        code=2,
    )
    assert "step: expected eager or auto, found graph: a CUDA graph needs a CUDA device" in refused.stderr
    for step in ("auto", "eager"):
        train(make_config(digits, tmp_path / step, step=step, epochs=1))
    assert have_equal_weights(tmp_path / "auto", tmp_path / "eager")
    assert "step: eager: a CUDA graph needs a CUDA device, and this run is on cpu" in caplog.text
    assert not (tmp_path / "auto" / "steps.json").exists()
