"""`softlabel.testing.EncodingTests` on an encoding as another package has it: right ones pass, wrong ones fail."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import softlabel
from softlabel.labels.encodings import Answers, Coder
from softlabel.labels.encodings import register as register_coder
from softlabel.store.columns import Column
from softlabel.store.encodings import Encoding, register
from softlabel.testing import EncodingCase, EncodingTests
from tests.support.datasets import write_dataset
from tests.support.teachers import write_teacher

Columns = Mapping[str, np.ndarray[Any, Any]]
MASKED = -128


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarters(Encoding):
    """Steps of a quarter in one byte a class, down to -31.75; a masked class is -128."""

    name: ClassVar[str] = "quarters"

    def row_columns(self, num_classes: int) -> tuple[Column, ...]:
        return (Column(name="steps", dtype="|i1", width=num_classes),)

    def decode_rows(self, columns: Columns, **_: Any) -> np.ndarray[Any, Any]:
        steps_RC = columns["steps"]
        return np.where(steps_RC == MASKED, -np.inf, steps_RC / 4).astype(np.float32)


def encode_quarters(encoding: Encoding, answers: Answers) -> dict[str, Tensor]:
    steps_RC = (answers.scaled_logits.clamp_min(-31.75) * 4).round()
    masked_RC = answers.scaled_logits == -torch.inf
    return {"steps": torch.where(masked_RC, MASKED, steps_RC).to(torch.int8)}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    register(Quarters)
    register_coder(Quarters, Coder(encode=encode_quarters))
    yield
    del Encoding.kinds["quarters"]  # other tests go through all of them


class TestQuarters(EncodingTests):
    @pytest.fixture
    def encoding(self) -> Encoding:
        return Quarters()

    def decode(self, columns: Columns, encoding: Encoding, case: EncodingCase) -> Any:
        return columns["steps"] * np.float32(0.25)

    def bound(self, columns: Columns, encoding: Encoding, case: EncodingCase) -> Any:
        return 0.1251


def shift_with_the_batch(encoding: Encoding, answers: Answers) -> dict[str, Tensor]:
    return {"steps": (encode_quarters(encoding, answers)["steps"] + len(answers.scaled_logits)).to(torch.int8)}


def give_another_type(encoding: Encoding, answers: Answers) -> dict[str, Tensor]:
    return {"steps": encode_quarters(encoding, answers)["steps"].int()}


def drop_the_mask(encoding: Encoding, answers: Answers) -> dict[str, Tensor]:
    return {"steps": encode_quarters(encoding, answers)["steps"].clamp_min(-1)}


@pytest.mark.parametrize(
    ("wrong", "test"),
    [
        (shift_with_the_batch, "test_a_row_does_not_depend_on_its_batch"),
        (give_another_type, "test_columns_have_the_names_types_and_widths_that_it_declares"),
        (drop_the_mask, "test_extreme_and_masked_logits"),
    ],
)
def test_a_mistake_fails(wrong: Any, test: str) -> None:
    tests = TestQuarters()
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (40, 5)).astype(np.float32)
    case = EncodingCase(scaled_logits=logits - logits.max(axis=1, keepdims=True))
    given = {"encoding": Quarters()} | ({} if "extreme" in test else {"case": case})
    getattr(tests, test)(**given)
    register_coder(Quarters, Coder(encode=wrong))
    try:
        with pytest.raises(AssertionError):
            getattr(tests, test)(**given)
    finally:
        register_coder(Quarters, Coder(encode=encode_quarters))


def test_a_student_is_trained_on_a_store_of_it(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.parquet", 12)
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    for name in ("quarters", "float32"):
        softlabel.generate(data, teachers=[teacher], out=tmp_path / name, encoding=name, progress=False)
    rows, exact = (
        softlabel.open_store(tmp_path / name, verify="full").take(range(12)) for name in ("quarters", "float32")
    )
    np.testing.assert_allclose(rows.scaled_logits, exact.scaled_logits, atol=0.126)
    loader = softlabel.SoftLabelLoader(data, tmp_path / "quarters", batch_size=12, shuffle=False)
    (batch,) = loader
    np.testing.assert_array_equal(batch.target.scaled_logits.numpy(), rows.scaled_logits)
    student_BC = torch.zeros(12, 4, requires_grad=True)
    softlabel.distillation_loss(
        student_BC, batch.target, temperature=loader.temperature, soft_weight=1.0, hard_weight=0.0
    ).backward()
    assert student_BC.grad is not None
    assert student_BC.grad.abs().sum() > 0
