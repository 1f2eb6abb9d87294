"""What soft labels of unlabelled images are worth: 1,000 labels and 49,000 unlabelled CIFAR JPEG images.

python -m tests.benchmarks.experiment_semi [--steps 2000] [--seeds 0 1 2] [--precision bf16] --out FOLDER

The teacher is resnet56. One student learns from the 1,000 labelled images alone, the other from these and 49,000 images
without labels, mixed 1:7 in every batch, by the teacher's soft labels; both make the same number of steps. Prints the
test accuracy of each, mean and spread over seeds. What is in FOLDER already is taken as it is, or resumed.
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import softlabel
from tests.support.shared_data import require_shared_data

STUDENT, BATCH, LABELLED = "zoo:resnet8", 128, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of the optimiser, for every student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, required=True, help="keep the store and the runs here")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    shared = require_shared_data()
    train, test = (shared / "cifar10-jpeg" / f"{split}.parquet" for split in ("train", "test"))
    softlabel.generate(
        train,
        teachers=[f"zoo:resnet56@{shared / 'cifar10-resnets' / 'resnet56-jpeg.safetensors'}"],
        temperature=4.0,
        precision=options.precision,
        out=options.out / "labels",
    )
    few, many = f"{train}?rows=0:{LABELLED}", f"{train}?label=none&rows={LABELLED}:50000"
    soft = ["--labels", options.out / "labels", "--soft-weight", "0.9", "--hard-weight", "0.1"]
    # Name -> steps of an epoch, which sees every labelled image once, and what is trained on.
    arms: dict[str, tuple[int, list[object]]] = {
        "1,000 labels alone": (LABELLED // BATCH, ["--data", few]),
        "and 49,000 images through soft labels": (
            8 * LABELLED // BATCH,
            ["--data", few, "--data", many, "--source-ratio", "1:7", *soft],
        ),
    }

    def accuracy(number: int, seed: int) -> float:
        steps, settings = list(arms.values())[number]
        epochs = round(options.steps / steps)
        run = options.out / f"arm-{number}-seed-{seed}-{options.steps}-steps"
        command = ["train", *settings, "--student", STUDENT, "--out", run, "--epochs", epochs, "--batch-size", BATCH]
        command += ["--warmup-epochs", epochs / 20, "--precision", options.precision, "--seed", seed]
        command += ["--checkpoint-minutes", "2", "--tensorboard", "false"]
        # Two runs with a thread each are faster than one after the other with two.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "softlabel", *map(str, command)], check=True, env=environment)
        found = softlabel.evaluate(run, test, precision=options.precision, progress=False).accuracy
        assert found is not None
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        pending = [[pool.submit(accuracy, number, seed) for seed in options.seeds] for number in range(len(arms))]
        results = [[job.result() for job in jobs] for jobs in pending]
    print(f"{STUDENT}, {options.steps:,} steps of {BATCH}, {options.precision}, seeds {options.seeds}: test accuracy")
    for arm, values in zip(arms, results, strict=True):
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        listed = "  ".join(f"{value:.4f}" for value in values)
        print(f"{arm}: mean {statistics.mean(values):.4f}, standard deviation {spread:.4f}   ({listed})")


if __name__ == "__main__":
    main()
