"""The contract of sources over those whose samples are arrays: tables, tensors and images of many bands."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabel.dataset import Source, open_source
from softlabel.testing import ExpectedSample, SourceTests

N = 13
RANDOM = np.random.default_rng(4)
TABLE = RANDOM.standard_normal((N, 3)).astype(np.float32).astype(np.float64)  # float32 has them exactly
SPECTRA = RANDOM.standard_normal((N, 2, 5)).astype(np.float16)
TILES = RANDOM.standard_normal((N, 4, 6, 13)).astype(np.float32)
LABELS = [row % 3 for row in range(N)]


class Mapped:
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[np.ndarray[Any, Any], int]:
        return SPECTRA[index], LABELS[index]


def parquet(folder: Path) -> str:
    columns = {name: TABLE[:, place] for place, name in enumerate("abc")}
    pq.write_table(pa.table({**columns, "label": LABELS}), folder / "t.parquet", row_group_size=4)
    return f"{folder}/t.parquet?inputs=a,b,c"


def csv(folder: Path) -> str:
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


CASES: dict[str, tuple[Callable[[Path], Any], np.ndarray[Any, Any]]] = {
    "table": (parquet, TABLE),
    "csv": (csv, TABLE),
    "lists": (lists, SPECTRA),
    "npz": (npz, SPECTRA),
    "bands": (h5, np.ascontiguousarray(np.moveaxis(TILES, -1, 1))),
    "dataset": (lambda folder: Mapped(), SPECTRA),
}


class TestArraySources(SourceTests):
    @pytest.fixture(params=list(CASES))
    def case(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def expected(self, case: str) -> Sequence[ExpectedSample]:
        rows = CASES[case][1]
        return [ExpectedSample(key=str(row), pixels=rows[row], label=LABELS[row]) for row in range(N)]

    @pytest.fixture
    def make_source(self, case: str, tmp_path: Path) -> Callable[[], Source]:
        data = CASES[case][0](tmp_path)
        return lambda: open_source(data)
