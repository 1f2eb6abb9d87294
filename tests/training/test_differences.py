"""Students that learn from differences along noise: against a step written out, over parts and processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import softlabel
from softlabel import train
from softlabel.errors import MismatchError, UsageError
from softlabel.models import build_model
from softlabel.models.teacher import student_preprocessing
from tests.support.format_reader import read_shard
from tests.support.training_runs import (
    STUDENT,
    make_config,
    make_settings,
    read_history,
    read_weights,
    train_in_ranks,
    write_digits,
)

SMOOTH = "python:tests.support.students:build_smooth_student?resize=16&crop=16"
ROWS, T, WEIGHT, LR = 48, 4.0, 3.0, 0.05
PLAIN: dict[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "lr": LR,
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "epochs": 1,
    "batch_size": ROWS,
    "temperature": T,
    "difference_weight": WEIGHT,
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.parquet, and `pairs`, a store of 48 of its rows with two pairs of noisy copies each."""
    folder = write_digits(tmp_path_factory.mktemp("differences"))
    torch.manual_seed(0)
    model = build_model(STUDENT, num_classes=10)
    torch.save(model.state_dict(), folder / "teacher.pt")
    softlabel.generate(
        f"{folder}/data.parquet?rows=0:{ROWS}",
        teachers=[f"zoo:cnn2@{folder}/teacher.pt?resize=16&crop=16"],
        out=folder / "pairs",
        augment="crop-flip?padding=2&flip=false+noise-pair?step=8&directions=2",
        progress=False,
    )
    return folder


def options(digits: Path, **changes: Any) -> dict[str, Any]:
    return {**PLAIN, "data": f"{digits}/data.parquet?rows=0:{ROWS}", "labels": digits / "pairs", **changes}


def read_differences(store: Path) -> dict[str, np.ndarray]:
    """Of each key, (K, C), by a reader of the format of its own."""
    found = {}
    for path in (store / "shards").iterdir():
        row, columns = read_shard(str(path))
        found |= {key: columns["difference"][place].reshape(2, -1) for place, key in enumerate(row["key"])}
    return found


@pytest.mark.parametrize("how", ["whole", "parts", "processes"])
def test_a_step_is_its_formula(digits: Path, tmp_path: Path, how: str) -> None:
    """Weights after one step against float64, from pixels that a loader has compared with those of the teacher."""
    given = options(digits, student=SMOOTH, precision="fp32")
    train(make_config(digits, tmp_path / "before", **{**given, "lr": 0.0}))
    out = tmp_path / "after"
    if how == "processes":
        train_in_ranks(make_settings(digits, out, **given), ranks=2)
    else:
        train(make_config(digits, out, **given, accumulate=3 if how == "parts" else 1))
    preprocessing = student_preprocessing(SMOOTH)
    loader = softlabel.SoftLabelLoader(
        *(given["data"], digits / "pairs"), batch_size=ROWS, shuffle=False, preprocessing=preprocessing,
        also=("difference",), check_views=1,
    )  # fmt: skip
    (batch,) = loader
    loader.close()
    mean, std = (
        torch.tensor(one, dtype=torch.float64).view(3, 1, 1) for one in (preprocessing.mean, preprocessing.std)
    )
    model = build_model(SMOOTH, num_classes=10).double()
    model.load_state_dict({key: value.double() for key, value in read_weights(tmp_path / "before").items()})
    z, copies = model((batch.inputs / 255 - mean) / std), model((batch.copies.flatten(0, 1) / 255 - mean) / std)
    logits = batch.target.scaled_logits.double() * batch.target.temperature
    log_q, p = F.log_softmax(z / T, 1), F.softmax(logits / T, 1)
    loss = 0.9 * T**2 * (p * (p.log() - log_q)).sum(1).mean() + 0.1 * F.cross_entropy(z, batch.labels)
    copies_BJC = copies.view(ROWS, 4, 10)
    halved_BKC = (copies_BJC[:, ::2] - copies_BJC[:, 1::2]) / 2
    stored = read_differences(digits / "pairs")
    expected_BKC = torch.from_numpy(np.stack([stored[key] for key in batch.keys])).double()
    term = (halved_BKC - halved_BKC.mean(2, keepdim=True) - expected_BKC).square().mean()
    (loss + WEIGHT * term).backward()
    found = read_weights(out)
    for name, value in model.named_parameters():
        assert value.grad is not None
        moved = LR * value.grad
        bound = 2e-4 * float(moved.abs().max()) + 1e-7
        torch.testing.assert_close(found[name].double(), value.detach() - moved, rtol=0, atol=bound)
    if how != "processes":  # whose rows are shared out
        (row,) = read_history(out)
        assert float(row["difference_loss"]) == pytest.approx(term.item(), rel=1e-4)
        assert float(row["loss"]) == pytest.approx((loss + WEIGHT * term).item(), rel=1e-4)


def test_noise_leaves_no_trace_in_the_statistics(digits: Path, tmp_path: Path) -> None:
    for name, weight in (("with", WEIGHT), ("without", 0.0)):
        train(make_config(digits, tmp_path / name, **options(digits, student=STUDENT, difference_weight=weight)))
    one, other = read_weights(tmp_path / "with"), read_weights(tmp_path / "without")
    statistics = [name for name in one if "running" in name or "num_batches" in name]
    assert statistics
    assert all(torch.equal(one[name], other[name]) for name in statistics)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_samples_without_a_row_have_no_term(digits: Path, tmp_path: Path) -> None:
    """Beside 72 samples that the store has no row for, the term is that of the 48 others."""
    given = options(digits, student=SMOOTH, data=digits / "data.parquet", batch_size=120, missing="hard-only", lr=0.0)
    train(make_config(digits, tmp_path / "all", **given))
    train(make_config(digits, tmp_path / "own", **options(digits, student=SMOOTH, lr=0.0)))
    found = [float(read_history(tmp_path / name)[0]["difference_loss"]) for name in ("all", "own")]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": None, "temperature": None}, UsageError, "difference_weight: 3.0 needs the teacher's differences"),
        ({"labels": "store"}, MismatchError, "expected rows with difference, found none; label again with"),
        ({"difference_weight": -1.0}, UsageError, "difference_weight: expected a number of at least 0, found -1"),
        ({"difference_weight": [1.0, 2.0], "stack": "on"}, UsageError, "differences along noise take passes"),
    ],
)
def test_what_has_no_differences_is_refused(
    digits: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    changes = {name: digits / value if value == "store" else value for name, value in changes.items()}
    with pytest.raises(error, match=message):
        train(make_config(digits, tmp_path / "run", **options(digits, **changes)))
