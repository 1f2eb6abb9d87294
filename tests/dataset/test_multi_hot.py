"""Hard labels of several classes at once, known or not, from every source that has them.

N samples, C classes.
"""

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from softlabel.common.multi_hot import to_multi_hot
from softlabel.dataset import open_source
from softlabel.dataset.concat import SeveralSources
from softlabel.errors import DataError, MismatchError, SoftLabelError, SpecError
from tests.support.datasets import make_jpeg

LABELS: list[Any] = [[1, 0, None], [0, 1, 1], None, [None, 0, 0], [1, 1, 1]]
EXPECTED = [[1, 0, -1], [0, 1, 1], [-1, -1, -1], [-1, 0, 0], [1, 1, 1]]
IMAGES = np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8)


def check(source: Any, expected: list[list[int]] = EXPECTED) -> None:
    assert source.label_width == len(expected[0])
    assert source.has_labels
    assert source.labels().dtype == np.int8
    np.testing.assert_array_equal(source.labels(), expected)
    np.testing.assert_array_equal(source.labels(1, 3), expected[1:3])
    order = [4, 0, 2]
    np.testing.assert_array_equal([sample.label for sample in source.read(order)], [expected[row] for row in order])


def write(path: Path, columns: dict[str, Any], rows: int = 5) -> Path:
    images = [{"bytes": make_jpeg(row), "path": f"{row}.jpg"} for row in range(rows)]
    pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.list_(pa.float32()), pa.list_(pa.int8(), 3)], ids=str)
def test_lists_of_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    path = write(tmp_path / "a.parquet", {"findings": pa.array(LABELS, kind)})
    source = open_source(f"{path}?label=findings")
    check(source)
    assert source.count_labelled() == 4
    assert not open_source(path).has_labels
    assert not open_source(f"{path}?label=findings", ignore_labels=True).has_labels
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert open_source(f"{path}?label=findings&classes={tmp_path}/names.txt").class_names == ("a", "b", "c")
    check(open_source(f"{path}?label=findings&rows=0:5"))
    # The first lists are null: what comes behind says how many classes there are.
    late = write(tmp_path / "late.parquet", {"findings": pa.array([None, None, *LABELS[:3]], kind)})
    check(open_source(f"{late}?label=findings"), [[-1] * 3, [-1] * 3, *EXPECTED[:3]])


def test_columns_of_parquet(tmp_path: Path) -> None:
    columns = {
        name: pa.array([None if row is None else row[place] for row in LABELS], pa.float64())
        for place, name in enumerate(("edema", "nodule", "none"))
    }
    path = write(tmp_path / "a.parquet", {**columns, "text": ["x"] * 5, "more": list(range(5))})
    source = open_source(f"{path}?labels=edema,nodule,none")
    check(source)
    assert source.class_names == ("edema", "nodule", "none")
    for options, reason in {
        "labels=edema,text": "column 'text': expected 0, 1 or null for a class, found string",
        "labels=edema,more": "expected 1, 0 or -1 .not known. for each class, found 2.0 for class 1 of row 0",
        "labels=edema,absent": "there is no column 'absent'",
        "labels=edema": "expected several columns",
    }.items():
        with pytest.raises(DataError if options == "labels=edema,more" else SpecError, match=reason):
            open_source(f"{path}?{options}")
    ragged = write(tmp_path / "ragged.parquet", {"ids": [[0, 1], [1], [0, 1], [1, 1], [0]]})
    with pytest.raises(DataError, match="expected lists of one length, 0 or 1 for each class"):
        open_source(f"{ragged}?label=ids")


TABLES = {
    "csv": (",", ["", "nan", "-1"]),
    "tsv": ("\t", ["", "-1.0", "-100"]),
    "jsonl": ("", [None, -1, float("nan")]),
}
CLASSES = ("Edema", "Lung Nodule", "none")


def write_text_table(path: Path, labels: list[list[int]], *, one_column: bool = False) -> Path:
    """A row for each label: a path, a text, and a column for each class, or, in JSON lines, one list."""
    delimiter, unknown = TABLES[path.suffix[1:]]
    rows: list[dict[str, Any]] = []
    for row, flags in enumerate(labels):
        (path.parent / f"{row}.jpg").write_bytes(make_jpeg(row))
        cells = [unknown[row % 3] if flag == -1 else flag for flag in flags]
        named = {"findings": cells} if one_column else dict(zip(CLASSES, cells, strict=True))
        rows.append({"path": f"{row}.jpg", "report": f"text {row}", **named, "label": row})
    with path.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", list(TABLES))
