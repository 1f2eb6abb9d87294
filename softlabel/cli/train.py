"""Commands about students: train, tune, crossfit, evaluate."""

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from softlabel.cli.config import require_local, write_config
from softlabel.errors import UsageError

if TYPE_CHECKING:
    from softlabel.cli.crossfit_options import LabellingOptions, TrainingOptions
    from softlabel.cli.encoding_options import EncodingOptions
    from softlabel.training import TrainConfig, TrainResult
    from softlabel.training.tune_config import TuneConfig


def train(config: "TrainConfig") -> int:
    """Train a student from a store of soft labels, or only on hard labels.

    The same command resumes an interrupted one. Soft labels are joined to the images by key.

    Example:
        softlabel train --data train.parquet --labels labels/resnet50 --student zoo:resnet8 --epochs 10 --out runs/kd
    """
    from softlabel.training import train as run

    require_local(config.out, "--out")
    result = run(config)
    if int(os.environ.get("RANK", "0")) > 0:
        return 0  # the first process prints for all
    if len(result.students) > 1:
        return _print_students(result)
    if result.already_done:
        print(f"{result.out}: already trained; --overwrite trains it again")
        return 0
    last = result.history[-1]
    print(f"{result.out}: trained for {last.epoch} epochs, {last.step:,} steps, in {result.seconds:.1f} s")
    if last.headline is not None:
        name, value = last.headline
        print(f"  {name} on {config.eval_data}: {value:.4f}")
    print(f"  measure it with: softlabel evaluate {_evaluate_arguments(config, result.out)}")
    return 0


