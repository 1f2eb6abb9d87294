"""Several processes that torchrun starts train as one would: the same batches, the same losses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from softlabel import train
from tests.support.commands import make_environment
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.training_runs import (
    ROWS,
    STUDENT,
    make_config,
    make_keys,
    make_settings,
    read_history,
    read_weights,
    train_in_ranks,
    wait_for_file,
    write_digits,
)

SMOOTH = "python:tests.support.students:build_smooth_student?resize=16&crop=16"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As for one process; of data.parquet only every third sample has a label, and the store misses some rows."""
    folder = write_digits(tmp_path_factory.mktemp("digits"))
    images, labels = make_digit_jpegs()
    some = [label if number % 3 == 0 else None for number, label in enumerate(labels[: ROWS + 20])]
    write_parquet(
        folder / "some.parquet", images[: ROWS + 20], keys=make_keys(ROWS + 20), labels=some, class_names=DIGITS
    )
    return folder


def launch(given: dict[str, object], ranks: int, log: Path) -> subprocess.Popen[str]:
    script = log.with_suffix(".py")
    script.write_text(
        "import json, sys\nfrom softlabel import TrainConfig, train\n"
        "if __name__ == '__main__':\n    train(TrainConfig(**json.loads(sys.argv[1])))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environ = {**make_environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
    with log.open("w") as file:
        return subprocess.Popen([*command, str(script), json.dumps(given)], env=environ, stderr=file, text=True)


def run(given: dict[str, object], ranks: int, log: Path) -> None:
    process = launch(given, ranks, log)
    assert process.wait() == 0, log.read_text()


def close(one: Path, other: Path) -> None:
    """The same curves, up to rounding."""
    first, second = read_history(one), read_history(other)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name in a:
            assert (a[name] == "") == (b[name] == ""), name
            if a[name]:
                assert float(a[name]) == pytest.approx(float(b[name]), rel=2e-4, abs=2e-5), name
    ours, theirs = read_weights(one), read_weights(other)
    for name in ours:
        np.testing.assert_allclose(ours[name].numpy(), theirs[name].numpy(), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("student", "changes"),
    [
        (SMOOTH, {"data": "some.parquet", "missing": "hard-only", "accumulate": 2, "clip_norm": 1.0, "batch_size": 31}),
        pytest.param(STUDENT, {"sync_batchnorm": True, "temperature": [1.0, 4.0], "ema": 0.9}, marks=pytest.mark.slow),
    ],
    ids=["some labels, some soft labels, parts", "batch norm, two students"],
)
def test_two_processes_learn_what_one_learns(
    digits: Path, tmp_path: Path, student: str, changes: dict[str, object]
) -> None:
    # 31 does not divide by two: one process gets a row of filler in every batch.
    if "data" in changes:
        changes = {**changes, "data": digits / str(changes["data"])}
    rest = {"student": student, "epochs": 2, "eval_data": digits / "data.parquet", **changes}
    train(make_config(digits, tmp_path / "one", **rest))
    two = make_settings(digits, tmp_path / "two", **rest)
    if "sync_batchnorm" in changes:
        run(two, 2, tmp_path / "log")
    else:
        train_in_ranks(two, ranks=2)
    for name in ("T1", "T4") if "temperature" in changes else ("",):
        close(tmp_path / "one" / name, tmp_path / "two" / name)


@pytest.mark.slow
def test_a_stopped_run_of_two_goes_on_alone(digits: Path, tmp_path: Path) -> None:
    """SIGTERM to torchrun: every process stops after the same step; one process resumes, and ends where two would."""
    rest = {"student": SMOOTH, "epochs": 40, "checkpoint_minutes": 1e-4}
    train(make_config(digits, tmp_path / "straight", **rest))
    stopped = make_settings(digits, tmp_path / "stopped", **rest)
    process = launch(stopped, 2, tmp_path / "log")
    wait_for_file(tmp_path / "stopped" / "checkpoint.pt", process)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert not (tmp_path / "stopped" / "model.json").exists(), "the test was too slow to stop it"
    result = train(make_config(digits, tmp_path / "stopped", **rest))
    assert len(result.history) == 40
    close(tmp_path / "straight", tmp_path / "stopped")
