"""What the machine does never shows in labels: workers, shards, batches, lanes, stacks, turns, memory that ends."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import softlabel
from softlabel.common.device import Tuning
from softlabel.errors import DataError, TeacherError, UsageError
from softlabel.generation.ensemble import Members
from softlabel.models.teacher import load_teacher
from tests.support.commands import run_softlabel
from tests.support.datasets import write_dataset
from tests.support.teachers import write_teacher

ROWS = 90


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "images.parquet", ROWS)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("teachers")
    return [write_teacher(folder / f"{seed}.safetensors", seed=seed) for seed in range(3)]


def labels(data: Path, out: Path, teachers: list[str], **options: Any) -> np.ndarray[Any, Any]:
    options = {"batch_size": 32, "temperature": 2.0, "progress": False, **options}
    softlabel.generate(data, teachers=teachers, out=out, **options)
    with softlabel.open_store(out, verify="full") as store:
        found = store.take(store.lookup([f"image-{number:05d}.jpg" for number in range(ROWS)]))
        return np.array(found.scaled_logits)


def steps(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> int:
    """The largest distance in float16 steps."""

    def rank(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        bits = values.astype(np.float16).view(np.int16).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return int(np.abs(rank(one) - rank(other)).max())


def test_workers_shards_and_threads_leave_every_bit(images: Path, teachers: list[str], tmp_path: Path) -> None:
    expected = labels(images, tmp_path / "expected", teachers[:1], workers=0, threads=1)
    assert len(np.unique(expected)) > ROWS
    for workers, shard_rows, threads in ((1, 16384, 2), (2, 64, 1), (4, 7, 3)):
        out = tmp_path / f"{workers}-{shard_rows}"
        found = labels(images, out, teachers[:1], workers=workers, shard_rows=shard_rows, threads=threads)
        np.testing.assert_array_equal(found, expected)


def test_batch_sizes_agree_within_a_float16_step(images: Path, teachers: list[str], tmp_path: Path) -> None:
    found = [labels(images, tmp_path / str(size), teachers[:1], batch_size=size) for size in (1, 7, 64, 256)]
    for other in found[1:]:
        assert steps(found[0], other) <= 1


def test_stacked_members_and_members_in_turn_answer_what_they_do_side_by_side(
    images: Path, teachers: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    normalised = [teachers[0], f"{teachers[1]}?mean=0.2,0.4,0.6", teachers[2]]
    beside = labels(images, tmp_path / "beside", normalised, stack="no", combine="keep")
    turns = labels(images, tmp_path / "turns", normalised, members_in_turn="yes", combine="keep", shard_rows=50)
    np.testing.assert_array_equal(turns, beside)
    with caplog.at_level(logging.INFO, "softlabel"):
        stacked = labels(images, tmp_path / "stacked", normalised, stack="yes", combine="keep")
    assert "members 1, 2, 3: stacked" in caplog.text
    assert np.abs(stacked - beside).max() <= 1e-3 * np.abs(beside).max()
    with softlabel.open_store(tmp_path / "stacked") as store:
        assert store.manifest.recorded["stacked"] == [[0, 1, 2]]


def test_a_trial_chooses_once_and_a_resumed_run_keeps_the_choice(
    images: Path, teachers: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "softlabel"):
        first = labels(images, tmp_path / "store", teachers, shard_rows=32)
        assert caplog.text.count("members 1, 2, 3: ") == 1
        store = softlabel.open_store(tmp_path / "store")
        (tmp_path / "store" / store.shards[1].file).unlink()
        store.close()
        run_softlabel("repair", tmp_path / "store")
        caplog.clear()
        again = labels(images, tmp_path / "store", teachers, shard_rows=32)
    assert "members" not in caplog.text
    np.testing.assert_array_equal(again, first)


def test_other_networks_are_not_stacked(teachers: list[str], images: Path, tmp_path: Path) -> None:
    other = write_teacher(tmp_path / "other.safetensors", name="resnet14")
    with pytest.raises(UsageError, match="one architecture"):
        labels(images, tmp_path / "store", [teachers[0], other], stack="yes")
    with pytest.raises(UsageError, match="found one"):
        labels(images, tmp_path / "store", teachers[:1], members_in_turn="yes")


def test_lanes_share_weights_and_no_notes(teachers: list[str]) -> None:
    members = Members([load_teacher(teachers[0])])
    replica = members.replica()
    mine, theirs = members.teachers[0].model, replica.teachers[0].model
    assert mine is not theirs
    assert [p.data_ptr() for p in mine.parameters()] == [p.data_ptr() for p in theirs.parameters()]
    assert Tuning(threads=2).lanes(torch.device("cpu")) == (2, 1)
    assert Tuning(threads=16).lanes(torch.device("cpu")) == (4, 4)
    assert Tuning(threads=2, compile=True).lanes(torch.device("cpu")) == (1, 2)


LIMIT = 16


class Limited(nn.Module):
    """Runs out of memory above so many images, in the three ways in which PyTorch and Python say so."""

    num_classes = 4

    def __init__(self, limit: int, how: str) -> None:
        super().__init__()
        self.limit, self.how = limit, how
        self.linear = nn.Linear(3, 4)
        nn.init.normal_(self.linear.weight)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if len(images_BCHW) > self.limit:
            if self.how == "device":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            if self.how == "python":
                raise MemoryError
            torch.empty(2**60, dtype=torch.uint8)  # the real thing
        logits_BC: Tensor = self.linear(images_BCHW.mean(dim=(2, 3)))
        return logits_BC


def limited(limit: int = LIMIT, how: str = "device") -> Limited:
    return Limited(limit, how)


@pytest.mark.parametrize("how", ["device", "python", "torch"])
def test_out_of_memory_halves_the_batch_and_says_so(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    teacher = [f"python:tests.generation.test_batching:limited?how={how}"]
    expected = labels(images, tmp_path / "fits", teacher, batch_size=LIMIT)
    with caplog.at_level(logging.INFO, "softlabel"):
        found = labels(images, tmp_path / "halved", teacher, batch_size=64, shard_rows=40)
    assert "out of memory with batches of 64: continuing with 32" in caplog.text
    assert "out of memory with batches of 32: continuing with 16" in caplog.text
    np.testing.assert_array_equal(found, expected)


def test_one_image_that_does_not_fit_ends_the_run(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="out of memory with a single sample"):
        labels(images, tmp_path / "store", ["python:tests.generation.test_batching:limited?limit=0"], batch_size=4)


def test_the_batch_size_that_is_found_fits_and_is_recorded(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = ["python:tests.generation.test_batching:limited"]
    with caplog.at_level(logging.INFO, "softlabel"):
        labels(images, tmp_path / "store", teacher, batch_size="auto")
    with softlabel.open_store(tmp_path / "store") as store:
        found = store.manifest.recorded["batch_size"]
    assert found in (8, 16)
    assert f"batch size {found}: samples/s" in caplog.text
    assert "out of memory" not in caplog.text


def test_a_killed_worker_ends_the_run_with_a_message_and_the_store_resumes(
    images: Path, teachers: list[str], tmp_path: Path
) -> None:
    expected = labels(images, tmp_path / "expected", teachers[:1])
    shards = tmp_path / "store" / "shards"
    others = {child.pid for child in multiprocessing.active_children()}  # of other tests

    def kill() -> None:
        for _ in range(10_000):
            workers = [child.pid for child in multiprocessing.active_children() if child.pid not in others]
            # Once something is committed, so that there is something to resume.
            if workers and workers[0] is not None and shards.is_dir() and any(shards.glob("*.parquet")):
                os.kill(workers[0], signal.SIGKILL)
                return
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DataError, match=r"a decoding process died .*fewer.*--workers"):
        labels(images, tmp_path / "store", teachers[:1], workers=1, shard_rows=8, batch_size=1)
    killer.join()
    with softlabel.open_store(tmp_path / "store", allow_incomplete=True) as store:
        assert 0 < len(store) < ROWS
    found = labels(images, tmp_path / "store", teachers[:1], shard_rows=8)
    np.testing.assert_array_equal(found, expected)
