"""Commands about students: train, evaluate."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from softlabel.cli.config import local, write_config
from softlabel.errors import UsageError

if TYPE_CHECKING:
    from softlabel.training import TrainConfig, TrainResult


def train(config: "TrainConfig") -> int:
    """Train a student from a store of soft labels, or on hard labels alone.

    The same command again resumes what was interrupted. Soft labels are joined to the images by key.

    Example:
        softlabel train --data train.parquet --labels labels/resnet50 --student zoo:resnet8 --epochs 10 --out runs/kd
    """
    from softlabel.training import train as run

    local(config.out, "--out")
    result = run(config)
    if int(os.environ.get("RANK", "0")) > 0:
        return 0  # torchrun's first process speaks for all
    if len(result.students) > 1:
        return _several(result)
    if result.already_done:
        print(f"{result.out}: already trained; --overwrite trains it again")
        return 0
    last = result.history[-1]
    print(f"{result.out}: trained for {last.epoch} epochs, {last.step:,} steps, in {result.seconds:.1f} s")
    if last.eval_accuracy is not None:
        print(f"  accuracy on {config.eval_data}: {last.eval_accuracy:.4f}")
    print(f"  measure it with: softlabel evaluate {_to_measure(config, result.out)}")
    return 0


def _to_measure(config: "TrainConfig", out: str) -> str:
    """Arguments of `evaluate` for a run, quoted for a shell; against the teacher where there are no other data."""
    words = ["--data", config.eval_data or config.values("data")[0], "--model", out]
    if config.eval_data is None and config.labels is not None:
        words += ["--labels", config.labels]
    if config.missing != "error" and "--labels" in words:
        words += ["--missing", config.missing]
    return shlex.join(words)


def _several(result: "TrainResult") -> int:
    """The table and the picture of several students; 1 if one of them was given up."""
    from softlabel.evaluation.plots import plot_runs

    failed = [student for student in result.students if student.failure is not None]
    print(f"{result.out}: {len(result.students)} students in one pass, in {result.seconds:.1f} s")
    print(result.table())
    drawn = {student.name: student.out for student in result.students if student.history}
    if drawn:
        print(f"curves: {plot_runs(drawn, Path(result.out) / 'curves.png')}")
    return 1 if failed else 0


def evaluate(
    *,
    data: str,
    model: str,
    labels: str | None = None,
    batch_size: int = 256,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    missing: Literal["error", "skip", "hard-only"] = "error",
    workers: int = 0,
    device: str = "auto",
    out: str | None = None,
) -> int:
    """Measure a model: accuracy, cross-entropy, calibration error, agreement with the teacher of a store.

    Example:
        softlabel evaluate --data test.parquet --model runs/kd

    Args:
        data: a SOURCE with hard labels.
        model: the folder of a run, or a SPEC with a checkpoint.
        labels: a store of the same data, with which the model is compared too.
        batch_size: images a forward pass.
        precision: of the forward pass.
        missing: samples without a row in the store.
        workers: processes that decode.
        device: auto, cpu, cuda or cuda:N.
        out: JSON file for the figures; the settings go beside it.
    """
    options = dict(locals())
    from json import dumps

    if out is not None:
        path = Path(local(out, "--out"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {out}: its folder cannot be made: {error.strerror}") from error

    from softlabel.evaluation.evaluate import evaluate as run

    found = run(
        model,
        data,
        labels,
        batch_size=batch_size,
        precision=precision,
        missing=missing,
        workers=workers,
        device=device,
    )
    print(found)
    if out is not None:
        path.write_text(dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
        write_config(path.with_name(f"{path.stem}.config.yaml"), options)
    return 0
