"""Batches made ahead by threads are those made one by one."""

import os
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from softlabel.dataset import open_source
from softlabel.dataset.worker_init import begin_worker
from softlabel.errors import DataError
from softlabel.generation.input_reader import InputReader, Span
from softlabel.inputs.image_transform import Preprocessing

SPANS = [Span(view=0, start=start, stop=start + 3) for start in range(0, 30, 3)]
AS_IT_IS = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Images(Dataset[tuple[Image.Image, int]]):
    """A user's own dataset, which is not safe for several threads at a time."""

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.busy, self.threads = broken, threading.Lock(), set[str]()

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        assert self.busy.acquire(blocking=False), "two threads read at once"
        try:
            self.threads.add(threading.current_thread().name)
            time.sleep(0.002)
            side = 5 if index == self.broken else 4
            pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
            return Image.fromarray(pixels), index % 7
        finally:
            self.busy.release()


def intake(dataset: Images) -> InputReader:
    return InputReader(source=open_source(dataset), transforms=(AS_IT_IS,))


def test_order_and_bytes_are_those_of_one_thread() -> None:
    dataset = Images()
    ours = intake(dataset)
    dataset.threads.clear()
    made = list(ours.stream(iter(SPANS), workers=0))
    assert len(dataset.threads) > 1 or os.cpu_count() == 1
    assert all(name.startswith("softlabel-decode") for name in dataset.threads)
    alone = [intake(Images()).read(span) for span in SPANS]
    assert [batch.keys for batch in made] == [batch.keys for batch in alone]
    for one, other in zip(made, alone, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        assert torch.equal(one.inputs[0].only, other.inputs[0].only)


def test_an_error_comes_at_its_place_and_threads_end() -> None:
    batches = intake(Images(broken=13)).stream(iter(SPANS), workers=0)
    assert [next(batches).keys[0] for _ in range(4)] == ["0", "3", "6", "9"]
    with pytest.raises(DataError, match="'13'"):
        next(batches)
    assert not [one for one in threading.enumerate() if one.name.startswith("softlabel-decode")]


def test_no_more_is_made_than_is_asked_for() -> None:
    asked: list[int] = []

    def spans() -> Iterator[Span]:
        for number in range(10):
            asked.append(number)
            yield SPANS[number]

    threads = torch.get_num_threads()
    batches = intake(Images()).stream(spans(), workers=0)
    next(batches)
    assert len(asked) <= 9, "a bounded number of batches waits"
    batches.close()
    assert torch.get_num_threads() == threads


def test_a_worker_prints_nothing_of_a_reader_that_has_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    begin_worker(0)
    for error in (ConnectionResetError("reset by peer"), BrokenPipeError(), EOFError()):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == ""
    sys.excepthook(ValueError, ValueError("a mistake"), None)
    assert "a mistake" in capsys.readouterr().err
