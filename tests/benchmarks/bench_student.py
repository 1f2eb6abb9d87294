"""What distillation is worth, and what it costs: resnet8 on CIFAR JPEG images, teacher resnet56, a few seeds.

python -m tests.benchmarks.bench_student [--epochs 10] [--seeds 0 1 2] [--jobs 2] [--out FOLDER]

Prints test accuracy (mean, spread) of hard labels against soft labels, and what a step of either takes beside the bare
forward and backward pass. Runs that are in FOLDER already are taken as they are, unfinished ones resumed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

import softlabel
from softlabel.evaluation.plots import plot_runs
from softlabel.loader import SoftLabelLoader
from softlabel.loss import DistillationLoss
from softlabel.models import build_model
from softlabel.models.precision import computing
from softlabel.models.teacher import student_preprocessing
from softlabel.views import CropFlip
from tests.benchmarks.timing import interleaved
from tests.support.shared_data import require_shared_data

STUDENT, BATCH = "zoo:resnet8", 128
ARMS = {"hard labels": [], "soft labels": ["--soft-weight", "0.9", "--hard-weight", "0.1"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--precision", default="bf16", help="of teacher and student")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=None, help="keep the store and the runs here")
    options = parser.parse_args()
    shared = require_shared_data()
    out = options.out or Path(tempfile.mkdtemp(prefix="softlabel-bench-"))
    data, test = (shared / "cifar10-jpeg" / f"{split}.parquet" for split in ("train", "test"))
    store = out / f"labels-t{options.temperature:g}"
    softlabel.generate(
        data,
        teachers=[f"zoo:resnet56@{shared / 'cifar10-resnets' / 'resnet56-jpeg.safetensors'}"],
        temperature=options.temperature,
        precision=options.precision,
        out=store,
    )
    speed(data, store, options.precision)

    def accuracy(arm: str, seed: int) -> float:
        run = out / f"{arm.split()[0]}-t{options.temperature:g}-{options.epochs}-epochs-seed-{seed}"
        soft = ["--labels", str(store), *ARMS[arm]] if ARMS[arm] else []
        command = ["train", "--data", data, "--student", STUDENT, "--epochs", options.epochs, "--batch-size", BATCH]
        command += ["--precision", options.precision, "--seed", seed, "--device", "cpu", "--out", run, *soft]
        # Two runs with a thread each are faster than one after the other with two.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "softlabel", *map(str, command)], check=True, env=environment)
        found = softlabel.evaluate(run, test, progress=False).accuracy
        assert found is not None
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        pending = {arm: [pool.submit(accuracy, arm, seed) for seed in options.seeds] for arm in ARMS}
        results = {arm: [job.result() for job in jobs] for arm, jobs in pending.items()}
    print(f"{STUDENT}, {options.epochs} epochs of 50,000 images, batch {BATCH}, seeds {options.seeds}: test accuracy")
    for arm, values in results.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        listed = "  ".join(f"{value:.4f}" for value in values)
        print(f"{arm}: mean {statistics.mean(values):.4f}, standard deviation {spread:.4f}   ({listed})")
    gain = statistics.mean(results["soft labels"]) - statistics.mean(results["hard labels"])
    print(f"soft labels - hard labels = {gain:+.4f}   (goal: above 0)")
    curves = {
        f"{arm}, seed {seed}": out / f"{arm.split()[0]}-t{options.temperature:g}-{options.epochs}-epochs-seed-{seed}"
        for arm in ARMS
        for seed in options.seeds
    }
    print(f"curves: {plot_runs(curves, out / 'curves.png')}")


def speed(data: Path, store: Path, precision: str, steps: int = 20, repeats: int = 5) -> None:
    """Seconds of a step from the cached loader to the optimiser, beside the arithmetic that every training does."""
    preprocessing, device = student_preprocessing(STUDENT), torch.device("cpu")
    model = build_model(STUDENT, num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loaders = {
        "hard": SoftLabelLoader(data, batch_size=BATCH, augment=CropFlip()),
        "soft": SoftLabelLoader(data, store, batch_size=BATCH, augment=CropFlip()),
    }
    loss = DistillationLoss(temperature=4, soft_weight=0.9, hard_weight=0.1)
    fixed_BCHW = torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels_B = torch.randint(10, (BATCH,))

    def forward(images_BCHW: torch.Tensor) -> torch.Tensor:
        with computing(precision, device):
            logits_BC: torch.Tensor = model(images_BCHW)
        return logits_BC.float()

    def update(value: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    def bare() -> None:
        for _ in range(steps):
            update(F.cross_entropy(forward(fixed_BCHW), labels_B))

    def trained(kind: str) -> None:
        loader = loaders[kind]
        loader.set_epoch(0)
        for _, batch in zip(range(steps), loader, strict=False):
            images_BCHW = preprocessing.normalize(batch.inputs).contiguous(memory_format=torch.channels_last)
            logits_BC = forward(images_BCHW)
            update(
                F.cross_entropy(logits_BC, batch.labels)
                if batch.target is None
                else loss(logits_BC, batch.target, batch.labels)
            )

    def loading() -> None:
        loader = loaders["soft"]
        loader.set_epoch(0)
        for _ in zip(range(steps), loader, strict=False):
            pass

    sides = {"bare": bare, "hard": lambda: trained("hard"), "soft": lambda: trained("soft"), "loading": loading}
    ms = {name: 1e3 * seconds / steps for name, seconds in interleaved(sides, repeats).items()}
    print(f"{STUDENT}, batch {BATCH}, {precision}, {torch.get_num_threads()} threads, images decoded: ms a step")
    print(
        f"bare forward, backward, update {ms['bare']:.1f}; hard labels {ms['hard']:.1f}; soft labels {ms['soft']:.1f}"
    )
    print(f"loading alone {ms['loading']:.2f}")
    print(f"soft / hard = {ms['soft'] / ms['hard']:.3f}; soft / bare = {ms['soft'] / ms['bare']:.3f}")


if __name__ == "__main__":
    main()
