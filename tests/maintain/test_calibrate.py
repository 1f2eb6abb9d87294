"""A temperature for each teacher: fitted, written, and at work in a store, against plain numpy in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import softlabel
from softlabel.maintain.extend import extend
from softlabel.maintain.repair import repair
from softlabel.models import build_model
from softlabel.store.encodings import Head
from tests.support.commands import run_softlabel
from tests.support.datasets import CLASSES, make_jpeg, write_parquet
from tests.support.teachers import write_teacher

ROWS, T = 300, 4.0


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 labelled images whose labels agree with two of three teachers more often than not, and a calibration."""
    folder = tmp_path_factory.mktemp("calibrate")
    images = [make_jpeg(number) for number in range(ROWS)]
    write_parquet(folder / "bare.parquet", images)
    for seed in range(3):
        write_teacher(folder / f"teacher{seed}.safetensors", seed=seed)
    logits_NC = logits(folder, 0) + logits(folder, 1)
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(ROWS) < 0.6, logits_NC.argmax(1), rng.integers(0, len(CLASSES), ROWS))
    write_parquet(folder / "data.parquet", images, labels=labels.tolist())
    softlabel.calibrate(
        folder / "data.parquet", teachers=[spec(folder, 0), spec(folder, 1)], out=folder / "t.json", progress=False
    )
    return folder


def spec(ready: Path, seed: int) -> str:
    return f"zoo:resnet8@{ready / f'teacher{seed}.safetensors'}"


