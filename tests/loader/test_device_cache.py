"""Decoded images on a device. What a GPU does with them is tested in tests/gpu, its pixels in tests/views."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import softlabel
from softlabel.errors import UsageError
from tests.support.teachers import write_teacher
from tests.support.training_runs import have_equal_weights, make_config, read_history, write_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def test_where_images_are_kept_changes_no_weight(digits: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"epochs": 2, "eval_data": str(digits / "data.parquet")}
    for cache in ("memory", "device"):
        softlabel.train(make_config(digits, tmp_path / cache, cache=cache, **given))
    assert have_equal_weights(tmp_path / "memory", tmp_path / "device")
    assert read_history(tmp_path / "memory") == read_history(tmp_path / "device")


def test_views_are_replayed_from_the_device(digits: Path, tmp_path: Path) -> None:
    made: dict[str, Any] = {"views": 2, "temperature": 1.0, "progress": False, "preflight": False}
    teacher = write_teacher(tmp_path / "w.safetensors", num_classes=10)
    for augment in ("crop-flip", "inception?size=16"):
        softlabel.generate(digits / "data.parquet", teachers=[teacher], out=tmp_path / augment, augment=augment, **made)
    given: dict[str, Any] = {"batch_size": 40, "seed": 5, "check_views": 1}
    one, other = (
        softlabel.SoftLabelLoader(digits / "data.parquet", tmp_path / "crop-flip", cache_device=where, **given)
        for where in (None, "cpu")
    )
    for _ in range(2):
        for expected, batch in zip(one, other, strict=True):
            assert (batch.inputs == expected.inputs).all()
    with pytest.raises(UsageError, match="on a device views of crop-flip alone"):
        softlabel.SoftLabelLoader(digits / "data.parquet", tmp_path / "inception?size=16", cache_device="cpu")


def test_images_of_several_sizes_are_refused(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, side in enumerate((16, 16, 20)):
        Image.new("RGB", (side, side), (number, 0, 0)).save(tmp_path / f"images/{number}.png")
    made: dict[str, Any] = {"views": 2, "augment": "crop-flip", "temperature": 1.0, "preflight": False}
    teacher = write_teacher(tmp_path / "w.safetensors", num_classes=10)
    softlabel.generate(tmp_path / "images", teachers=[teacher], out=tmp_path / "labels", progress=False, **made)
    loader = softlabel.SoftLabelLoader(tmp_path / "images", tmp_path / "labels", batch_size=3, cache_device="cpu")
    with pytest.raises(UsageError, match="expected images of one size for a device, found several"):
        list(loader)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 2}, "workers: a cache on a device is filled by this process, found 2"),
        ({"cache_mb": 0}, "120 decoded samples take 0.1 MiB, found 0.0 MiB"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(digits: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        softlabel.train(make_config(digits, tmp_path / "run", cache="device", **changes))
