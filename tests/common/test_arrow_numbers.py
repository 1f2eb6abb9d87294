"""Numbers of Arrow arrays through their buffers are those that pyarrow gives."""

import random

import pyarrow as pa
import pytest

from softlabel.common.arrow_numbers import make_indices, read_numbers


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.uint64()], ids=str)
@pytest.mark.parametrize("nulls", ["none", "some", "all"])
def test_numbers_are_those_of_pyarrow(kind: pa.DataType, nulls: str) -> None:
    draw = random.Random(0)
    share = {"none": 0.0, "some": 0.4, "all": 1.0}[nulls]
    values = [None if draw.random() < share else draw.randrange(100) for _ in range(41)]
    array = pa.array(values, kind)
    for start, length in ((0, 41), (3, 30), (8, 1), (17, 0)):
        found = read_numbers(array.slice(start, length), 7)
        assert found.tolist() == [7 if value is None else value for value in values[start : start + length]]
        assert str(found.dtype) == str(kind)


def test_indices_choose_rows() -> None:
    assert pa.array(["a", "b", "c"]).take(make_indices([2, 0, 2])).to_pylist() == ["c", "a", "c"]
    assert len(make_indices([])) == 0