def fill_options(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of `train` that have a preset of the loss, and lines about those in which students differ.

    Args:
        given: all options; what is required may be absent still.
    """
    from softlabel.training import TrainConfig
    from softlabel.training.grid import fill_presets

    if given["labels"] is None:
        return {}, []
    needed = {"data": ["DATA"], "student": ["zoo:resnet8"], "out": "OUT"}
    return fill_presets(TrainConfig(**given | {name: given[name] or value for name, value in needed.items()}))


def _evaluate_arguments(config: "TrainConfig", out: str) -> str:
    """Return arguments of `evaluate` for a run, quoted for a shell; with the labels if there is no evaluation data."""
    words = ["--data", config.eval_data or config.values("data")[0], "--model", out]
    if config.eval_data is None and config.labels is not None:
        words += ["--labels", config.labels]
    if config.missing != "error" and "--labels" in words:
        words += ["--missing", config.missing]
    return shlex.join(words)


def _print_students(result: "TrainResult") -> int:
    """Print the table and plot the curves of several students; return 1 if one of them failed."""
    from softlabel.evaluation.plots import plot_runs

    failed = [student for student in result.students if student.failure is not None]
    print(f"{result.out}: {len(result.students)} students in one pass, in {result.seconds:.1f} s")
    print(result.table())
    drawn = {student.name: student.out for student in result.students if student.history}
    if drawn:
        print(f"curves: {plot_runs(drawn, Path(result.out) / 'curves.png')}")
    return 1 if failed else 0


def tune(config: "TuneConfig", training: "TrainingOptions") -> int:
    """Search the loss, temperature, weights and learning rate of a student on samples that are held out.

    Several students share a pass over the data, and the worst are ended on the way.
    The same command resumes an interrupted search; with more --passes it goes on.

    Example:
        softlabel tune --data train.parquet --labels labels/resnet50 --student zoo:resnet8 --epochs 9 --out tuned
    """
    from softlabel.training.tune import describe_settings
    from softlabel.training.tune import tune as run

    require_local(config.out, "--out")
    result = run(config, **asdict(training))
    halved, failed = (sum(one.state == state for one in result.trials) for state in ("halved", "failed"))
    ended = "".join(f", {count} {what}" for count, what in ((halved, "ended on the way"), (failed, "failed")) if count)
    when = "already complete" if result.already_done else f"in {result.seconds:.1f} s"
    passes = "1 pass" if config.passes == 1 else f"{config.passes} passes"
    print(f"{config.out}: {len(result.trials)} students in {passes}{ended}, {when}")
    print(result.table())
    print(f"best: accuracy {result.best.score:.4f} on the samples held out, {describe_settings(result.best.settings)}")
    if result.defaults is not None:
        epoch = max(result.defaults.scores)
        ended = "" if result.defaults.state == "done" else f" after epoch {epoch}, where it was ended"
        print(f"defaults: accuracy {result.defaults.score:.4f}{ended}, {describe_settings(result.defaults.settings)}")
    print(f"train with it: {result.command}")
    print(f"plot: {Path(config.out) / 'tuning.png'}")
    return 0


def crossfit(
    *,
    data: str,
    student: str,
    out: str,
    folds: int = 4,
    training: "TrainingOptions",
    labelling: "LabellingOptions",
    how: "EncodingOptions",
    keep_folds: bool = False,
) -> int:
    """Label every sample by a teacher that was not trained on it: one teacher for each fold of the data.

    Each teacher is trained on the hard labels of the other folds and labels its own.
    A sample's fold is a hash of its key and the seed.
    Samples without a hard label are labelled, and no teacher is trained on them.
    The same command resumes an interrupted one.

    Example:
        softlabel crossfit --data train.parquet --student zoo:resnet20 --folds 4 --epochs 20 --out labels/oof

    Args:
        data: a SOURCE with hard labels, see 'softlabel generate --help'.
        student: the SPEC of the teachers' network; without a checkpoint it starts from random weights.
        out: folder of the store; the teachers are trained in the folder OUT.folds.
        folds: how many teachers.
        keep_folds: keep the stores of the single folds in OUT.folds, which are removed once OUT is complete.
    """
    from softlabel.cli.report import size
    from softlabel.training.crossfit import crossfit as run

    require_local(out, "--out")
    encoding = how.encoding_at(labelling.temperature)
    assert encoding is not None, "the option has a default"
    options = {"data": data, "student": student, "out": out, "folds": folds, "keep_folds": keep_folds}
    options |= {**asdict(training), **asdict(labelling), **asdict(how)}
    done = run(
        data,
        student=student,
        out=out,
        folds=folds,
        encoding=encoding,
        keep_folds=keep_folds,
        options=options,
        **asdict(labelling),
        **asdict(training),
    )
    if not done.folds:
        print(f"{done.path}: already complete, {done.total_rows:,} rows; nothing to do")
        return 0
    print(f"{done.path}: complete, {done.total_rows:,} rows, {size(done.total_bytes)}, in {done.seconds:.1f} s")
    for number, fold in enumerate(done.folds, 1):
        accuracy = "" if fold.accuracy is None else f", accuracy {fold.accuracy:.4f}"
        print(
            f"  fold {number}: {fold.labelled:,} rows, teacher trained on {fold.trained_on:,} other samples{accuracy}"
        )
    if done.total_bad:
        print(f"  {done.total_bad:,} bad samples have no row; 'softlabel inspect {done.path}' lists them")
    print(f"  teachers: {done.teachers}; each was trained on the folds that it did not label")
    return 0


def evaluate(
    *,
    data: str,
    model: str,
    labels: str | None = None,
    batch_size: int | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    missing: Literal["error", "skip", "hard-only"] = "error",
    workers: int = 0,
    device: str = "auto",
    activation: Literal["softmax", "sigmoid"] | None = None,
    out: str | None = None,
) -> int:
    """Measure a model: accuracy, cross-entropy, calibration error, agreement with the teacher of a store.

    Of a model with several labels at once: mAP, AUROC and F1 in place of the accuracy.
    Of a language model: NLL and perplexity, accuracy and calibration error of the next tokens.

    Example:
        softlabel evaluate --data test.parquet --model runs/kd

    Args:
        data: a SOURCE with hard labels, or with texts, chats or tokens for a language model.
        model: the folder of a run, or a SPEC with a checkpoint.
        labels: a store of the same data, to compare the model with.
        batch_size: images per forward pass, absent: 256; of a language model tokens, absent: 8192.
        precision: of the forward pass.
        missing: what to do with samples without a row in the store.
        workers: decoding processes.
        device: auto, cpu, cuda or cuda:N.
        activation: of the model's outputs; absent: that of the store, of the run, or what the labels are.
        out: JSON file for the metrics; the settings are written beside it.
    """
    options = dict(locals())
    from json import dumps

    if out is not None:
        path = Path(require_local(out, "--out"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot create its folder: {error.strerror}") from error

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
        activation=activation,
    )
    print(found)
    if out is not None:
        path.write_text(dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
        write_config(path.with_name(f"{path.stem}.config.yaml"), options)
    return 0
