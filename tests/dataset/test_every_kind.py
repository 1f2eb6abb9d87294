"""The contract of sources over every kind of samples but 8-bit images: arrays, images of many bands, texts, chats, and
documents of token ids."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from softlabel.dataset import Source, open_source, tokenize_source
from softlabel.inputs.vocabulary import read_vocabulary
from softlabel.testing import ExpectedSample, SourceTests
from tests.support.language_models import write_tokenizer

N = 13
RANDOM = np.random.default_rng(4)
TABLE = RANDOM.standard_normal((N, 3)).astype(np.float32).astype(np.float64)  # float32 has them exactly
SPECTRA = RANDOM.standard_normal((N, 2, 5)).astype(np.float16)
TILES = RANDOM.standard_normal((N, 4, 6, 13)).astype(np.float32)
LABELS = [row % 3 for row in range(N)]
NONE = [-100] * N
SEVERAL = [tuple([1, 0, -1][(row + place) % 3] for place in range(4)) for row in range(N)]
TEXTS = [
    "",
    "naïve — 日本語",
    'quoted "x", y',
    "two\nlines",
    "tab\there",
    "=1+1",
    *(f"text {row}" for row in range(6, N)),
]
PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))


class Mapped:
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[np.ndarray[Any, Any], int]:
        return SPECTRA[index], LABELS[index]


def parquet(folder: Path) -> str:
    columns = {name: TABLE[:, place] for place, name in enumerate("abc")}
    pq.write_table(pa.table({**columns, "label": LABELS}), folder / "t.parquet", row_group_size=4)
    return f"{folder}/t.parquet?inputs=a,b,c"


def csv_table(folder: Path) -> str:
    rows = [",".join([*map(repr, row), str(label)]) for row, label in zip(TABLE.tolist(), LABELS, strict=True)]
    (folder / "t.csv").write_text("\n".join(["a,b,c,label", *rows]))
    return f"{folder}/t.csv?inputs=*"


def lists(folder: Path) -> str:
    fixed = pa.array(SPECTRA.tolist(), type=pa.list_(pa.list_(pa.float16(), 5), 2))
    pq.write_table(pa.table({"x": fixed, "label": LABELS}), folder / "t.parquet", row_group_size=4)
    return f"{folder}/t.parquet?inputs=x"


def npz(folder: Path) -> str:
    np.savez(folder / "t.npz", x=SPECTRA, y=np.array(LABELS))
    return f"{folder}/t.npz?inputs=x&labels=y"


def h5(folder: Path) -> str:
    with h5py.File(folder / "t.h5", "w") as file:
        file["bands"], file["y"] = TILES, np.array(LABELS)
    return f"{folder}/t.h5?inputs=bands&labels=y&layout=channels-last"


class Sentences:
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": TEXTS[index], "label": LABELS[index]}


def write_texts(folder: Path, name: str, columns: dict[str, Any]) -> str:
    """A table in a file of the form that its suffix says."""
    path, rows = folder / name, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if name.endswith(".parquet"):
        pq.write_table(pa.table(columns), path, row_group_size=4)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, columns, delimiter="\t" if name.endswith(".tsv") else ",")
            table.writeheader()
            table.writerows(rows)
    return str(path)


def texts(name: str, options: str = "") -> Callable[[Path], str]:
    return lambda folder: write_texts(folder, name, {"text": TEXTS, "label": LABELS}) + options


def pairs(name: str) -> Callable[[Path], str]:
    columns = {"a": TEXTS, "b": TEXTS[::-1], "label": LABELS}
    return lambda folder: write_texts(folder, name, columns) + "?text=a&text_pair=b"


def findings(name: str) -> Callable[[Path], str]:
    flags = {
        place: [None if row[number] < 0 else row[number] for row in SEVERAL] for number, place in enumerate("stuv")
    }
    return lambda folder: write_texts(folder, name, {"text": TEXTS, **flags}) + "?text=text&labels=s,t,u,v"


CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": f"{number} …", **({"n": 1} if number else {})}]
    for number, text in enumerate(TEXTS)
]
IDS = [list(range(number + 1)) for number in range(N)]
MASKS = [[(number + place) % 2 for place in range(number + 1)] for number in range(N)]
# What follows a token counts at its position.
COUNTS = [[*mask[1:], 0] for mask in MASKS]


class Conversations:
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "messages": CHATS[index], "label": LABELS[index]}


def columns_of(name: str, columns: dict[str, Any], options: str = "") -> Callable[[Path], str]:
    return lambda folder: write_texts(folder, name, columns) + options


def tokenised(folder: Path) -> Source:
    vocabulary = read_vocabulary(write_tokenizer(folder / "tokenizer"))
    return tokenize_source(open_source(texts("t.parquet")(folder)), vocabulary, max_length=8)


def tokenised_ids(folder: Path) -> Source:
    vocabulary = read_vocabulary(write_tokenizer(folder / "tokenizer"))
    data = columns_of("t.jsonl", {"x": IDS, "m": MASKS}, "?tokens=x&mask=m")(folder)
    return tokenize_source(open_source(data), vocabulary, max_length=100)


def plain_ids() -> list[list[int]]:
    with TemporaryDirectory() as folder:
        path = write_tokenizer(Path(folder)) / "tokenizer.json"
        return [tokenizers.Tokenizer.from_file(str(path)).encode(text).ids[:8] for text in TEXTS]


@dataclass(frozen=True)
class Case:
    """How data are written (into a folder, giving the SOURCE), and what they must be read as."""

    write: Callable[[Path], Any]
    rows: Sequence[Any]
    labels: Sequence[Any] = tuple(LABELS)
    counts: Sequence[Any] | None = None


def npz_of_several(folder: Path) -> str:
    np.savez(folder / "t.npz", x=SPECTRA, y=np.array(SEVERAL, np.int8))
    return f"{folder}/t.npz?inputs=x&labels=y"


CASES = {
    "table": Case(parquet, TABLE),
    "csv": Case(csv_table, TABLE),
    "lists": Case(lists, SPECTRA),
    "npz": Case(npz, SPECTRA),
    "npz-several": Case(npz_of_several, SPECTRA, SEVERAL),
    "bands": Case(h5, np.ascontiguousarray(np.moveaxis(TILES, -1, 1))),
    "dataset": Case(lambda folder: Mapped(), SPECTRA),
    "text-parquet": Case(texts("t.parquet"), TEXTS),
    "text-parquet-several": Case(findings("t.parquet"), TEXTS, SEVERAL),
    "text-csv-several": Case(findings("t.csv"), TEXTS, SEVERAL),
    "text-csv": Case(texts("t.csv", "?text=text&label=label"), TEXTS),
    "text-tsv": Case(texts("t.tsv", "?text=text"), TEXTS),
    "text-jsonl": Case(texts("t.jsonl", "?text=text"), TEXTS),
    "text-dataset": Case(lambda folder: Sentences(), TEXTS),
    "pair-parquet": Case(pairs("t.parquet"), PAIRS),
    "pair-jsonl": Case(pairs("t.jsonl"), PAIRS),
    "chat-jsonl": Case(columns_of("t.jsonl", {"messages": CHATS}), CHATS, NONE),
    "chat-parquet": Case(columns_of("t.parquet", {"c": CHATS, "label": LABELS}, "?messages=c"), CHATS, NONE),
    "chat-dataset": Case(lambda folder: Conversations(), CHATS, NONE),
    "ids-jsonl": Case(columns_of("t.jsonl", {"x": IDS, "m": MASKS}, "?tokens=x&mask=m"), IDS, NONE, COUNTS),
    "ids-parquet": Case(columns_of("t.parquet", {"x": IDS, "m": MASKS}, "?tokens=x&mask=m"), IDS, NONE, COUNTS),
    "ids-parquet-all": Case(columns_of("t.parquet", {"x": IDS}, "?tokens=x"), IDS, NONE),
    "tokenised": Case(tokenised, plain_ids(), NONE),
    "tokenised-ids": Case(tokenised_ids, IDS, NONE, COUNTS),
}


def describe(row: Any) -> dict[str, Any]:
    """What a sample is, by the name that `ExpectedSample` has for it."""
    if isinstance(row, list):
        return {"ids": row} if isinstance(row[0], int) else {"text": json.dumps(row, ensure_ascii=False)}
    return {"text" if isinstance(row, str | tuple) else "pixels": row}


class TestEveryKind(SourceTests):
    @pytest.fixture(params=list(CASES))
    def case(self, request: pytest.FixtureRequest) -> Case:
        return CASES[request.param]

    @pytest.fixture
    def expected(self, case: Case) -> Sequence[ExpectedSample]:
        samples = enumerate(zip(case.rows, case.labels, case.counts or [None] * N, strict=True))
        return [
            ExpectedSample(key=str(number), label=label, counts=counts, **describe(row))
            for number, (row, label, counts) in samples
        ]

    @pytest.fixture
    def make_source(self, case: Case, tmp_path: Path) -> Callable[[], Source]:
        data = case.write(tmp_path)
        return lambda: open_source(data)


def test_a_fold_beside_other_data_keeps_the_number_of_classes(tmp_path: Path) -> None:
    """The highest class may be in the other fold alone."""
    labels = [2, *[0, 1] * 10]
    pq.write_table(pa.table({"a": np.arange(21.0), "label": labels}), tmp_path / "classes.parquet")
    pq.write_table(pa.table({"a": np.arange(9.0)}), tmp_path / "more.parquet")
    folds = [f"{tmp_path}/classes.parquet?inputs=a&label=label&{word}=1/2" for word in ("fold", "without_fold")]
    for source in folds:
        assert open_source([source, f"{tmp_path}/more.parquet?inputs=a"]).highest_label() == 2
