"""Training runs on a small dataset of digits and its store: settings, results, and processes that can be killed."""

import csv
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from softlabel import TrainConfig, train
from softlabel.store.encodings import Float16, NoLabels
from softlabel.store.features import Attention, Embedding, Features, Tap
from softlabel.store.manifest import Combine, Member
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.processes import Process
from tests.support.stores import Samples, draw_logits, make_run, write_logits, write_store

ROWS = 120
STUDENT = "zoo:cnn2?resize=16&crop=16"


def make_keys(count: int) -> list[str]:
    return [f"{number:04d}.jpg" for number in range(count)]


def write_digits(folder: Path) -> Path:
    """data.parquet, unlabelled.parquet, and a store whose teacher is almost sure of the label."""
    images, labels = make_digit_jpegs()
    images, labels = images[:ROWS], labels[:ROWS]
    write_parquet(folder / "data.parquet", images, keys=make_keys(ROWS), labels=labels, class_names=DIGITS)
    write_parquet(folder / "unlabelled.parquet", images, keys=make_keys(ROWS))
    logits_NC = draw_logits(ROWS, 10) / 2
    logits_NC[np.arange(ROWS), labels] += 8
    write_logits(folder / "store", make_keys(ROWS), logits_NC, images=images, labels=labels, class_names=DIGITS)
    return folder


def write_features(root: Path, hidden_ND: NDArray[np.floating[Any]], *, labels: bool = False, members: int = 1) -> None:
    """A store of these embeddings and of random maps of 8x8 and 4x4 for the digits, of one teacher, or of several that
    are kept and alike; with random logits, or without any labels."""
    images, _ = make_digit_jpegs()
    rng, kept = np.random.default_rng(1), members > 1
    maps_NS = rng.random((ROWS, members * 80)).astype(np.float16)
    taps, modules = (Tap(module="", width=hidden_ND.shape[1]),) * members, (("layer2", "layer3"),) * members
    run = make_run(
        samples=ROWS,
        classes=10 if labels else 0,
        temperature=1.0,
        encoding=Float16() if labels else NoLabels(),
        members=(Member(spec="test", sha256="0" * 64, num_classes=10 if labels else 0),) * members,
        combine=Combine(rule="keep" if kept else "logits", weights=(1 / members,) * members),
        features=Features(
            embedding=Embedding(width=hidden_ND.shape[1], taps=taps, kept=kept),
            attention=Attention(heights=(8, 4), widths=(8, 4), modules=modules, kept=kept),
        ),
        shard_rows=ROWS,
    )
    columns = {"embedding": np.tile(hidden_ND, members)[None].astype(np.float16), "attention": maps_NS[None]}
    if labels:
        logits_NMC = rng.normal(size=(ROWS, members, 10))
        logits_NMC -= logits_NMC.max(axis=2, keepdims=True)
        columns["logits"] = logits_NMC.reshape(1, ROWS, -1).astype(np.float16)
    content = np.array([xxhash.xxh3_64_intdigest(image) for image in images[:ROWS]], np.uint64)
    samples = Samples(
        keys=make_keys(ROWS),
        labels=np.full(ROWS, -100),
        content=content,
        logits=np.zeros((1, 1, 10), np.float32),
        columns={column.name: columns[column.name] for column in run.columns},
    )
    write_store(root, run, samples, fidelity=None)


def make_settings(digits: Path, out: Path, **changes: object) -> dict[str, object]:
    given = {
        "data": digits / "data.parquet",
        "labels": digits / "store",
        "student": STUDENT,
        "out": out,
        "epochs": 3,
        "batch_size": 32,
        "lr": 0.003,
        "device": "cpu",
        "tensorboard": False,
        **changes,
    }
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def make_config(digits: Path, out: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**make_settings(digits, out, **changes))  # type: ignore[arg-type]


def read_weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def have_equal_weights(one: Path, other: Path) -> bool:
    a, b = read_weights(one), read_weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_history(run: Path) -> list[dict[str, str]]:
    """The metrics without what a clock says."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def start_training(given: dict[str, object]) -> Process:
    """Train in a process of its own."""
    return Process(_train, given)


def _train(given: dict[str, object]) -> None:
    train(TrainConfig(**given))  # type: ignore[arg-type]


def wait_for_file(path: Path, process: "Process | subprocess.Popen[str]", change: bytes = b"") -> None:
    """Until a file is there with a content other than `change`."""
    while process.poll() is None:
        if path.exists() and path.read_bytes() != change:
            return
        time.sleep(0.005)


def finish_training(given: dict[str, object]) -> None:
    process = start_training(given)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def train_in_ranks(given: dict[str, object], *, ranks: int) -> None:
    """Train in several processes with the variables that torchrun sets, forked, which start sooner."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [Process(_train_as_rank, given, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in range(ranks)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, errors


def _train_as_rank(given: dict[str, object], environment: dict[str, object]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    _train(given)