@pytest.mark.parametrize("samples", ["", "text=report&"], ids=["images", "texts"])
def test_columns_of_plain_files(suffix: str, samples: str, tmp_path: Path) -> None:
    path = write_text_table(tmp_path / f"t.{suffix}", EXPECTED)
    asked = f"{path}?{samples}labels={','.join(CLASSES)}"
    source = open_source(asked)
    check(source)
    assert (source.class_names, source.count_labelled()) == (CLASSES, 4)
    assert source.findings.labels_from == "columns Edema, Lung Nodule, none"
    check(pickle.loads(pickle.dumps(open_source(f"{asked}&rows=0:5"))))
    assert not open_source(asked, ignore_labels=True).has_labels
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    for options, reason in {
        "labels=Edema": "expected (none, or )?several columns",
        "labels=Edema,none&label=label": "expected several columns",
        "labels=Edema,absent": "there is no column 'absent'",
        "labels=Edema,path": "'path': expected 1, 0 or -1 .not known. for a class, found '0|is the path and a label",
        "labels=Edema,label": "line [0-9]+: column 'label': expected 1, 0 or -1 .not known. for a class, found '2'",
        f"labels={','.join(CLASSES)}&classes={tmp_path}/names.txt": "differs from the columns of labels=",
    }.items():
        with pytest.raises(SoftLabelError, match=reason):
            open_source(f"{path}?image=path&{options}" if not samples else f"{path}?{samples}{options}")


@pytest.mark.parametrize("samples", ["", "text=report&"], ids=["images", "texts"])
def test_lists_of_json_lines(samples: str, tmp_path: Path) -> None:
    path = write_text_table(tmp_path / "t.jsonl", EXPECTED, one_column=True)
    check(open_source(f"{path}?{samples}label=findings"))
    path.write_text('{"path": "9.jpg", "report": "x", "findings": [0, 1]}\n' + path.read_text())
    with pytest.raises(DataError, match="sample 1: expected a list of 2 labels, 0 or 1 for each class, as before"):
        open_source(f"{path}?{samples}label=findings")


def test_a_short_line_of_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,a,b\n0.jpg,1\n")
    with pytest.raises(DataError, match=r"line 2: expected 3 columns like the heading, found '0.jpg,1'"):
        open_source(f"{tmp_path}/t.csv?labels=a,b")


@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "behind"])
def test_fields_of_tar_members(adjacent: bool, tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for row, flags in enumerate(EXPECTED):
        members.append((f"{row}.jpg", make_jpeg(row)))
        # Not known is an absent field, null or -1.
        known = {name: flag for name, flag in zip(CLASSES, flags, strict=True) if flag >= 0 or row}
        if row != 2:  # of which nothing is known
            members.append((f"{row}.json", json.dumps({**known, "age": 60, "free": "text"}).encode()))
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members if adjacent else sorted(members, key=lambda member: member[0].split(".")[1]):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = open_source(f"{path}?labels={','.join(CLASSES)}")
    if adjacent:
        check(pickle.loads(pickle.dumps(source)))
    order = [int(key) for key in source.keys(0)]
    np.testing.assert_array_equal(source.labels(), np.array(EXPECTED)[order])
    assert (source.class_names, source.count_labelled()) == (CLASSES, 4)
    assert not open_source(f"{path}?labels={','.join(CLASSES)}", ignore_labels=True).has_labels
    assert open_source(f"{path}?labels=none,absent").findings.left_out == (
        "labels=: field 'absent' of the .json members is known of no sample",
    )
    for options, reason in {
        "labels=none": "expected several columns",
        "labels=none,Edema&label=.cls": "expected several columns",
        "labels=none,age": "json: column 'age': expected 1, 0 or -1 .not known. for a class, found '60'",
        "labels=absent,missing": "labels=absent,missing: no sample has a label in fields absent, missing of .json",
    }.items():
        with pytest.raises(DataError if options == "labels=none,age" else SpecError, match=reason):
            open_source(f"{path}?{options}")


def test_arrays(tmp_path: Path) -> None:
    known = np.array(EXPECTED, np.int8)
    np.savez(tmp_path / "a.npz", images=IMAGES, y=known, gaps=np.where(known < 0, np.nan, known))
    for name in ("y", "gaps"):
        check(open_source(f"{tmp_path}/a.npz?images=images&labels={name}"))


class Items:
    def __init__(self, labels: list[Any]) -> None:
        self.given = labels

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> Any:
        return IMAGES[index], self.given[index]


def test_items_of_a_dataset() -> None:
    given = [np.array([1.0, 0, np.nan]), torch.tensor([0, 1, 1]), None, [-1, 0, 0], np.array([True, True, True])]
    check(open_source(Items(given)))
    with pytest.raises(DataError, match=r"sample '1': expected a label of 3 numbers, .*, found int of shape"):
        open_source(Items([[1, 0, 0], 2])).read([1])


def test_several_sources_have_labels_of_one_kind() -> None:
    labelled, bare, classes = (
        open_source(Items(EXPECTED)),
        open_source(Items([None] * 5), ignore_labels=True),
        Items([0] * 5),
    )
    check(SeveralSources([labelled, bare]), [*EXPECTED, *[[-1] * 3] * 5])
    with pytest.raises(MismatchError, match=r"has class numbers, and .* labels of 3 classes at once"):
        SeveralSources([labelled, open_source(classes)])


def test_class_numbers_as_labels_of_independent_outputs() -> None:
    numbers = np.array([2, -100, 0])
    np.testing.assert_array_equal(to_multi_hot(numbers, 3), [[0, 0, 1], [-1, -1, -1], [1, 0, 0]])
    np.testing.assert_array_equal(to_multi_hot(np.array([1, -100, 0]), 1), [[1], [-1], [0]])
