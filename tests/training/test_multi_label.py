"""Students with independent outputs learn on real images: two of scikit-learn's digits side by side, ten labels.

N samples, C classes.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import softlabel
from softlabel.errors import MismatchError, UsageError
from softlabel.evaluation.multi_label import MultiLabelEvaluation
from softlabel.models import build_model
from softlabel.training import train
from tests.support.commands import run_softlabel

STUDENT = "zoo:resnet8?crop=16&mean=0&std=1"


def write_pairs(path: Path, digits: slice, count: int, seed: int, unknown: float = 0.0) -> str:
    """Pairs of digits, 16x16 with a border; some of the ten labels are not known. Returns the SOURCE."""
    found, rng = load_digits(), np.random.default_rng(seed)
    images, numbers = (found.images[digits] * (255 / 16)).astype(np.uint8), found.target[digits]
    left, right = rng.integers(0, len(images), (2, count))
    pairs = np.pad(np.concatenate([images[left], images[right]], axis=2), ((0, 0), (4, 4), (0, 0)))
    labels = np.zeros((count, 10), np.int8)
    for side in (left, right):
        labels[np.arange(count), numbers[side]] = 1
    labels[rng.random(labels.shape) < unknown] = -1
    np.savez(path, images=pairs, labels=labels)
    return f"{path}?images=images&labels=labels"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that has learnt from labels of which a tenth is unknown, its labels, and a student of it."""
    folder = tmp_path_factory.mktemp("pairs")
    data = write_pairs(folder / "train.npz", slice(0, 1200), 1600, 0, unknown=0.1)
    test = write_pairs(folder / "test.npz", slice(1200, None), 300, 1)
    shared = {
        "epochs": 3,
        "batch_size": 32,
        "augment": "none",
        "device": "cpu",
        "progress": False,
        "tensorboard": False,
    }
    train(softlabel.TrainConfig(data=data, eval_data=test, student=STUDENT, out=str(folder / "teacher"), **shared))  # type: ignore[arg-type]
    softlabel.generate(
        data,
        teachers=[f"run:{folder / 'teacher'}"],
        activation="sigmoid",
        temperature=2,
        out=folder / "labels",
        device="cpu",
        progress=False,
    )
    student = softlabel.TrainConfig(
        data=data,
        eval_data=test,
        labels=str(folder / "labels"),
        student=STUDENT,
        out=str(folder / "student"),
        accumulate=2,
        select="best",
        **shared,  # type: ignore[arg-type]
    )
    train(student)
    return folder


def source(ready: Path, name: str) -> str:
    return f"{ready / name}.npz?images=images&labels=labels"


def answers(ready: Path, run: str, name: str) -> tuple[Any, Any]:
    """Logits of a plain forward pass, float64 (N, C), and the labels."""
    with np.load(ready / f"{name}.npz") as found:
        images, labels = torch.from_numpy(found["images"]), found["labels"]
    model = build_model(f"run:{ready / run}").eval()
    with torch.inference_mode():
        return model(images[:, None].repeat(1, 3, 1, 1).float() / 255).double().numpy(), labels


def test_the_student_learns(ready: Path) -> None:
    with (ready / "student" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["eval_map"]) > 0.7  # a fifth of the labels are positive
    assert float(rows[-1]["soft_loss"]) < float(rows[0]["soft_loss"]) / 2
    assert float(rows[-1]["train_accuracy"]) > 0.85
    assert rows[-1]["eval_accuracy"] == rows[-1]["teacher_agreement"] == ""
    assert json.loads((ready / "student" / "model.json").read_text())["activation"] == "sigmoid"


def test_figures_against_plain_sums(ready: Path) -> None:
    found = softlabel.evaluate(ready / "student", source(ready, "train"), ready / "labels", progress=False)
    assert isinstance(found, MultiLabelEvaluation)
    z, y = answers(ready, "student", "train")
    t, _ = answers(ready, "teacher", "train")
    known, precisions, areas, f1 = y >= 0, [], [], []
    for c in range(10):
        score, hit = z[known[:, c], c], y[known[:, c], c] == 1
        ranked = hit[np.argsort(-score)]
        precisions.append((np.cumsum(ranked) / np.arange(1, len(ranked) + 1))[ranked].mean())
        areas.append((score[hit][:, None] > score[~hit][None]).mean())
        f1.append(2 * (hit & (score > 0)).sum() / (hit.sum() + (score > 0).sum()))
    hits, calls = y[known] == 1, z[known] > 0
    assert found.mean_average_precision == pytest.approx(np.mean(precisions), abs=1e-5)
    assert found.auroc == pytest.approx(np.mean(areas), abs=1e-5)
    assert found.f1_macro == pytest.approx(np.mean(f1), abs=1e-6)
    assert found.f1_micro == pytest.approx(2 * (hits & calls).sum() / (hits.sum() + calls.sum()), abs=1e-6)
    assert found.cross_entropy == pytest.approx(np.logaddexp(0, np.where(hits, -z[known], z[known])).mean(), rel=1e-4)
    assert (found.map_classes, found.auroc_classes, found.classes) == (10, 10, 10)
    p, q = 1 / (1 + np.exp(-t / 2)), 1 / (1 + np.exp(-z / 2))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert found.teacher_kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.agreement == pytest.approx(((z > 0) == (t > 0)).mean(), abs=2e-3)
    edges = np.ceil(1 / (1 + np.exp(-z[known])) * 15).clip(1, 15)
    gaps = [abs((hits - 1 / (1 + np.exp(-z[known])))[edges == one].sum()) for one in range(1, 16)]
    assert found.calibration_error == pytest.approx(np.sum(gaps) / known.sum(), rel=1e-4)


def test_what_the_command_says(ready: Path) -> None:
    done = run_softlabel("evaluate", "--data", source(ready, "test"), "--model", ready / "student")
    assert [line.rsplit("  ", 1)[0].strip() for line in done.stdout.splitlines()] == [
        "samples",
        "mAP (10 of 10 classes)",
        "AUROC (10 of 10 classes)",
        "F1 (micro, at 0.5)",
        "F1 (macro, at 0.5)",
        "binary cross-entropy",
        "calibration error (15 bins)",
    ]


def test_what_does_not_go_together(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MismatchError, match="--activation says softmax, the run says sigmoid"):
        softlabel.evaluate(ready / "student", source(ready, "test"), activation="softmax", progress=False)
    narrow = tmp_path / "narrow.npz"
    with np.load(ready / "train.npz") as found:
        np.savez(narrow, images=found["images"], labels=found["labels"][:, :4])
    config = softlabel.TrainConfig(
        data=f"{narrow}?images=images&labels=labels",
        labels=str(ready / "labels"),
        student=STUDENT,
        out=str(tmp_path / "run"),
    )
    with pytest.raises(MismatchError, match=r"classes: the store has 10, the labels of .* 4"):
        train(config)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.metrics", None)
    with pytest.raises(UsageError, match=r"needs scikit-learn; pip install 'softlabel\[multilabel\]'"):
        softlabel.evaluate(ready / "student", source(ready, "test"), progress=False)
