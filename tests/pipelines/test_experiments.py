"""The experiments in pipelines/experiments/, each in its smallest form, as a user runs them."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

import softlabel
from pipelines.experiments.common import format_table
from softlabel import TrainConfig, open_store, train
from tests.support.commands import run_script
from tests.support.shared_data import ROOT

SMALL = "?resize=16&crop=16"
STUDENT = f"zoo:cnn2{SMALL}"
TEST = "digits?rows=200:260"
COMMON = ["--data", "digits?rows=0:200", "--test", TEST, "--epochs", 1, "--seeds", 0, 1]
COMMON += ["--batch-size", 32, "--lr", 0.01, "--augment", "none", "--precision", "fp32"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("sklearn", reason="needs scikit-learn for its handwritten digits")
    out = str(tmp_path_factory.mktemp("experiments") / "teacher")
    train(
        TrainConfig(
            data="digits?rows=0:200",
            student=STUDENT,
            out=out,
            epochs=2,
            augment="none",
            batch_size=32,
            tensorboard=False,
        )
    )
    return f"run:{out}"


def run(name: str, out: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """Run an experiment; return its results and what it printed."""
    script = ROOT / "pipelines" / "experiments" / f"{name}.py"
    assert len(script.read_text().splitlines()) < 160
    done = run_script(script, "--out", out, *COMMON, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text()), done.stdout


def check_rows(results: dict[str, Any], printed: str, names: list[str]) -> None:
    """Every arm has an accuracy for each seed, their mean and standard deviation, and a line of the table."""
    assert [row["name"] for row in results["rows"]] == names
    for row in results["rows"]:
        values = list(row["accuracy"].values())
        assert list(row["accuracy"]) == ["0", "1"]
        assert all(0 <= value <= 1 for value in values)
        assert row["mean"] == pytest.approx(statistics.mean(values))
        assert row["sd"] == pytest.approx(statistics.stdev(values))
        assert re.search(rf"^\| {re.escape(row['name'])} \| 0\.\d", printed, flags=re.MULTILINE), printed
    assert results["seconds"] > 0


def test_view_count(teacher: str, tmp_path: Path) -> None:
    """The store of each V has V views of the samples that are learned from; a second call trains nothing."""
    command = [
        "--teacher",
        teacher,
        "--student",
        STUDENT,
        "--views",
        1,
        2,
        "--epochs",
        3,
        "--policy",
        "crop-flip?padding=2",
    ]
    results, printed = run("view_count", tmp_path / "out", *command)
    plain = ["hard labels, augmented", "labels of the un-augmented image, augmented"]
    check_rows(results, printed, [*plain, "V = 1", "V = 2", "V = 3, fresh every epoch"])
    stores = [open_store(tmp_path / "out" / "labels" / f"views-{views}") for views in (1, 2, 3)]
    assert [store.run.views.count for store in stores] == [1, 2, 3]
    samples = len(softlabel.open_source("digits?rows=0:200&without_fold=1/10"))
    assert [store.manifest.totals.rows for store in stores] == [samples, 2 * samples, 3 * samples]
    spec = f"run:{tmp_path / 'out' / 'runs' / 'views-2' / 'seed-1'}"
    assert softlabel.evaluate(spec, TEST, progress=False).accuracy == results["rows"][3]["accuracy"]["1"]
    weights = Path(spec.removeprefix("run:")) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again, _ = run("view_count", tmp_path / "out", *command)
    assert again["rows"] == results["rows"]
    assert weights.stat().st_mtime_ns == before


def test_teacher_strength(teacher: str, tmp_path: Path) -> None:
    students = [STUDENT, f"zoo:cnn4{SMALL}"]
    command = ["--teacher", f"small={teacher}", f"same={teacher}", "--student", *students]
    results, printed = run("teacher_strength", tmp_path / "out", *command)
    arms = ("hard labels", "small", "same")
    check_rows(results, printed, [f"{student} from {arm}" for student in ("cnn2", "cnn4") for arm in arms])
    shown = {row["teacher"] for row in results["rows"][1:3]}
    assert shown == {f"{softlabel.evaluate(teacher, TEST, progress=False).accuracy:.4f}"}


def test_teacher_assistant(tmp_path: Path) -> None:
    """Each arm learns from the teacher that it names, with the weights that it names."""
    command = ["--large", f"zoo:cnn6{SMALL}", "--assistant", f"zoo:cnn4{SMALL}", "--student", STUDENT]
    command += ["--epochs", 2, "--lambdas", 0.5, 1, "--temperatures", 10]
    results, printed = run("teacher_assistant", tmp_path / "out", *command)
    arms = ("large", "assistant", "early", "ensemble")
    check_rows(
        results, printed, ["hard labels", *(f"KD: {arm}, {one}" for arm in arms for one in ("default", "published"))]
    )
    members = {arm: [one.spec for one in open_store(tmp_path / "out" / "labels" / arm).run.members] for arm in arms}
    large = assistant = "run:seed-0"
    assert members == {
        "large": [large],
        "assistant": [assistant],
        "early": ["run:epoch-1"],
        "ensemble": [large, assistant],
    }
    hashes = {one.sha256 for arm in arms for one in open_store(tmp_path / "out" / "labels" / arm).run.members}
    assert len(hashes) == 3
    weights = {row["soft, hard"] for row in results["rows"]}
    assert weights <= {"0, 1", "0.9, 0.1, T 4", "0.05, 0.5, T 10", "0.1, 0, T 10"}
    assert set(results["teachers"]) == {"large", "assistant", "early"}


def test_losses(teacher: str, tmp_path: Path) -> None:
    command = ["--teacher", teacher, "--student", STUDENT, "--loss", "kd", "dkd", "standardized"]
    results, printed = run("losses", tmp_path / "out", *command)
    check_rows(results, printed, ["hard labels", "kd", "dkd", "standardized", "dkd, no warm-up"])
    assert [row["soft, hard"] for row in results["rows"]] == ["0, 1", "0.9, 0.1", "1, 1", "9, 0.1", "1, 1"]
    assert [row["T"] for row in results["rows"]] == ["-", "4", "4", "2", "4"]


def test_embedding_losses(teacher: str, tmp_path: Path) -> None:
    """Each student has its term beside the same soft labels; the first has none."""
    command = ["--teacher", teacher, "--student", STUDENT, "--embedding-loss", "simkd", "crd"]
    results, printed = run("embedding_losses", tmp_path / "out", *command)
    check_rows(results, printed, ["hard labels", "kd alone", "kd and simkd", "kd and crd"])
    folder = tmp_path / "out" / "runs" / "embeddings" / "seed-1"
    configs = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*/config.yaml"))]
    assert sorted(config["embedding_loss"] for config in configs) == ["crd", "none", "simkd"]
    assert {config["labels"] for config in configs} == {str(tmp_path / "out" / "labels" / "teacher")}


def test_tuning(teacher: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs Optuna")
    command = [
        "--teacher",
        teacher,
        "--student",
        STUDENT,
        "--loss",
        "kd",
        "--passes",
        1,
        "--students",
        3,
        "--epochs",
        3,
    ]
    results, printed = run("tuning", tmp_path / "out", *command)
    check_rows(results, printed, ["defaults", "defaults, its learning rate", "found"])
    assert results["search"] == {"students": 3, "epochs of all students": 5}
    assert "on line it would have run 3 times beside the students of a pass, and 5 times" in printed


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--teacher", "zoo:resnet8@missing.th"], "losses: missing.th: expected a checkpoint, found no such file"),
        (["--test", "missing.parquet"], "losses: missing.parquet: expected a file or folder"),
        (["--seeds", 0, 0], "losses: --seeds: expected different values, found [0, 0]"),
        (["--rows", 0], "losses.py: error: argument --rows: expected a whole number above 0, found '0'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_error_is_said_before_anything_is_trained(wrong: list[object], said: str, tmp_path: Path) -> None:
    script = ROOT / "pipelines" / "experiments" / "losses.py"
    done = run_script(script, "--out", tmp_path / "out", *COMMON, *wrong)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(said), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "runs").exists()


def test_a_student_that_was_given_up_has_no_mean() -> None:
    rows = [{"name": "kd", "accuracy": {0: 0.5, 1: None}, "mean": None, "sd": None, "T": "4"}]
    assert format_table(rows).splitlines()[-1] == "| kd | 0.5000 | - | - | - | 4 |"


def test_derivatives(teacher: str, tmp_path: Path) -> None:
    """Every arm has as many passes: of pairs a third of the epochs."""
    command = ["--data", "digits", "--images", 60, "--passes", 324, "--views", 2, "--weight", 0.0, 1.0]
    command += ["--policy", "crop-flip?padding=2&flip=false", "--teacher", teacher, "--student", STUDENT]
    script = ROOT / "pipelines" / "experiments" / "derivatives.py"
    done = run_script(script, "--out", tmp_path, *COMMON, *command)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "60" / "results.json").read_text())
    pairs = [f"crops, pairs of noise, difference weight {weight}" for weight in (0, 1)]
    check_rows(results, done.stdout, ["crops", "crops with noise", *pairs])
    assert [row["epochs"] for row in results["rows"]] == ["6", "6", "2", "2"]
    store = open_store(tmp_path / "60" / "labels" / "pairs")
    assert store.run.views.policy["steps"][-1] == {"op": "noise-pair", "step": 8, "directions": 1}
