"""What training from cached labels costs: resnet8 on CIFAR JPEG images, batch 256.

python -m tests.benchmarks.bench_train [--rows 5120] [--repeats 5] [--precision fp32]

Prints medians of interleaved runs: a step with soft labels beside one with hard labels alone; an epoch from cached
labels beside one that runs the teacher (resnet56) for every batch; four students in one pass beside four passes, and
how often images were decoded and rows of labels read.
"""

import argparse
import logging
import tempfile
from pathlib import Path
from unittest import mock

import torch

import softlabel
from softlabel.inputs import batch as input_batch
from softlabel.models.teacher import load_teacher
from softlabel.store.reader import Store
from tests.benchmarks.student_steps import TEMPERATURE, build_steps
from tests.benchmarks.timing import interleaved
from tests.support.shared_data import require_shared_data
from tests.support.stores import draw_logits, write_logits

STUDENT, BATCH = "zoo:resnet8", 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5120, help="images of an epoch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    options = parser.parse_args()
    shared = require_shared_data()
    logging.disable(logging.WARNING)
    data = f"{shared / 'cifar10-jpeg' / 'train.parquet'}?rows=0:{options.rows}"
    print(f"{STUDENT}, batch {BATCH}, {options.precision}, {torch.get_num_threads()} threads, {options.rows:,} images")
    with tempfile.TemporaryDirectory(prefix="softlabel-bench-") as folder:
        source = softlabel.open_source(data)
        # Whose labels these are makes no difference to the time.
        write_logits(Path(folder) / "store", source.keys(), draw_logits(len(source), 10), temperature=TEMPERATURE)
        labels = str(Path(folder) / "store")
        teacher = f"zoo:resnet56@{shared / 'cifar10-resnets' / 'resnet56-jpeg.safetensors'}"
        steps(data, labels, teacher, options.precision, options.repeats)
        passes(data, labels, Path(folder), options.precision, options.repeats)


def steps(data: str, labels: str, teacher_spec: str, precision: str, repeats: int, count: int = 6) -> None:
    """Steps of the trainer, from the loader to the optimiser, images and labels cached."""
    teacher = load_teacher(teacher_spec, precision=precision)  # type: ignore[arg-type]
    sides = build_steps(
        data, labels, teacher, STUDENT, classes=10, batch=BATCH, count=count, precision=precision, device="cpu"
    )
    ms = {name: 1e3 * seconds / count for name, seconds in interleaved(sides, repeats).items()}
    named = {"hard": "hard labels", "soft": "cached soft labels", "online": "teacher on line"}
    print("ms a step: " + ", ".join(f"{named[kind]} {value:.1f}" for kind, value in ms.items()))
    print(f"soft / hard = {ms['soft'] / ms['hard']:.3f}   (goal: at most 1.03)")
    print(f"cached / on line = {ms['soft'] / ms['online']:.3f}   (goal: at most 0.25)")


def passes(data: str, labels: str, folder: Path, precision: str, repeats: int) -> None:
    """One epoch of four students, everything included: opening, decoding, training, writing the run folders."""
    temperatures, number = [1.0, 2.0, 4.0, 8.0], [0]

    def train(temperature: float | list[float]) -> None:
        number[0] += 1
        softlabel.train(
            softlabel.TrainConfig(
                data=data,
                labels=labels,
                student=STUDENT,
                out=str(folder / f"run-{number[0]}"),
                epochs=1,
                batch_size=BATCH,
                temperature=temperature,
                precision=precision,  # type: ignore[arg-type]
                tensorboard=False,
                progress=False,
                device="cpu",
            )
        )

    def apart() -> None:
        for temperature in temperatures:
            train(temperature)

    for name, side in (("one pass", lambda: train(temperatures)), ("four passes", apart)):
        take, decode = Store.take, input_batch.decode_hashed
        with (
            mock.patch.object(Store, "take", autospec=True, side_effect=take) as taken,
            mock.patch.object(input_batch, "decode_hashed", side_effect=decode) as decoded,
        ):
            side()
        rows = sum(len(call.args[1]) for call in taken.call_args_list)
        print(f"{name}: {decoded.call_count:,} images decoded, {rows:,} rows of labels read")
    seconds = interleaved({"one": lambda: train(temperatures), "four": apart}, repeats, warmup=0)
    print(f"four students, one epoch: one pass {seconds['one']:.1f} s, four passes {seconds['four']:.1f} s")
    print(f"one pass / four passes = {seconds['one'] / seconds['four']:.3f}   (goal: at most 0.85)")


if __name__ == "__main__":
    main()
