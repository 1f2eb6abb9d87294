"""Searching settings: what is drawn, who is ended on the way, what is left behind, and that it resumes."""

import csv
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from softlabel import TrainConfig, evaluate, open_source, train
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.training.halving import Halving
from softlabel.training.tune import TuneResult, tune
from softlabel.training.tune_config import TuneConfig
from tests.support.commands import run_softlabel
from tests.support.processes import Process
from tests.support.stores import draw_logits, write_logits
from tests.support.training_runs import ROWS, STUDENT, make_keys, wait_for_file, write_digits

pytest.importorskip("optuna", reason="needs Optuna")

TRAINING = {"epochs": 4, "batch_size": 32, "augment": "none", "weight_decay": 1e-3, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def make_search(digits: Path, out: Path, **changes: object) -> TuneConfig:
    given = {"data": str(digits / "data.parquet"), "labels": str(digits / "store"), "student": STUDENT}
    given |= {"out": str(out), "students": 4, "passes": 2, "reduction": 2, "held_out": 4, "lr": "0.001:0.02", **changes}
    return TuneConfig(**given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    return tune(make_search(digits, tmp_path_factory.mktemp("tuned") / "out", loss=["kd", "dist"]), **TRAINING)


@dataclass
class _Epoch:
    score: float


class _Runner:
    """A student whose accuracies are known beforehand."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores, self.history, self.failure = scores, [], None

    @property
    def epoch(self) -> int:
        return len(self.history)


def test_halving_keeps_the_best_at_every_rung() -> None:
    """9 students, 9 epochs, a third goes on after epochs 1 and 3; interrupted or not, the same ones do."""
    halving = Halving(9, 9, 3)
    assert halving.rungs == {1: 3, 3: 1}
    assert Halving(8, 8, 2).rungs == {1: 4, 2: 2, 4: 1}
    assert Halving(4, 20, 2).rungs == {5: 2, 10: 1}
    assert Halving(9, 9, 1).rungs == {}
    assert Halving(9, 2, 3).rungs == {}
    # The one that is best after epoch 1 is last after epoch 3.
    students = [_Runner([0.1 * n, 0.0, 0.9 - 0.1 * n, 0.5]) for n in range(9)]
    for epoch in range(4):
        running = [one for one in students if one.failure is None]
        for one in running:
            one.history.append(_Epoch(one.scores[epoch]))
        halving(running)
        halving([one for one in running if one.failure is None])  # as after an interruption
    assert [one.epoch for one in students] == [1] * 6 + [4, 3, 3]
    assert students[0].failure == "halved after epoch 1: accuracy 0.0000, not among the best 3"


def test_a_search_trains_what_it_says(digits: Path, found: TuneResult) -> None:
    """Scores are those of the runs on the samples held out, which no student has seen; the best one is repeated."""
    folder = Path(found.out)
    assert [one.of_pass for one in found.trials] == [1] * 4 + [2] * 4
    assert [one.state for one in found.trials].count("done") == 2
    for one in found.trials:
        assert 0.001 <= one.settings["lr"] <= 0.02
        run = folder / f"pass-{one.of_pass}" / f"trial-{one.number}"
        with (run / "metrics.csv").open(newline="") as file:
            measured = {int(row["epoch"]): float(row["eval_accuracy"]) for row in csv.DictReader(file)}
        assert one.scores == measured
        assert len(measured) == (4 if one.state == "done" else len(one.scores))
    held_out = f"{digits / 'data.parquet'}?fold=1/4"
    run = folder / f"pass-{found.best.of_pass}" / f"trial-{found.best.number}"
    assert evaluate(run, held_out, progress=False).accuracy == pytest.approx(found.best.score)
    seen = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert not set(open_source(seen).keys()) & set(open_source(held_out).keys())
    assert len(open_source(seen)) + len(open_source(held_out)) == ROWS
    assert found.best.score == max(one.score or 0 for one in found.trials if one.state == "done")


def test_the_best_settings_are_a_command_and_a_file(found: TuneResult, tmp_path: Path) -> None:
    words = shlex.split(found.command)
    assert words[:2] == ["softlabel", "train"]
    words[words.index("--out") + 1] = str(tmp_path / "by-command")
    run_softlabel(*words[1:], "--device", "cpu")
    run_softlabel("train", "--config", Path(found.out) / "best.yaml", "--out", tmp_path / "by-file")
    settings = yaml.safe_load((tmp_path / "by-command" / "config.yaml").read_text())
    assert {name: settings[name] for name, value in found.best.settings.items() if value is not None} == {
        name: value for name, value in found.best.settings.items() if value is not None
    }
    identities = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("by-command", "by-file")]
    assert identities[0] == identities[1]
    assert identities[0]["weight_decay"] == 1e-3
    assert (Path(found.out) / "tuning.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_begins_with_the_defaults(digits: Path, tmp_path: Path) -> None:
    """The first trial of a loss is what `softlabel train` would do."""
    config = make_search(digits, tmp_path / "out", passes=1, students=2, reduction=1, lr="0.01:0.5")
    found = tune(config, **TRAINING)
    assert found.defaults == found.trials[0]
    assert found.defaults is not None
    assert found.defaults.settings == {
        "loss": "kd",
        "lr": 0.1,
        "temperature": 4.0,
        "soft_weight": 0.9,
        "hard_weight": 0.1,
    }
    data = str(digits / "data.parquet")
    plain = train(
        TrainConfig(
            data=f"{data}?without_fold=1/4",
            eval_data=f"{data}?fold=1/4",
            labels=str(digits / "store"),
            student=STUDENT,
            out=str(tmp_path / "plain"),
            tensorboard=False,
            **TRAINING,  # type: ignore[arg-type]
        )
    )
    assert found.defaults.scores == {one.epoch: one.eval_accuracy for one in plain.history}


def _search(config: TuneConfig) -> None:
    tune(config, **TRAINING, checkpoint_minutes=1e-4)


def test_a_killed_search_goes_on_as_if_nothing_had_happened(digits: Path, found: TuneResult, tmp_path: Path) -> None:
    """Killed in its first pass, ended after it, and with one more pass it is the search that was left alone."""
    config = make_search(digits, tmp_path / "out", loss=["kd", "dist"])
    process = Process(_search, config)
    wait_for_file(tmp_path / "out" / "pass-1" / "trial-0" / "checkpoint.pt", process)
    process.kill()
    process.communicate()
    tune(replace(config, passes=1), **TRAINING)
    resumed = tune(config, **TRAINING)
    assert resumed.trials == found.trials
    assert resumed.best == found.best
    again = tune(config, **TRAINING)
    assert again.already_done
    assert again.best == found.best


def test_the_command_line_searches(digits: Path, tmp_path: Path) -> None:
    command = ["tune", "--data", digits / "data.parquet", "--labels", digits / "store", "--student", STUDENT]
    command += ["--out", tmp_path / "out", "--students", 2, "--passes", 1, "--reduction", 2, "--held-out", 4]
    command += ["--epochs", 2, "--batch-size", 32, "--lr", "0.01", "--temperature", "2", "--augment", "none"]
    done = run_softlabel(*command)
    assert "2 students in 1 pass, 1 ended on the way" in done.stdout
    assert "train with it: softlabel train --data" in done.stdout
    assert "--lr 0.01 --temperature 2 --soft-weight" in done.stdout
    assert "already complete" in run_softlabel(*command).stdout


def test_wrong_searches_say_what_is_wrong(digits: Path, found: TuneResult, tmp_path: Path) -> None:
    for changes, message in [
        ({"lr": "0.1:0.01"}, r"lr: expected LO:HI or a number, above 0 and LO below HI, found '0.1:0.01'"),
        ({"temperature": "0:4"}, r"temperature: expected LO:HI or a number, above 0"),
        ({"hard_weight": "some"}, r"hard_weight: expected LO:HI or a number, of at least 0"),
    ]:
        with pytest.raises(UsageError, match=message):
            tune(make_search(digits, tmp_path / "wrong", **changes), **TRAINING)
    with pytest.raises(UsageError, match="students: expected a number of at least 2, found 1"):
        make_search(digits, tmp_path / "wrong", students=1)
    with pytest.raises(DataError, match="no sample has a hard label"):
        tune(make_search(digits, tmp_path / "wrong", data=str(digits / "unlabelled.parquet")), **TRAINING)
    with pytest.raises(UsageError, match="keep_epochs: expected an option of tune"):
        tune(make_search(digits, tmp_path / "wrong"), **TRAINING, keep_epochs=[1])
    assert not (tmp_path / "wrong").exists()
    other = make_search(digits, Path(found.out), loss=["kd", "dist"], held_out=5)
    with pytest.raises(MismatchError, match="holds another search; held_out: 4 there, 5 here"):
        tune(other, **TRAINING)
    same = make_search(digits, Path(found.out), loss=["kd", "dist"])
    with pytest.raises(MismatchError, match=r"holds another search; weight_decay: 0.001 there, 0.01 here"):
        tune(same, **TRAINING | {"weight_decay": 0.01})
    with pytest.raises(UsageError, match="temperature: loss mlkd has temperatures of its own, found 2:3"):
        tune(make_search(digits, tmp_path / "wrong", loss="mlkd", temperature="2:3"), **TRAINING)
    means = write_logits(tmp_path / "means", make_keys(ROWS), draw_logits(ROWS, 10), members=2, rule="probs")
    with pytest.raises(UsageError, match="means of probabilities, which have one temperature"):
        tune(make_search(digits, tmp_path / "wrong", labels=str(means.url)), **TRAINING)


def test_optuna_is_named_where_it_is_missing(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs Optuna, which is not installed; pip install 'softlabel\[tune\]'"):
        tune(make_search(digits, tmp_path / "out"), **TRAINING)
