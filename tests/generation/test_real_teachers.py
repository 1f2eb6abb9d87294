"""Real images through real teachers: the store against an independent forward pass and published figures."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import softlabel
from tests.support import reference_resnet as reference

# Accuracy on all 10,000 test images, float32, by an independent script.
ACCURACY = {
    "resnet20-12fca82f.th": 0.8103,
    "resnet32-d509ac18.th": 0.8256,
    "resnet44-014dd654.th": 0.8267,
    "resnet56-4bfd9763.th": 0.8320,
}
ALL_FOUR_PROBS = 0.8590


def spec(folder: Path, file: str) -> str:
    return f"zoo:{file.split('-')[0]}@{folder / 'cifar10-resnets' / file}"


def labelled(data: Path, out: Path, teachers: list[str], **options: object) -> softlabel.Store:
    softlabel.generate(data, teachers=teachers, out=out, progress=False, shard_rows=4096, **options)  # type: ignore[arg-type]
    return softlabel.open_store(out, verify="full")


def check(store: softlabel.Store, expected_NC: torch.Tensor, keys: list[str], labels_N: torch.Tensor) -> float:
    """Every row is the expected one within float16's rounding; returns the accuracy of the stored labels."""
    stored = store.take(store.lookup(keys))
    assert list(stored.keys) == keys
    np.testing.assert_array_equal(stored.labels, labels_N.numpy())
    expected_NC = expected_NC.double() - expected_NC.double().amax(dim=1, keepdim=True)
    found_NC = torch.from_numpy(np.asarray(stored.scaled_logits)).double()
    # Half a unit in the last place of float16, and what another order of float32 sums may move.
    tolerance_NC = expected_NC.abs() * 2.0**-11 + 2e-5
    assert ((found_NC - expected_NC).abs() <= tolerance_NC).all()
    return float((found_NC.argmax(dim=1) == labels_N).double().mean())


def slice_of(source: Path, rows: int, out: Path) -> Path:
    pq.write_table(pq.read_table(source).slice(0, rows), out)
    return out


def mean_of_probs(logits: list[torch.Tensor], temperature: float) -> torch.Tensor:
    return torch.stack([(z.double() / temperature).softmax(dim=1) for z in logits]).mean(dim=0).log()


def test_stored_labels_equal_an_independent_forward_pass(shared_data: Path, tmp_path: Path) -> None:
    test = shared_data / "cifar10-jpeg" / "test.parquet"
    data = slice_of(test, 120, tmp_path / "images.parquet")
    keys, pixels, labels = reference.read_rows(data)
    files = ["resnet20-12fca82f.th", "resnet56-jpeg.safetensors"]
    logits = [
        reference.logits(reference.read_weights(shared_data / "cifar10-resnets" / file), pixels) for file in files
    ]
    specs = [spec(shared_data, file) for file in files]

    alone = labelled(data, tmp_path / "alone", specs[:1], temperature=4.0, batch_size=60)
    check(alone, logits[0] / 4, keys, labels)
    probs = labelled(data, tmp_path / "probs", specs, combine="probs", temperature=4.0, format="hdf5", batch_size=60)
    check(probs, mean_of_probs(logits, 4.0), keys, labels)
    weighted = labelled(
        data, tmp_path / "weighted", specs, combine="logits", temperature=2.0, weights=[1, 3], batch_size=60
    )
    check(weighted, (logits[0] * 0.25 + logits[1] * 0.75) / 2, keys, labels)


def test_formats_hold_the_same_values_and_say_the_same(shared_data: Path, tmp_path: Path) -> None:
    data = slice_of(shared_data / "cifar10-jpeg" / "test.parquet", 100, tmp_path / "images.parquet")
    teacher = [spec(shared_data, "resnet20-jpeg.safetensors")]
    one = labelled(data, tmp_path / "parquet", teacher, format="parquet", batch_size=50)
    other = labelled(data, tmp_path / "hdf5", teacher, format="hdf5", batch_size=50)
    rows = np.arange(100)
    left, right = one.take(rows), other.take(rows)
    assert list(left.keys) == list(right.keys)
    for name in ("views", "labels", "content", "scaled_logits"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    manifest = json.loads((tmp_path / "parquet" / "manifest.json").read_text())
    assert manifest["run"]["class_names"] == list(one.run.class_names or ())
    assert manifest["run"]["members"][0]["preprocessing"]["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_accuracy_of_every_teacher_and_of_the_ensemble_to_four_digits(shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "cifar10-jpeg" / "test.parquet"
    keys, pixels, labels = reference.read_rows(data)
    assert len(keys) == 10_000
    logits = {}
    for file, expected in ACCURACY.items():
        logits[file] = reference.logits(reference.read_weights(shared_data / "cifar10-resnets" / file), pixels)
        store = labelled(data, tmp_path / file, [spec(shared_data, file)], temperature=1.0)
        accuracy = check(store, logits[file], keys, labels)
        assert round(accuracy, 4) == expected, f"{file}: {accuracy}"
    specs = [spec(shared_data, file) for file in ACCURACY]
    store = labelled(data, tmp_path / "ensemble", specs, combine="probs", temperature=1.0)
    accuracy = check(store, mean_of_probs(list(logits.values()), 1.0), keys, labels)
    assert round(accuracy, 4) == ALL_FOUR_PROBS
