"""Training and the command line on a CUDA device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabel
from softlabel.training.embedding_losses import EMBEDDING_LOSSES
from softlabel.training.losses import LOSSES
from softlabel.views import CropFlip
from tests.support.commands import run_softlabel
from tests.support.datasets import write_dataset
from tests.support.teachers import write_teacher
from tests.support.training_runs import ROWS, make_config, read_history, write_digits, write_features

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def test_a_student_learns_as_on_the_cpu(digits: Path, tmp_path: Path, device: str) -> None:
    losses = []
    for name in ("cpu", device):
        softlabel.train(make_config(digits, tmp_path / f"run-{name}", device=name, epochs=2, seed=1))
        losses.append([float(row["loss"]) for row in read_history(tmp_path / f"run-{name}")])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1][1] < losses[1][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"temperature": [1.0, 4.0]},
        {"temperature": [1.0, 4.0], "stack": "on", "precision": "fp32"},
        {"lr": [0.001, 0.003], "optimizer": "adamw", "stack": "auto"},
        {"lr": [0.001, 0.003], "optimizer": "dot"},
    ],
    ids=str,
)
def test_ways_to_train(digits: Path, tmp_path: Path, device: str, changes: dict[str, Any]) -> None:
    if device == "cpu" and changes.get("precision") == "fp16":
        pytest.skip("needs a CUDA device: training in float16")
    softlabel.train(make_config(digits, tmp_path / "run", device=device, epochs=2, **changes))
    several = any(isinstance(value, list) for value in changes.values())
    assert len(list((tmp_path / "run").glob("*/model.safetensors" if several else "model.safetensors"))) == 1 + several
    if not several:
        losses = [float(row["loss"]) for row in read_history(tmp_path / "run")]
        assert losses[1] < losses[0]


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"confidence": "0.1:0.99", "fix_labels": "swap"}], ids=str)
def test_every_loss_is_that_of_the_cpu(digits: Path, tmp_path: Path, device: str, changes: dict[str, Any]) -> None:
    smooth = "python:tests.support.students:build_smooth_student?resize=16&crop=16"
    rest = {"student": smooth, "loss": list(LOSSES), "epochs": 2, "lr": 0.001, "precision": "fp32", **changes}
    for name in ("cpu", device):
        softlabel.train(make_config(digits, tmp_path / name, device=name, **rest))
    for loss in LOSSES:
        there, here = (read_history(tmp_path / name / loss)[-1] for name in (device, "cpu"))
        for name in ("loss", "soft_loss", "hard_loss"):
            assert float(there[name]) == pytest.approx(float(here[name]), rel=1e-3, abs=1e-4), (loss, name)


def test_every_loss_on_embeddings_is_that_of_the_cpu(digits: Path, tmp_path: Path, device: str) -> None:
    write_features(tmp_path / "store", np.random.default_rng(0).normal(size=(ROWS, 12)), labels=True)
    names = [name for name in EMBEDDING_LOSSES if name != "simkd"]  # of the teacher's last layer, on this path mse's
    student = "zoo:resnet8?resize=16&crop=16&attention=layer2,layer3"
    rest = {"labels": tmp_path / "store", "embedding_loss": names, "epochs": 2, "lr": 0.001, "precision": "fp32"}
    for name in ("cpu", device):
        settings = make_config(digits, tmp_path / name, device=name, student=student, augment="none", **rest)
        softlabel.train(settings)
    for loss in names:
        there, here = (read_history(tmp_path / name / loss)[-1] for name in (device, "cpu"))
        assert float(there["embedding_loss"]) == pytest.approx(float(here["embedding_loss"]), rel=1e-2), loss


@pytest.mark.parametrize("views", [False, True])
def test_images_on_the_device_are_those_of_the_host(digits: Path, tmp_path: Path, device: str, views: bool) -> None:
    labels = digits / "store"
    if views:
        labels, teacher = tmp_path / "views", write_teacher(tmp_path / "w.safetensors", num_classes=10)
        made: dict[str, Any] = {"views": 2, "augment": "crop-flip", "temperature": 1.0, "progress": False}
        softlabel.generate(digits / "data.parquet", teachers=[teacher], out=labels, device=device, **made)
    chosen: dict[str, Any] = {"batch_size": 32, "seed": 5, "augment": None if views else CropFlip(), "check_views": 1}
    hosts, devices = (
        softlabel.SoftLabelLoader(digits / "data.parquet", labels, cache_device=where, **chosen)
        for where in (None, device)
    )
    for _ in range(3):
        for host, there in zip(hosts, devices, strict=True):
            assert there.inputs.device.type == device.split(":")[0]
            assert (there.inputs.cpu() == host.inputs).all()
            assert list(there.keys) == list(host.keys)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "cache": "device", "clip_norm": 0.5, "ema": 0.9},
        {"precision": "fp16"},
        {"optimizer": "adamw", "label_smoothing": 0.1},
        {"labels": None, "mixup": 0.2},
        {"student": "python:tests.support.students:build_dropout_student?resize=16&crop=16"},
        {"temperature": [1.0, 4.0], "precision": "fp32", "stack": "on"},
        {"compile": True},
    ],
    ids=str,
)
def test_steps_as_a_cuda_graph_are_eager_steps(
    digits: Path, tmp_path: Path, cuda: str, changes: dict[str, Any]
) -> None:
    histories = []
    for step in ("eager", "graph"):
        softlabel.train(make_config(digits, tmp_path / step, device=cuda, epochs=3, step=step, **changes))
        folder = tmp_path / step / "T4" if "temperature" in changes else tmp_path / step
        histories.append([float(row["loss"]) for row in read_history(folder)])
    # Dropout draws the same numbers, so that this holds of it, too.
    assert histories[1] == pytest.approx(histories[0], rel=1e-2)


def test_a_network_that_looks_at_the_device_is_refused_as_a_cuda_graph(digits: Path, tmp_path: Path, cuda: str) -> None:
    student = "python:tests.support.students:build_branching_student?resize=16&crop=16"
    given: dict[str, Any] = {"device": cuda, "epochs": 2, "student": student}
    with pytest.raises(softlabel.errors.UsageError, match="cannot be captured as a CUDA graph"):
        softlabel.train(make_config(digits, tmp_path / "graph", step="graph", **given))
    softlabel.train(make_config(digits, tmp_path / "auto", step="auto", **given))
    assert not (tmp_path / "auto" / "steps.json").exists()


def test_a_compiled_student_learns(digits: Path, tmp_path: Path, cuda: str) -> None:
    softlabel.train(make_config(digits, tmp_path / "run", device=cuda, epochs=2, compile=True))
    losses = [float(row["loss"]) for row in read_history(tmp_path / "run")]
    assert losses[1] < losses[0]


def test_the_command_line(tmp_path: Path, device: str) -> None:
    pytest.importorskip("jsonargparse", reason="the command line needs jsonargparse; `make gpu-wheels` brings it")
    data = write_dataset(tmp_path / "images.parquet", 48)
    teacher = write_teacher(tmp_path / "w.safetensors")
    labels, run = tmp_path / "labels", tmp_path / "run"
    common = ("--device", device)
    run_softlabel("generate", "--data", data, "--teacher", teacher, "--out", labels, *common)
    run_softlabel("verify", labels, "--recompute", "8", *common)
    run_softlabel(
        "train", "--data", data, "--labels", labels, "--student", "zoo:resnet8", "--epochs", 1, "--out", run, *common
    )
    done = run_softlabel("evaluate", "--data", data, "--model", run, *common)
    assert "accuracy" in done.stdout


def test_a_worker_of_a_cluster_has_the_device(tmp_path: Path, device: str) -> None:
    pytest.importorskip("jsonargparse", reason="the command line needs jsonargparse; `make gpu-wheels` brings it")
    pytest.importorskip("distributed", reason="a cluster needs Dask; `make gpu-wheels` brings it")
    data = write_dataset(tmp_path / "images.parquet", 48)
    teacher = write_teacher(tmp_path / "w.safetensors")
    softlabel.generate(data, teachers=[teacher], out=tmp_path / "here", shard_rows=16, device=device, progress=False)
    options = ("--shard-rows", 16, "--device", device, "--cluster", "local", "--cluster-workers", 1)
    run_softlabel("generate", "--data", data, "--teacher", teacher, "--out", tmp_path / "there", *options)
    with softlabel.open_store(tmp_path / "here") as one, softlabel.open_store(tmp_path / "there") as other:
        assert (one.take(range(48)).scaled_logits == other.take(range(48)).scaled_logits).all()
