"""Float32 is IEEE single precision while a teacher labels, a student learns and a model is measured, and only then."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softlabel
from softlabel.models.precision import ieee_float32
from tests.support.training_runs import make_config, write_digits

FLAGS: set[str] = set()  # what forward and backward passes found


def flags() -> set[str]:
    """The flags that hold on CUDA; they exist without it."""
    backends: Any = torch.backends
    return {unit.fp32_precision for unit in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)}


class Watched(nn.Linear):
    """A network that notes the flags under which its forward and its backward pass run."""

    def __init__(self) -> None:
        super().__init__(3 * 16 * 16, 10)
        self.weight.register_hook(lambda _: FLAGS.update(flags()))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        FLAGS.update(flags())
        return super().forward(images_BCHW.flatten(1))


def watched() -> nn.Module:
    torch.manual_seed(0)
    return Watched()


SPEC = "python:tests.models.test_precision:watched?resize=16&crop=16&mean=0&std=1"


@pytest.fixture
def lowered() -> Iterator[set[str]]:
    """A program that has asked for TF32 itself; gives its flags."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    FLAGS.clear()
    yield flags()
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("what", ["generate", "train", "evaluate"])
def test_float32_is_exact_in_every_pass_and_as_before_after_it(tmp_path: Path, lowered: set[str], what: str) -> None:
    digits = write_digits(tmp_path)
    match what:
        case "generate":
            softlabel.generate(digits / "data.parquet", teachers=[SPEC], out=tmp_path / "out", device="cpu", threads=2)
        case "train":
            softlabel.train(make_config(digits, tmp_path / "out", student=SPEC, epochs=1))
        case "evaluate":
            softlabel.evaluate(SPEC, digits / "data.parquet", device="cpu")
    assert sorted(FLAGS) == ["ieee"]
    assert flags() == lowered == {"tf32"}


def test_the_first_of_several_threads_does_not_end_it_for_the_others(lowered: set[str]) -> None:
    inside, leave, found = threading.Event(), threading.Event(), []

    def other() -> None:
        with ieee_float32():
            inside.set()
            leave.wait(60)
            found.append(flags())

    thread = threading.Thread(target=other)
    with ieee_float32():
        thread.start()
        assert inside.wait(60)
    assert flags() == {"ieee"}
    leave.set()
    thread.join()
    assert found == [{"ieee"}]
    assert flags() == lowered
