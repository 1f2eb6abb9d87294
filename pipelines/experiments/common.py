"""What the experiments share: the parts of the data, soft labels, students of one pass, results.

    options = make_parser(__doc__).parse_args()
    with Experiment(options) as experiment:
        labels = experiment.label("resnet56", [options.teacher])
        runs = {seed: experiment.train(f"kd/{seed}", labels=labels, student=..., seed=seed) for seed in options.seeds}
        experiment.finish([Row(name="kd", runs=runs)])

The training data are cut in two by the hash of their keys: students and teachers are trained on nine tenths, choices
are made on the last tenth, and `finish` looks at the test set, once, when all is trained. The weights are those of the
last epoch. The same command resumes; one with other settings is refused for the same folder.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import softlabel
from softlabel.common.atomic_file import write_atomically
from softlabel.errors import UsageError

CHOICES = "fold=1/10"  # of the training data: on what choices are made
MEASURED, RESULTS, SECONDS = "measured.json", "results.json", "seconds.json"


def data_folder() -> Path:
    """Where CIFAR-10 as JPEG files and its ResNets lie, see data/README.md."""
    return Path(os.environ.get("SOFTLABEL_DATA", "../shared/data"))


def find_resnet(name: str) -> str:
    """Return the SPEC of one of the given ResNets: ``resnet56-jpeg`` or ``resnet20-12fca82f``."""
    suffix = "safetensors" if name.endswith("-jpeg") else "th"
    return f"zoo:{name.partition('-')[0]}@{data_folder()}/cifar10-resnets/{name}.{suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the table: what was trained, by seed, and what else is known of it.

    Attributes:
        name: of the arm.
        runs: seed -> SPEC of the finished student; None where its loss was not finite.
        notes: further columns.
    """

    name: str
    runs: Mapping[int, str | None]
    notes: Mapping[str, str] = field(default_factory=dict)


def make_parser(doc: str, *, rows: int | None, epochs: int, lr: float = 0.1) -> argparse.ArgumentParser:
    """Return the options that every experiment has, with the defaults of one."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    cifar = data_folder() / "cifar10-jpeg"
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that this writes")
    parser.set_defaults(own_data=f"{cifar}/train.parquet", own_rows=rows)
    parser.add_argument("--data", help="a SOURCE, of which a tenth is for choices (default: CIFAR-10)")
    parser.add_argument("--test", default=f"{cifar}/test.parquet", help="a SOURCE that is looked at once, at the end")
    parser.add_argument("--rows", type=_count, help=f"first rows of the data (default: {rows or 'all'}, of others all)")
    parser.add_argument("--epochs", type=_count, default=epochs, help=f"of every training (default: {epochs})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--batch-size", type=_count, default=128)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--augment", default="crop-flip", choices=["crop-flip", "crop", "none"])
    parser.add_argument("--temperature", type=float, default=4.0, help="of the soft labels (default: 4)")
    parser.add_argument("--precision", default="bf16", choices=["auto", "fp32", "bf16"], help="default: bf16")
    return parser


def _count(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def run_page(main: Callable[[], None]) -> None:
    """Run an experiment as a program: an error that softlabel explains is one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        main()
    except softlabel.SoftLabelError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def add_option(source: str, option: str) -> str:
    """Return a SOURCE with one more option."""
    return f"{source}{'&' if '?' in source else '?'}{option}"