def logits(ready: Path, seed: int) -> np.ndarray:
    """What the network answers, without softlabel's teacher, engine or store: float64 (N, C)."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    model = build_model(spec(ready, seed)).eval()
    raw = pq.read_table(ready / "bare.parquet").column("image").to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(one["bytes"])), np.float32) for one in raw])
    images = (torch.from_numpy(pixels) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    with torch.inference_mode():
        found: np.ndarray = model(images.permute(0, 3, 1, 2)).double().numpy()
    return found


def nll_and_ece(logits_NC: np.ndarray, labels_N: np.ndarray, temperature: float) -> tuple[float, float]:
    z_NC = logits_NC / temperature
    log_p_NC = z_NC - np.logaddexp.reduce(z_NC, axis=1, keepdims=True)
    nll, p_NC = float(-log_p_NC[np.arange(len(labels_N)), labels_N].mean()), np.exp(log_p_NC)
    sure_N, right_N, ece = p_NC.max(1), p_NC.argmax(1) == labels_N, 0.0
    for low in np.arange(15) / 15:
        inside = (sure_N > low) & (sure_N <= low + 1 / 15)
        if inside.any():
            ece += inside.mean() * abs(right_N[inside].mean() - sure_N[inside].mean())
    return nll, float(ece)


def labels_of(ready: Path) -> np.ndarray:
    return np.asarray(softlabel.open_source(ready / "data.parquet").labels())


def scaled(store: Path) -> np.ndarray:
    opened = softlabel.open_store(store, verify="full")
    found = np.asarray(opened.take(np.arange(len(opened))).scaled_logits, np.float64)
    return found - found.max(-1, keepdims=True)


def centred(logits_NC: np.ndarray) -> np.ndarray:
    shifted: np.ndarray = logits_NC - logits_NC.max(-1, keepdims=True)
    return shifted


def temperatures(ready: Path) -> list[float]:
    return [member["temperature"] for member in json.loads((ready / "t.json").read_text())["members"]]


def test_the_temperature_is_the_most_likely_one(ready: Path) -> None:
    found = json.loads((ready / "t.json").read_text())
    assert found["samples"] == ROWS
    for seed, member in enumerate(found["members"]):
        logits_NC, labels_N = logits(ready, seed), labels_of(ready)
        # A search of another kind: the best of a grid, and a finer grid around it, three times over.
        low, high = np.log(0.02), np.log(50)
        for _ in range(6):
            grid = np.linspace(low, high, 41)
            best = int(np.argmin([nll_and_ece(logits_NC, labels_N, float(np.exp(x)))[0] for x in grid]))
            low, high = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
        assert member["temperature"] == pytest.approx(np.exp((low + high) / 2), rel=1e-3)
        for at, when in ((1.0, "before"), (member["temperature"], "after")):
            nll, ece = nll_and_ece(logits_NC, labels_N, at)
            assert member[f"nll_{when}"] == pytest.approx(nll, rel=1e-4)
            assert member[f"ece_{when}"] == pytest.approx(ece, abs=0.02)  # float32 may put a sample in the next bin
        assert member["nll_after"] < member["nll_before"]


def test_a_store_holds_what_the_calibrated_members_say(ready: Path, tmp_path: Path) -> None:
    own = temperatures(ready)
    options = ["generate", "--data", ready / "data.parquet", "--teacher", spec(ready, 0), spec(ready, 1)]
    options += ["--calibration", ready / "t.json", "--encoding", "float32", "--batch-size", 32]
    parts = [logits(ready, seed) / own[seed] for seed in range(2)]
    run_softlabel(*options, "--out", tmp_path / "logits")
    np.testing.assert_allclose(scaled(tmp_path / "logits"), centred((parts[0] + parts[1]) / 2 / T), atol=1e-4)
    run_softlabel(*options, "--out", tmp_path / "keep", "--combine", "keep")
    np.testing.assert_allclose(scaled(tmp_path / "keep"), centred(np.stack(parts, 1) / T), atol=1e-4)
    softlabel.generate(
        ready / "data.parquet",
        teachers=[spec(ready, 0), spec(ready, 1)],
        out=tmp_path / "probs",
        combine="probs",
        weights=[1, 3],
        encoding="float32",
        calibration=ready / "t.json",
        batch_size=32,
        progress=False,
    )
    p0, p1 = (np.exp(centred(z / T)) / np.exp(centred(z / T)).sum(1, keepdims=True) for z in parts)
    np.testing.assert_allclose(scaled(tmp_path / "probs"), centred(np.log(p0 / 4 + p1 * 3 / 4)), atol=1e-4)
    shown = run_softlabel("inspect", tmp_path / "keep").stdout
    assert all(f"logits divided by {one:.4g}" in shown for one in own)
    # Temperatures are part of what a store is.
    refused = run_softlabel(*options[:6], "--out", tmp_path / "logits", "--encoding", "float32", code=2).stderr
    assert "calibration" in refused
    differ = run_softlabel("verify", tmp_path / "keep", "--recompute", 50).stdout
    assert "differ by 0.0e+00 in the mean" in differ


def test_the_order_of_teachers_and_another_teacher(ready: Path, tmp_path: Path) -> None:
    options = {"data": ready / "data.parquet", "calibration": ready / "t.json", "progress": False}
    softlabel.generate(teachers=[spec(ready, 1)], out=tmp_path / "one", encoding="float32", **options)  # type: ignore[arg-type]
    expected = centred(logits(ready, 1) / temperatures(ready)[1] / T)
    np.testing.assert_allclose(scaled(tmp_path / "one"), expected, atol=1e-4)
    for teacher, said in ((spec(ready, 2), "sha256"), (spec(ready, 1) + "?mean=0.5&std=0.5", "preprocessing")):
        with pytest.raises(softlabel.SoftLabelError, match=said) as refused:
            softlabel.generate(teachers=[teacher], out=tmp_path / "other", **options)  # type: ignore[arg-type]
        assert "t.json" in str(refused.value)
    for text in ("", "{}", '{"format": "softlabel-calibration"}'):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(softlabel.SoftLabelError, match=r"odd\.json"):
            softlabel.generate(
                teachers=[spec(ready, 1)], out=tmp_path / "other", **{**options, "calibration": tmp_path / "odd.json"}
            )  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


def test_a_head_is_stored_calibrated(ready: Path, tmp_path: Path) -> None:
    softlabel.generate(
        ready / "data.parquet",
        teachers=[spec(ready, 0)],
        out=tmp_path / "head",
        encoding=Head(),
        calibration=ready / "t.json",
        batch_size=32,
        progress=False,
    )
    own = temperatures(ready)[0]
    np.testing.assert_allclose(scaled(tmp_path / "head"), centred(logits(ready, 0) / own / T), atol=2e-2 / own)
    cost = softlabel.open_store(tmp_path / "head").manifest.totals.fidelity
    assert cost is not None
    assert cost.worst_t1 < 1e-3


def test_extend_and_repair_keep_the_calibration(ready: Path, tmp_path: Path) -> None:
    data, store = ready / "data.parquet", tmp_path / "kept"
    settings = {"combine": "keep", "encoding": "float32", "shard_rows": 100, "batch_size": 50, "progress": False}
    for seeds, out in (([0], store), ([0, 1], tmp_path / "both")):
        softlabel.generate(
            data, teachers=[spec(ready, s) for s in seeds], out=out, calibration=ready / "t.json", **settings
        )  # type: ignore[arg-type]
    with pytest.raises(softlabel.SoftLabelError, match="calibrated; give --calibration"):
        extend(store, teacher=spec(ready, 1), progress=False)
    extend(store, teacher=spec(ready, 1), calibration=ready / "t.json", progress=False)
    np.testing.assert_array_equal(scaled(store), scaled(tmp_path / "both"))
    before = scaled(store)
    next((store / "shards").glob("00001-*")).unlink()
    assert repair(store, progress=False).shards_written == 1
    np.testing.assert_array_equal(scaled(store), before)


def test_what_cannot_be_calibrated_says_why(ready: Path, tmp_path: Path) -> None:
    command = ["calibrate", "--teacher", spec(ready, 0)]
    assert "labelled samples" in run_softlabel(*command, "--data", ready / "bare.parquet", code=1).stderr
    right = logits(ready, 0).argmax(1)
    write_parquet(tmp_path / "right.parquet", [make_jpeg(n) for n in range(ROWS)], labels=right.tolist())
    assert "not trained on" in run_softlabel(*command, "--data", tmp_path / "right.parquet", code=1).stderr
    assert "at least 1" in run_softlabel(*command, "--data", ready / "data.parquet", "--samples", 0, code=2).stderr
    few = run_softlabel(*command, "--data", ready / "data.parquet", "--samples", 200).stdout
    assert "200 labelled samples" in few


@pytest.mark.parametrize("file", ["resnet20-12fca82f.th", "resnet20-jpeg.safetensors"])
def test_real_teachers_are_better_calibrated_after(shared_data: Path, file: str) -> None:
    data = f"{shared_data / 'cifar10-jpeg/test.parquet'}?rows=0:1500"
    teacher = f"zoo:resnet20@{shared_data / 'cifar10-resnets' / file}"
    (member,) = softlabel.calibrate(data, teachers=[teacher], progress=False).members
    assert member.temperature > 1.1
    assert member.ece_after < 0.8 * member.ece_before
    assert member.nll_after < member.nll_before
