"""What soft labels of unlabelled images are worth: 1,000 labels and 49,000 unlabelled CIFAR JPEG images.

python -m tests.benchmarks.experiment_semi [--steps 4000] [--seeds 0 1 2] [--precision bf16] --out FOLDER

The teacher is resnet56. One student learns from the 1,000 labelled images alone, the other from these and 49,000 images
without labels, mixed 1:7 in every batch, by the teacher's soft labels; both make the same number of steps. Prints the
test accuracy of each, mean and spread over seeds. What is in FOLDER already is taken as it is, or resumed.
"""

import argparse
import logging
import os
import statistics
import sys
from pathlib import Path

import softlabel

STUDENT, BATCH, LABELLED = "zoo:resnet8", 128, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="of the optimiser, for every student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, required=True, help="keep the store and the runs here")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    shared = Path(os.environ.get("SOFTLABEL_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not shared.is_dir():
        sys.exit(f"{shared}: no such folder; set SOFTLABEL_DATA to the folder with cifar10-jpeg and cifar10-resnets")
    train, test = (shared / "cifar10-jpeg" / f"{split}.parquet" for split in ("train", "test"))
    softlabel.generate(
        train,
        teachers=[f"zoo:resnet56@{shared / 'cifar10-resnets' / 'resnet56-jpeg.safetensors'}"],
        temperature=4.0,
        precision=options.precision,
        out=options.out / "labels",
    )
    few, many = f"{train}?rows=0:{LABELLED}", f"{train}?label=none&rows={LABELLED}:50000"
    arms: dict[str, dict[str, object]] = {
        "1,000 labels alone": {"data": few},
        "and 49,000 images through soft labels": {
            "data": [few, many],
            "mix": "1:7",
            "labels": str(options.out / "labels"),
            "soft_weight": 0.9,
            "hard_weight": 0.1,
        },
    }
    # An epoch sees the labelled images once: alone in 7 steps of 128, one in eight of a batch in 62.
    steps = {"1,000 labels alone": LABELLED // BATCH, "and 49,000 images through soft labels": 8 * LABELLED // BATCH}
    print(f"{STUDENT}, {options.steps:,} steps of {BATCH}, {options.precision}, seeds {options.seeds}: test accuracy")
    for number, (arm, settings) in enumerate(arms.items()):
        found = []
        for seed in options.seeds:
            epochs = round(options.steps / steps[arm])
            config = softlabel.TrainConfig(
                student=STUDENT,
                out=str(options.out / f"arm-{number}-seed-{seed}-{options.steps}"),
                epochs=epochs,
                batch_size=BATCH,
                warmup_epochs=epochs / 20,
                eval_every=epochs,
                precision=options.precision,
                seed=seed,
                tensorboard=False,
                **settings,  # type: ignore[arg-type]
            )
            softlabel.train(config)
            accuracy = softlabel.evaluate(config.out, test, precision=options.precision, progress=False).accuracy
            assert accuracy is not None
            found.append(accuracy)
        spread = statistics.stdev(found) if len(found) > 1 else float("nan")
        listed = "  ".join(f"{value:.4f}" for value in found)
        print(f"{arm}: mean {statistics.mean(found):.4f}, standard deviation {spread:.4f}   ({listed})", flush=True)


if __name__ == "__main__":
    main()
