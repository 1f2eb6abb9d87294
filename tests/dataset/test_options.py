"""Options of a SOURCE that name what is not there, or do not fit: a wrong request, not damaged data."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.dataset import open_source
from softlabel.errors import DataError, SpecError

COLUMNS = {"q": ["a", "b", "c"], "b": ["d", "e", "f"], "sl": [0.5, 1.5, 2.5], "class": [0, 1, 0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as Parquet, CSV and JSON lines, and arrays of as many rows."""
    root = tmp_path_factory.mktemp("options")
    pq.write_table(pa.table(COLUMNS), root / "t.parquet")
    lines = [",".join(COLUMNS), *(",".join(map(str, row)) for row in zip(*COLUMNS.values(), strict=True))]
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    (root / "t.jsonl").write_text('{"q": "a", "b": "d", "class": 0}\n{"q": "b", "b": "e", "class": 0}\n')
    np.savez(root / "a.npz", bands=np.zeros((3, 2, 4, 4), np.float32), few=np.zeros(2, np.int64), ids=np.zeros(3, int))
    return root


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("t.parquet?inputs=sl,xx", "no column 'xx'; the file has q, b, sl, class"),
        ("t.csv?inputs=sl,xx", "no column 'xx'; the file has q, b, sl, class"),
        ("t.csv?inputs=", "inputs=: expected a value, found nothing"),
        ("a.npz?inputs=", "inputs=: expected a value, found nothing"),
        ("a.npz?inputs=bandz", "no array 'bandz'; the archive has bands, few, ids"),
        ("a.npz?inputs=bands&labels=z", "no array 'z'"),
        ("a.npz?inputs=bands&labels=few", "labels in few: expected 3 integers"),
        ("a.npz?inputs=bands&keys=ids", "found repeated: '0'"),
        ("t.csv?text=txt", "no column 'txt'; the file has q, b, sl, class"),
        ("t.parquet?text=txt", "no column 'txt'"),
        ("t.parquet?text=sl", "column 'sl': expected texts, found double"),
        ("t.jsonl?text=q&text_pair=x", "no column 'x'; the file has q, b, class"),
        ("t.csv?text=q&label=lbl", "no column 'lbl'"),
        ("t.parquet?text=q&label=lbl", "no column 'lbl'"),
        ("t.csv?text=q&labels=class", "labels=class: expected several columns"),
        ("t.parquet?text=q&labels=class", "labels=class: expected several columns"),
        ("t.csv?inputs=sl&key=name", "no column 'name'"),
        ("t.jsonl?text=q&key=name", "no column 'name'"),
        ("t.csv?inputs=sl&key=class", "found repeated: '0' .samples 0 and 2."),
        ("t.parquet?text=q&key=class", "found repeated: '0'"),
        ("t.jsonl?text=q&key=class", "found repeated: '0'"),
        ("t.csv?text=q&label=q", "column 'q' is a text and the label"),
        ("t.parquet?text=q&label=q", "column 'q' is an input and the label"),
        ("t.csv?text=q&text_pair=q", "column 'q' is text= and text_pair="),
        ("t.parquet?text=q&text_pair=q", "column 'q' is text= and text_pair="),
        ("t.csv?image=path", "no column 'path'; the first line has q, b, sl, class"),
        ("t.csv?input=sl", "unknown option input; a .csv file takes inputs, key, label, labels, classes, text"),
        ("t.csv?txt=q&key=b", "unknown option txt; a .csv file takes inputs"),
        ("t.csv?key=b", "key= is not an option of a list of image files, which takes image, root, label"),
        ("t.parquet?input=sl", "unknown option input; a Parquet file takes inputs, text"),
        ("a.npz?input=bands&labels=z", "unknown option input; a .npz file takes inputs, layout"),
        ("digits?inputs=x", "unknown option inputs; digits takes rows"),
    ],
)
def test_a_wrong_option_is_a_wrong_request(source: str, message: str, folder: Path) -> None:
    with pytest.raises(SpecError, match=message):
        open_source(source if source.startswith("digits") else f"{folder}/{source}")


def test_damaged_data_are_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("q,class\na,0\nb,1,2\n")
    for options in ("text=q", "inputs=class"):
        with pytest.raises(DataError):
            open_source(f"{tmp_path}/t.csv?{options}")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.tsv", b'q\tclass\na\t0\n"b\t1\nc\t0\n', "?text=q", 'row that begins in line 3 .* as ""'),
        ("t.csv", b"q,class\na,0\ncaf\xe9,1\n", "?text=q", "byte 0xe9 in line 3; convert it"),
        ("t.csv", b"q,class\nso it is,x,0\n", "", "'[?]text=COLUMN' that of texts"),
        ("t.txt", b"a text\n", "", "'[?]text=COLUMN' names a column of texts"),
    ],
)
def test_lines_that_cannot_be_read_are_named(
    name: str, content: bytes, options: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(f"{tmp_path}/{name}{options}")
