"""Labels that a CUDA device gives are those of the CPU, whatever overlaps, and however memory is short."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import softlabel
from softlabel.inputs.base import Inputs
from softlabel.models import build_model
from softlabel.models.teacher import load_teacher
from tests.support.datasets import write_dataset
from tests.support.teachers import write_teacher

pytestmark = pytest.mark.gpu

ROWS = 96
# Largest difference between the two devices over the largest logit: sums in another order, and bfloat16's 8 bits.
FP32, STACKED, FP16, BF16 = 2e-5, 1e-4, 0.02, 0.1


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images.parquet and the weights of three teachers."""
    folder = tmp_path_factory.mktemp("ready")
    write_dataset(folder / "images.parquet", ROWS)
    for seed in range(3):
        write_teacher(folder / f"{seed}.safetensors", seed=seed)
    return folder


def teachers(ready: Path, count: int) -> list[str]:
    return [f"zoo:resnet8@{ready / f'{seed}.safetensors'}" for seed in range(count)]


def generate(ready: Path, out: Path, *, members: int = 1, data: object = None, **options: Any) -> np.ndarray:
    """Label the images and read their scaled logits, float64 (N, C)."""
    settings = {"batch_size": 16, "shard_rows": 40, "encoding": "float32", "progress": False, "temperature": 1.0}
    softlabel.generate(
        ready / "images.parquet" if data is None else data,
        teachers=teachers(ready, members),
        out=out,
        **settings | options,  # type: ignore[arg-type]
    )
    with softlabel.open_store(out, verify="full") as store:
        return np.array(store.take(np.arange(len(store))).scaled_logits, dtype=np.float64)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32), ("fp16", FP16), ("bf16", BF16)])
def test_a_teacher_answers_as_on_the_cpu(tmp_path: Path, device: str, precision: Any, tolerance: float) -> None:
    torch.manual_seed(0)
    torch.save(build_model("zoo:resnet20").state_dict(), tmp_path / "w.pt")
    images_BCHW = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    expected_BC = load_teacher(f"zoo:resnet20@{tmp_path}/w.pt").logits(Inputs.single(images_BCHW)).double()
    teacher = load_teacher(f"zoo:resnet20@{tmp_path}/w.pt", device=device, precision=precision)
    found_BC = teacher.logits(Inputs.single(images_BCHW))
    assert found_BC.device.type == device
    assert float((found_BC.double().cpu() - expected_BC).abs().max() / expected_BC.abs().max()) < tolerance


def test_evaluate_agrees_with_a_teacher_s_own_labels(ready: Path, tmp_path: Path, device: str) -> None:
    generate(ready, tmp_path / "store", device=device)
    (teacher,) = teachers(ready, 1)
    found = softlabel.evaluate(teacher, ready / "images.parquet", tmp_path / "store", device=device, batch_size=16)
    assert found.agreement == 1.0
    # TF32 moves logits by 1e-3, which is 1e-7 nats and more; another order of sums by 1e-6.
    assert found.teacher_kl == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0},
        {"workers": 2},
        {"stack": "yes"},
        {"members_in_turn": "yes"},
        {"batch_size": 7},
        {"views": 2, "augment": "crop-flip"},
        {"combine": "keep"},
        {"encoding": "float16"},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_labels_equal_those_of_the_cpu(ready: Path, tmp_path: Path, device: str, options: dict[str, Any]) -> None:
    shared = {name: options[name] for name in ("views", "augment", "combine", "encoding") if name in options}
    expected = generate(ready, tmp_path / "cpu", members=2, device="cpu", **shared)
    found = generate(ready, tmp_path / "device", members=2, device=device, **options)
    # Of float16 labels two may round to neighbours; a stacked network's grouped convolutions sum in another order.
    tolerance = 1e-3 if shared.get("encoding") == "float16" else STACKED if "stack" in options else FP32
    assert difference(found, expected) <= tolerance


def test_bf16_labels_lie_near_those_in_float32(ready: Path, tmp_path: Path, device: str) -> None:
    expected = generate(ready, tmp_path / "fp32", device=device)
    found = generate(ready, tmp_path / "bf16", device=device, precision="bf16")
    assert 0 < difference(found, expected) <= BF16


def test_two_runs_are_bit_identical(ready: Path, tmp_path: Path, device: str) -> None:
    one, other = (generate(ready, tmp_path / name, members=3, device=device, workers=2) for name in ("one", "other"))
    assert np.array_equal(one, other)


def overflowing() -> torch.nn.Module:
    """Logits that are fine in float32 and infinite in float16."""
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4))
    with torch.no_grad():
        model[2].weight.fill_(6e4)
        model[2].bias.copy_(torch.arange(4.0))
    return model


def test_an_overflow_in_float16_is_refused_by_name(ready: Path, tmp_path: Path, device: str) -> None:
    torch.save(overflowing().state_dict(), tmp_path / "w.pt")
    spec = f"python:tests.gpu.test_labels_gpu:overflowing@{tmp_path / 'w.pt'}?crop=32&mean=0&std=0.01"
    with pytest.raises(softlabel.SoftLabelError, match=r"not finite.*--precision fp32"):
        softlabel.generate(
            ready / "images.parquet",
            teachers=[spec],
            out=tmp_path / "labels",
            device=device,
            precision="fp16",
            progress=False,
            preflight=False,
        )


def test_evaluating_the_teacher_on_its_own_labels_finds_no_difference(ready: Path, tmp_path: Path, device: str) -> None:
    """fp32 means float32 on both sides: a convolution in TF32 on one of them would show here."""
    generate(ready, tmp_path / "labels", device=device)
    found = softlabel.evaluate(
        teachers(ready, 1)[0], ready / "images.parquet", tmp_path / "labels", device=device, progress=False
    )
    assert found.agreement == 1.0
    assert found.teacher_kl is not None
    assert abs(found.teacher_kl) < 1e-8


class Watched(Dataset[tuple[Tensor, int]]):
    """Images of which one turns PyTorch's search for hidden synchronisation on, and a later one off."""

    def __init__(self, rows: int, first: int, last: int) -> None:
        self.images = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8)
        self.first, self.last = first, last

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in (self.first, self.last):
            torch.cuda.set_sync_debug_mode("error" if index == self.first else "default")
        return self.images[index], index % 4


@pytest.mark.parametrize("members", [1, 2])
def test_the_loop_never_makes_the_host_wait(ready: Path, tmp_path: Path, cuda: str, members: int) -> None:
    try:
        generate(
            ready,
            tmp_path / "labels",
            members=members,
            data=Watched(1024, 320, 960),
            device=cuda,
            workers=0,
            preflight=False,
            shard_rows=512,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_memory_halves_the_batch(
    ready: Path, tmp_path: Path, cuda: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = generate(ready, tmp_path / "roomy", device=cuda, batch_size=4, preflight=False)
    torch.cuda.empty_cache()
    # Batches of 4096 images, padded, do not fit into this much; smaller ones do.
    limit = 192 * 2**20 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        with caplog.at_level(logging.WARNING, "softlabel"):
            found = generate(ready, tmp_path / "narrow", device=cuda, batch_size=4096, preflight=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with batches of 4096: continuing with 2048" in caplog.text
    assert difference(found, expected) <= FP32
