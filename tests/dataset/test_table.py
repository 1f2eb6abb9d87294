"""Parquet tables whose columns are a sample's numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import softlabel
from softlabel.dataset import open_source
from softlabel.errors import BadImageError, SoftLabelError
from softlabel.inputs.base import Sample
from tests.inputs.test_tensor_samples import MODULE, TABLE, assert_labels, build_mlp, write_weights

N = 17
AGE = np.arange(N, dtype=np.int16) + 20
INCOME = np.random.default_rng(0).normal(3e4, 1e4, N)
MEMBER = np.arange(N) % 2 == 0
SERIES = np.random.default_rng(1).standard_normal((N, 4, 3)).astype(np.float32)


def write_table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=5)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    fixed = pa.list_(pa.list_(pa.float32(), 3), 4)
    return write_table(
        tmp_path / "table.parquet",
        age=AGE, income=INCOME, member=MEMBER, person=[f"p{row}" for row in range(N)], label=np.arange(N) % 3,
        series=pa.array(SERIES.tolist(), type=fixed), tokens=[[row, row + 1] for row in range(N)],
        ragged=[[0.5] * (row % 3) for row in range(N)],
    )  # fmt: skip


def read(source: str, rows: Any = range(N)) -> list[Sample]:
    return open_source(source).read(rows)


def decoded(source: str, rows: Any = range(N)) -> list[np.ndarray[Any, Any]]:
    opened = open_source(source)
    return [opened.inputs.decode(sample)[0].numpy() for sample in opened.read(rows)]  # type: ignore[union-attr]


def test_columns_become_a_vector_in_the_order_asked_for(table: Path) -> None:
    rows = [16, 0, 3, 3, 7]
    found = decoded(f"{table}?inputs=income,age,member", rows)
    expected = np.stack([INCOME, AGE, MEMBER], axis=1).astype(np.float32)[rows]
    np.testing.assert_array_equal(np.stack(found), expected)
    assert found[0].dtype == np.float32
    assert decoded(f"{table}?inputs=age", [2])[0].tolist() == [22.0]
    source = open_source(f"{table}?inputs=age,member&key=person")
    assert (source.keys(1, 3), source.labels(1, 3).tolist(), len(source.blocks())) == (["p1", "p2"], [1, 2], 4)
    assert source.read([0])[0].raw.dtype == np.float32  # type: ignore[union-attr]


def test_a_column_of_lists_is_an_array(table: Path) -> None:
    np.testing.assert_array_equal(np.stack(decoded(f"{table}?inputs=series", [5, 1])), SERIES[[5, 1]])
    assert decoded(f"{table}?inputs=tokens", [4])[0].tolist() == [4, 5]
    assert decoded(f"{table}?inputs=tokens", [4])[0].dtype == np.int64


def test_equal_numbers_have_one_hash_wherever_they_come_from(table: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "same.npz", x=np.stack([INCOME, AGE], axis=1), s=SERIES)
    for words, other in (("income,age", "x"), ("series", "s")):
        hashes = [
            [source.inputs.decode(sample)[1] for sample in source.read(range(N))]
            for source in (open_source(f"{table}?inputs={words}"), open_source(f"{tmp_path}/same.npz?inputs={other}"))
        ]
        assert hashes[0] == hashes[1]
        assert len(set(hashes[0])) == N


def test_a_null_or_nan_is_a_bad_sample_by_its_key(tmp_path: Path) -> None:
    columns: list[list[Any]] = TABLE.T.tolist()
    columns[1][4], columns[2][6], columns[0][8] = None, float("nan"), float("-inf")
    names = [f"c{place}" for place in range(6)]
    write_table(tmp_path / "t.parquet", **dict(zip(names, columns, strict=True)))
    model = write_weights(build_mlp, tmp_path / "mlp.safetensors")
    teacher = f"python:{MODULE}:build_mlp@{tmp_path}/mlp.safetensors"
    data = f"{tmp_path}/t.parquet?inputs={','.join(names)}"
    softlabel.generate(data, teachers=[teacher], out=tmp_path / "labels", device="cpu")
    assert softlabel.open_store(tmp_path / "labels").bad == {
        "4": "null in column 'c1'",
        "6": "NaN in column 'c2'",
        "8": "an infinite number in column 'c0'",
    }
    write_table(tmp_path / "t.parquet", **dict(zip(names, TABLE.T, strict=True)))
    softlabel.generate(data, teachers=[teacher], out=tmp_path / "good", device="cpu", encoding="float32")
    assert_labels(tmp_path / "good", model, torch.from_numpy(TABLE).float())


def test_lists_that_are_no_array_are_bad_samples(tmp_path: Path) -> None:
    lists = [[[1.0, 2.0], [3.0]], None, [[1.0, None], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]]]
    write_table(tmp_path / "t.parquet", x=lists)
    *bad, good = read(f"{tmp_path}/t.parquet?inputs=x", range(4))
    assert all(isinstance(sample.raw, BadImageError) for sample in bad)
    assert [str(sample.raw) for sample in bad] == [
        "its lists have different lengths: 1, 2",
        "null instead of a list",
        "a null among its numbers",
    ]
    np.testing.assert_array_equal(good.raw, [[1, 2], [3, 4]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("inputs=age,hight", "no column 'hight'; the file has age, income"),
        ("inputs=age,person", "column 'person': expected numbers or lists of numbers for inputs=, found string"),
        ("inputs=age,age", "column 'age' is given twice"),
        ("inputs=age,tokens", "or a single column of lists, found 2 columns, 'tokens' among them"),
        ("inputs=age,income&label=age", "column 'age' is an input and the label"),
        ("inputs=age,label", "column 'label' is an input and the label"),
        ("inputs=age&image=person", "image= names encoded images, inputs= columns of numbers"),
        ("inputs=age&exif=ignore", "are for encoded images, these are numbers"),
        ("label=label", "columns of numbers with '[?]inputs=COLUMN,COLUMN'"),
    ],
)
def test_what_cannot_be_meant_is_refused(table: Path, words: str, message: str) -> None:
    with pytest.raises(SoftLabelError, match=message):
        open_source(f"{table}?{words}")
