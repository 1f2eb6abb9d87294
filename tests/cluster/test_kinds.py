"""Workers of a cluster label every kind of samples as one process does, to the bit."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.inputs.test_tensor_samples import MODULE, TABLE, build_mlp, write_weights
from tests.support.clusters import list_shards
from tests.support.commands import run_softlabel
from tests.support.texts import SENTENCES, save_classifier

pytest.importorskip("distributed", reason="dask is not installed")

LONG = "never say what they mean " * 50
TEXTS = [*SENTENCES, LONG, "", *SENTENCES[::-1], LONG]
N = len(TEXTS)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of a scheduler with two workers, threads of this process that are reached as others are."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", dashboard_address=None
    ) as cluster:  # type: ignore[no-untyped-call]
        yield cluster.scheduler_address


def write_table(folder: Path) -> list[str]:
    write_weights(build_mlp, folder / "w.safetensors")
    columns = {name: TABLE[:N, place] for place, name in enumerate("abcdef")}
    pq.write_table(pa.table({**columns, "label": np.arange(N) % 5}), folder / "table.parquet")
    teacher = f"python:{MODULE}:build_mlp@{folder}/w.safetensors"
    return ["--data", f"{folder}/table.parquet?inputs=a,b,c,d,e,f", "--teacher", teacher]


def write_texts(folder: Path) -> list[str]:
    labels = {name: pa.array([[1, 0, None][(row + place) % 3] for row in range(N)]) for place, name in enumerate("xyz")}
    pq.write_table(pa.table({"text": TEXTS, **labels}), folder / "texts.parquet")
    teachers = [
        word for seed in (0, 1) for word in ("--teacher", f"text:{save_classifier(folder / f't{seed}', seed=seed)}")
    ]
    options = ["--activation", "sigmoid", "--combine", "keep"]
    return ["--data", f"{folder}/texts.parquet?labels=x,y,z", *teachers, *options]


TRUNCATED = f"2 of {N} texts are longer than a teacher takes"


def assert_same_shards(write: Callable[[Path], list[str]], folder: Path, said: str, *cluster: object) -> None:
    options = [*write(folder), "--device", "cpu", "--batch-size", 4, "--shard-rows", 8]
    run_softlabel("generate", *options, "--out", folder / "alone", "--no-preflight")
    done = run_softlabel("generate", *options, "--out", folder / "store", *cluster)
    assert f"complete, {N} rows" in done.stdout
    assert said in done.stderr
    assert "stacked" not in done.stderr
    written, expected = ([path.read_bytes() for path in list_shards(folder / name)] for name in ("store", "alone"))
    assert len(written) == 3
    assert written == expected


@pytest.mark.parametrize(("write", "said"), [(write_table, ""), (write_texts, TRUNCATED)])
def test_a_cluster_and_one_process_write_the_same_shards(
    write: Callable[[Path], list[str]], said: str, scheduler: str, tmp_path: Path
) -> None:
    assert_same_shards(write, tmp_path, said, "--scheduler", scheduler)


@pytest.mark.slow
def test_workers_in_processes_of_their_own_label_texts(tmp_path: Path) -> None:
    assert_same_shards(write_texts, tmp_path, TRUNCATED, "--cluster", "local", "--cluster-workers", 2)
