"""Tables whose columns are a sample's numbers: Parquet, CSV and TSV."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv as arrow_csv
from safetensors.torch import save_file
from torch import nn

import softlabel
from softlabel.dataset import open_source
from softlabel.errors import BadImageError, DataError, SoftLabelError, SpecError
from softlabel.inputs.base import Sample
from softlabel.inputs.tensor import TensorTransform
from tests.inputs.test_tensor_samples import MODULE, TABLE, assert_labels, build_mlp, write_weights

N = 17
AGE = np.arange(N, dtype=np.int16) + 20
INCOME = np.random.default_rng(0).normal(3e4, 1e4, N)
MEMBER = np.arange(N) % 2 == 0
SERIES = np.random.default_rng(1).standard_normal((N, 4, 3)).astype(np.float32)


FORMATS = ["parquet", "csv", "tsv"]


def write_table(path: Path, **columns: Any) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=5)
    else:
        options = arrow_csv.WriteOptions(delimiter="," if path.suffix == ".csv" else "\t")
        arrow_csv.write_csv(table, path, options)
    return path


@pytest.fixture(params=FORMATS)
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A table without lists."""
    return write_table(
        tmp_path / f"plain.{request.param}",
        age=AGE, income=INCOME, member=MEMBER, person=[f"p{row}" for row in range(N)], label=np.arange(N) % 3,
    )  # fmt: skip


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
    items = [opened.inputs.decode(sample)[0] for sample in opened.read(rows)]
    return [TensorTransform().fit(item).numpy() for item in items]  # type: ignore[union-attr]


def test_columns_become_a_vector_in_the_order_asked_for(plain: Path) -> None:
    rows = [16, 0, 3, 3, 7]
    found = decoded(f"{plain}?inputs=income,age,member", rows)
    expected = np.stack([INCOME, AGE, MEMBER], axis=1).astype(np.float32)[rows]
    np.testing.assert_array_equal(np.stack(found), expected)
    assert found[0].dtype == np.float32
    assert decoded(f"{plain}?inputs=age", [2])[0].tolist() == [22.0]
    source = open_source(f"{plain}?inputs=age,member&key=person")
    assert (source.keys(1, 3), source.labels(1, 3).tolist()) == (["p1", "p2"], [1, 2])
    if plain.suffix == ".parquet":  # which has groups of rows, and types
        assert len(source.blocks()) == 4
        assert source.read([0])[0].raw.dtype == np.float32  # type: ignore[union-attr]


def test_a_star_takes_every_column_of_numbers(plain: Path, tmp_path: Path) -> None:
    rows = np.stack([AGE, INCOME, MEMBER], axis=1).astype(np.float32)
    for words, expected in {
        "inputs=*": rows,
        "inputs=*&label=none": rows,  # a label that is not read is no input, either
        "inputs=*&label=age&rows=2:4": np.stack([INCOME, MEMBER, np.arange(N) % 3], axis=1)[2:4].astype(np.float32),
        "key=age&inputs=*": rows[:, 1:],
    }.items():
        source = open_source(f"{plain}?{words}")
        np.testing.assert_array_equal(np.stack(decoded(f"{plain}?{words}", range(len(source)))), expected)
    source = open_source(f"{plain}?inputs=*&key=person", ignore_labels=True)
    assert source.findings.notes == ("inputs=* takes 3 columns: 'age', 'income', 'member'",)
    state = nn.Linear(3, 3)
    save_file(state.state_dict(), tmp_path / "linear.safetensors")
    teacher = f"python:torch.nn:Linear@{tmp_path}/linear.safetensors?in_features=3&out_features=3"
    softlabel.generate(f"{plain}?inputs=*&key=person", teachers=[teacher], out=tmp_path / "labels", device="cpu")
    recorded = softlabel.open_store(tmp_path / "labels").manifest.recorded["data"]
    assert recorded == f"{plain}?inputs=age,income,member&key=person"


def test_a_star_that_means_nothing_clear_is_refused(table: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "words.csv", label=[0, 1], name=["a", "b"])
    write_table(tmp_path / "comma.csv", **{"a,b": [0, 1]})
    write_table(tmp_path / "index.parquet", x=[0.5, 1.5], __index_level_0__=[3, 4])
    (tmp_path / "index.csv").write_text(",x\n3,0.5\n4,1.5\n")
    for name, message in {
        table.name: "expected columns of one number each, found 'series' of fixed_size_list",
        "words.csv": r"inputs=\*: expected a column of numbers beside key and labels, found none among label, name",
        "comma.csv": "column 'a,b': expected names without a comma",
    }.items():
        with pytest.raises(SoftLabelError, match=message):
            open_source(f"{tmp_path}/{name}?inputs=*")
    for name in ("index.parquet", "index.csv"):
        assert decoded(f"{tmp_path}/{name}?inputs=*", [1])[0].tolist() == [1.5]