class Experiment:
    """The folder of an experiment, and the steps that all of them are made of.

    Attributes:
        out: the folder.
        data: the SOURCE of the training data.
        train_data: the SOURCE that students and teachers learn from.
        choice_data: the SOURCE on which choices are made.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)
        for name, given in vars(options).items():
            if isinstance(given, list) and len(set(map(str, given))) < len(given):
                raise UsageError(f"--{name.replace('_', '-')}: expected different values, found {given}")
        data, rows = options.data, options.rows
        if data is None:
            data, rows = options.own_data, rows or options.own_rows
        data = data if rows is None else add_option(data, f"rows=0:{rows}")
        self.data = data
        self.train_data, self.choice_data = add_option(data, f"without_{CHOICES}"), add_option(data, CHOICES)

    def __enter__(self) -> "Experiment":
        self._started = time.perf_counter()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out: expected a folder, found {self.out}: {error.strerror}") from error
        softlabel.open_source(self.options.test)  # before hours of training for it
        return self

    def __exit__(self, *_: object) -> None:
        _write_json(self.out / SECONDS, self._count_seconds())

    def label(self, name: str, teachers: Sequence[str], **settings: Any) -> str:
        """Return the store with the soft labels of the mean of teachers for the data that is learned from."""
        store = self.out / "labels" / name
        options = self.options
        settings = {"temperature": options.temperature, "precision": options.precision, **settings}
        if settings["precision"] == "auto":
            settings["precision"] = "fp32"
        made = softlabel.generate(self.train_data, teachers=teachers, out=store, progress=False, **settings)
        print(f"labels {name}: {made.total_rows:,} rows, {made.seconds:.0f} s", flush=True)
        return str(store)

    def train(self, name: str, *, seed: int, **settings: Any) -> dict[str, str | None]:
        """Train one or several students in one pass.

        Args:
            name: folder of the pass among the runs.
            seed: of its students.
            **settings: of `TrainConfig`, in place of those that the options give.

        Returns:
            Name of each student -> its SPEC; None where its loss was not finite.
        """
        options = self.options
        given: dict[str, Any] = {
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "lr": options.lr,
            "augment": options.augment,
            "precision": options.precision,
            "tensorboard": False,
            "progress": False,
            **settings,
        }
        out = self.out / "runs" / name / f"seed-{seed}"
        result = softlabel.train(softlabel.TrainConfig(data=self.train_data, out=str(out), seed=seed, **given))
        students = {one.name: None if one.failure else f"run:{one.out}" for one in result.students}
        failed = [f"; {one.name} was given up: {one.failure}" for one in result.students if one.failure]
        print(f"trained {name}, seed {seed}: {len(students)} in {result.seconds:.0f} s{''.join(failed)}", flush=True)
        return students

    def train_one(self, name: str, *, seed: int, **settings: Any) -> str | None:
        """Return the SPEC of the only student of a pass, see `train`."""
        (spec,) = self.train(name, seed=seed, **settings).values()
        return spec

    def measure(self, spec: str, data: str) -> float:
        """Return the accuracy of a model on a SOURCE; what was measured once is not measured again."""
        path = self.out / MEASURED
        known = json.loads(path.read_text()) if path.exists() else {}
        place = f"{spec.replace(str(self.out), 'OUT')} on {data}"
        if place not in known:
            known[place] = softlabel.evaluate(spec, data, progress=False).accuracy
            _write_json(path, known)
        return float(known[place])

    def choose(self, candidates: Mapping[str, str | None]) -> str:
        """Return the name of the candidate with the highest accuracy on the part for choices."""
        measured = {name: self.measure(spec, self.choice_data) for name, spec in candidates.items() if spec}
        return max(measured, key=lambda name: measured[name])

    def finish(self, rows: Sequence[Row], **facts: Any) -> None:
        """Measure every student on the test set, write `results.json`, and print the table.

        Args:
            rows: of the table.
            **facts: to keep in the file too.
        """
        done = []
        for row in rows:
            found = {
                seed: None if spec is None else self.measure(spec, self.options.test) for seed, spec in row.runs.items()
            }
            done.append({"name": row.name, "accuracy": found, **_summarise(list(found.values())), **row.notes})
        settings = {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(self.options).items()
        }
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.processor()}
        results = {"settings": settings, **facts, "rows": done, "seconds": self._count_seconds(), "machine": machine}
        _write_json(self.out / RESULTS, results)
        print(f"\n{format_table(done)}\n\n{self.out / RESULTS}: {results['seconds']:.0f} s of training and labelling")

    def _count_seconds(self) -> float:
        """Return the seconds of this call and of those before it."""
        path = self.out / SECONDS
        before = float(json.loads(path.read_text())) if path.exists() else 0.0
        return before + time.perf_counter() - self._started


def _summarise(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean and standard deviation over seeds; of what was given up there is none."""
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return {"mean": None, "sd": None}
    return {"mean": statistics.mean(found), "sd": statistics.stdev(found) if len(found) > 1 else None}


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of results in Markdown: test accuracy by seed, mean, standard deviation, notes."""
    seeds = list(rows[0]["accuracy"])
    notes = [name for name in rows[0] if name not in ("name", "accuracy", "mean", "sd")]
    head = ["", *(f"seed {seed}" for seed in seeds), "mean", "sd", *notes]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        numbers = [*row["accuracy"].values(), row["mean"], row["sd"]]
        shown = ["-" if number is None else f"{number:.4f}" for number in numbers]
        lines.append("| " + " | ".join([row["name"], *shown, *(str(row[name]) for name in notes)]) + " |")
    return "\n".join(lines)


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2).encode() + b"\n")
