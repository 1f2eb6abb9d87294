"""A teacher-assistant chain (Mirzadeh et al. 2019, "Improved knowledge distillation via teacher assistant").

A small student learns less from a teacher that is far larger than from one a little larger than itself. So the teacher
teaches an assistant, the assistant the next one, and the last one the student. Every link is two steps: the soft labels
of the one above, once; the one below, trained from them. The student that learns from the teacher directly is trained
too, for comparison. A chain that was interrupted goes on where it was.

    python pipelines/teacher_assistant.py --out chain
    python pipelines/teacher_assistant.py --data train.parquet --eval-data test.parquet --out chain \\
        --teacher zoo:resnet56@resnet56.th --assistant zoo:resnet20 --student zoo:resnet8 --epochs 30
"""

import argparse
import logging
import re
from pathlib import Path

import softlabel
from softlabel.evaluation.plots import plot_runs

SMALL = "?resize=16&crop=16"  # of the digits


def name_of(spec: str) -> str:
    """zoo:resnet20@weights.th -> resnet20; run:runs/teacher -> teacher."""
    name = re.split(r"[@?]", spec)[0].rstrip("/")
    return re.split(r"[/:]", name)[-1]


class Chain:
    """Where things are, and the two steps of a link."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)

    def labels(self, teacher: str) -> str:
        """The soft labels of a teacher for all the data, labelled or not."""
        store = self.out / "labels" / name_of(teacher)
        softlabel.generate(
            self.options.data, teachers=[teacher], out=store, temperature=self.options.temperature, progress=False
        )
        return str(store)

    def train(self, spec: str, run: str, labels: str | None = None) -> str:
        """Train one of the chain, from soft labels or (the first teacher) from hard ones alone; its SPEC."""
        options = self.options
        weights = {"soft_weight": options.soft_weight, "hard_weight": 1 - options.soft_weight} if labels else {}
        config = softlabel.TrainConfig(
            data=options.data,
            eval_data=options.eval_data,
            student=spec,
            out=str(self.out / "runs" / run),
            labels=labels,
            epochs=options.epochs,
            batch_size=options.batch_size,
            lr=options.lr,
            augment=options.augment,
            precision=options.precision,
            seed=options.seed,
            **weights,
        )
        softlabel.train(config)
        return f"run:{config.out}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits?rows=0:1297", help="a SOURCE")
    parser.add_argument("--eval-data", default="digits?rows=1297:1797", help="a SOURCE that is not trained on")
    parser.add_argument("--teacher", default=f"zoo:resnet20{SMALL}", help="a SPEC; without a checkpoint it is trained")
    parser.add_argument("--assistant", nargs="+", default=[f"zoo:resnet14{SMALL}"], help="SPECs, the largest first")
    parser.add_argument("--student", default=f"zoo:cnn2{SMALL}", help="a SPEC")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--soft-weight", type=float, default=0.9, help="the rest is the hard labels'")
    parser.add_argument("--epochs", type=int, default=8, help="of every training")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--augment", default="crop", choices=["crop-flip", "crop", "none"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("chain"), help="folder for everything that this writes")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    chain = Chain(options)

    ready = "@" in options.teacher or options.teacher.startswith("run:")
    teacher = options.teacher if ready else chain.train(options.teacher, "teacher")
    print(f"teacher {name_of(options.teacher)}: {'as it is' if ready else 'trained'}, {teacher}")

    above, runs = teacher, {}
    for number, spec in enumerate([*options.assistant, options.student], 1):
        last = number > len(options.assistant)
        run = "student" if last else f"assistant-{number}"
        learned_from, above = above, chain.train(spec, run, chain.labels(above))
        runs[run] = above
        print(f"{run} {name_of(spec)}: learned from {name_of(learned_from)}, {above}")
    runs["student, without assistants"] = chain.train(options.student, "direct", chain.labels(teacher))
    runs["student, hard labels alone"] = chain.train(options.student, "hard")

    print(f"\n{'on ' + options.eval_data:<36}{'accuracy':>10}{'cross-entropy':>16}")
    for name, spec in {"teacher": teacher, **runs}.items():
        found = softlabel.evaluate(spec, options.eval_data, progress=False)
        print(f"{name:<36}{found.accuracy:>10.4f}{found.cross_entropy:>16.4f}")
    drawn = {name: spec.removeprefix("run:") for name, spec in runs.items()}
    print(f"\ncurves  {plot_runs(drawn, chain.out / 'curves.png', title='A teacher-assistant chain')}")


if __name__ == "__main__":
    main()