def test_keys_labels_and_cells_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("NA\nother\n")
    text = '\ufeffage, who ,kind\r\n1,007,NA\r\n\r\n2,"a, ""b""\r\nc",\r\nNA,x,other\r\n'
    (tmp_path / "t.csv").write_text(text, newline="")
    source = open_source(f"{tmp_path}/t.csv?inputs=age&key=who&label=kind&classes={tmp_path}/names.txt")
    assert source.keys() == ["007", 'a, "b"\r\nc', "x"]
    assert source.labels().tolist() == [0, -100, 1]
    assert str(source.read([2])[0].raw) == "null in column 'age'"
    flags = "a,b,c,x,id\n1,,0,3,007\n0,,-1,4,7\n1.0,,nan,5,8\n"
    (tmp_path / "flags.csv").write_text(flags)
    several = open_source(f"{tmp_path}/flags.csv?inputs=*&labels=a,b,c&key=id")
    assert (several.keys(), several.read([1])[0].raw.tolist()) == (["007", "7", "8"], [4])  # type: ignore[union-attr]
    assert several.labels().tolist() == [[1, -1, 0], [0, -1, -1], [1, -1, -1]]
    assert several.class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (b"a,b\n1,2\n1,2,3\n", "inputs=a", "found: CSV parse error: Row #3: Expected 2 columns, got 3: 1,2,3"),
        (b"", "inputs=a", "expected a heading that names the columns, found nothing"),
        (b"a,b\n", "inputs=a", "expected at least one row below the heading"),
        (b"a,a\n1,2\n", "inputs=a", "column 'a': expected a different name for every column"),
        (b"a\n\xff\n", "inputs=a", "expected a table in UTF-8 with a heading, found: byte 0xff in line 2; convert"),
        (b"a,k\n1,x\n2,\n", "inputs=a&key=k", "expected a key in every row, found 1 of 2 rows without 'k'"),
        (b"a,k\n1,x\n2,x\n", "inputs=a&key=k", "expected a unique key for every sample, found repeated: 'x'"),
        (b"a,k\n1,x\n2,y\n", "inputs=a&label=k", "expected a class number, found 'x'; class names need"),
        (b"a,k\n1,x\n2,y\n", "inputs=a&shape=3", "unknown option shape; a .csv file takes inputs, key, label"),
        (
            b"a,k\n1,x\n2,y\n",
            "",
            r"expected a class number, found 'k'; .*'\?inputs=COLUMN,COLUMN' names those of numbers",
        ),
    ],
)
def test_a_file_that_is_no_table_is_refused(content: bytes, words: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(SoftLabelError, match=message):
        open_source(f"{tmp_path}/t.csv?{words}")
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(SpecError, match=r"inputs= names columns of a .parquet, .csv or .tsv file, found .jsonl"):
        open_source(f"{tmp_path}/t.jsonl?inputs=a")


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


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_null_or_nan_is_a_bad_sample_by_its_key(suffix: str, tmp_path: Path) -> None:
    columns: list[list[Any]] = TABLE.T.tolist()
    columns[1][4], columns[2][6], columns[0][8] = None, float("nan"), float("-inf")
    names = [f"c{place}" for place in range(6)]
    write_table(tmp_path / f"t.{suffix}", **dict(zip(names, columns, strict=True)))
    model = write_weights(build_mlp, tmp_path / "mlp.safetensors")
    teacher = f"python:{MODULE}:build_mlp@{tmp_path}/mlp.safetensors"
    data = f"{tmp_path}/t.{suffix}?inputs={','.join(names)}"
    softlabel.generate(data, teachers=[teacher], out=tmp_path / "labels", device="cpu")
    assert softlabel.open_store(tmp_path / "labels").bad == {
        "4": "null in column 'c1'",
        "6": "NaN in column 'c2'",
        "8": "an infinite number in column 'c0'",
    }
    write_table(tmp_path / f"t.{suffix}", **dict(zip(names, TABLE.T, strict=True)))
    softlabel.generate(data, teachers=[teacher], out=tmp_path / "good", device="cpu", encoding="float32")
    assert_labels(tmp_path / "good", model, torch.from_numpy(TABLE).float())


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(
    ("numbers", "finding"),
    [
        (pa.array([1, -(2**24)], pa.int64()), None),
        (pa.array([1, 2**24 + 1], pa.int32()), "integers up to 16,777,217; a network that takes float32 gets those"),
        (pa.array([-(2**53), None], pa.int64()), "integers up to 9,007,199,254,740,992"),
        (pa.array([2**53 + 1, 0], pa.int64()), DataError),
        (pa.array([2**64 - 1, 0], pa.uint64()), DataError),
    ],
)
def test_integers_that_floats_do_not_hold(numbers: pa.Array, finding: Any, statistics: bool, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"day": numbers, "x": [0.5, 1.5]}), path, write_statistics=statistics)
    if finding is DataError:
        with pytest.raises(DataError, match=r"column 'day': expected integers of at most 2\^53"):
            open_source(f"{path}?inputs=day,x")
        return
    warnings = open_source(f"{path}?inputs=day,x").findings.left_out
    assert len(warnings) == (finding is not None)
    assert all(finding in warning for warning in warnings)


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
        ("inputs=age,income&label=age", "column 'age' is an input and the label"),
        ("inputs=age,label", "column 'label' is an input and the label"),
        ("inputs=age&image=person", "image= names encoded images, inputs= columns of numbers"),
        ("inputs=age&exif=ignore", "are for encoded images, these are numbers"),
        ("inputs=age&text=person", "text= names texts, inputs= columns of numbers"),
        ("label=label", "columns of numbers with '[?]inputs=COLUMN,COLUMN'"),
    ],
)
def test_what_cannot_be_meant_is_refused(plain: Path, words: str, message: str) -> None:
    with pytest.raises(SoftLabelError, match=message):
        open_source(f"{plain}?{words}")


def test_lists_beside_other_columns_are_refused(table: Path) -> None:
    with pytest.raises(SpecError, match="or a single column of lists, found 2 columns, 'tokens' among them"):
        open_source(f"{table}?inputs=age,tokens")
