"""Worker processes that are killed, and what workers have of the files and the memory of the process that made them."""

import os
import re
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import softlabel
from softlabel.errors import DataError
from softlabel.loader import SoftLabelLoader
from softlabel.store.open import open_store
from tests.support.stores import Samples, make_run, write_store

ROWS, CLASSES = 4096, 512  # 4 MiB of labels


class Images(Dataset[np.ndarray]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full((4, 4, 3), index % 256, dtype=np.uint8)


@pytest.fixture(scope="module", params=["parquet", "hdf5"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "store"
    run = make_run(request.param, samples=ROWS, classes=CLASSES, shard_rows=1024)
    write_store(path, run, Samples.of(run, keys=map(str, range(ROWS))))
    return path


def loader(store: Path, **changes: object) -> SoftLabelLoader:
    chosen = {"batch_size": 64, "workers": 2, "cache_mb": 0, "ignore_labels": True, **changes}
    # Less memory than the labels take: they are mapped, as those of a large store are.
    return SoftLabelLoader(Images(), open_store(store, memory=1 << 20), **chosen)  # type: ignore[arg-type]


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTLABEL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("streaming", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_worker_that_is_killed_is_named_and_the_run_resumes(store: Path, streaming: bool) -> None:
    whole = loader(store, workers=0, streaming=streaming)
    expected = [key for batch in whole for key in batch.keys]
    whole.close()
    before = set(children())
    broken = loader(store, streaming=streaming)
    seen: list[str] = []

    def train() -> None:
        for number, batch in enumerate(broken):
            seen.extend(batch.keys)
            if number == 3:
                victim = next(pid for pid in children() if pid not in before)
                os.kill(victim, signal.SIGKILL)

    with pytest.raises(
        DataError, match=r"Images: a loader process died .*may have run out of memory: use fewer workers"
    ):
        train()
    assert len(seen) < ROWS
    assert set(children()) <= before  # no process is left
    state = broken.state_dict()
    resumed = loader(store, streaming=streaming, workers=1)
    resumed.load_state_dict(state)
    assert seen + [key for batch in resumed for key in batch.keys] == expected
    # The same loader goes on with new workers, too.
    broken.load_state_dict(state)
    assert seen + [key for batch in broken for key in batch.keys] == expected
    for one in (broken, resumed):
        one.close()


def test_workers_share_the_mapped_labels_and_inherit_no_hdf5_handle(store: Path) -> None:
    mapped = loader(store)
    before = set(children())
    iterator = iter(mapped)
    for _ in range(40):  # both workers have gathered from all over the labels
        next(iterator)
    workers = [pid for pid in children() if pid not in before]
    assert len(workers) == 2
    for pid in workers:
        labels = 0
        for region in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text()):
            if re.search(r"/(cache/.*/logits\.bin|shards/.*\.h5)$", region.partition("\n")[0]):
                field = {
                    name: int(re.search(rf"(?m)^{name}: +(\d+) kB", region)[1]) for name in ("Rss", "Private_Dirty")
                }
                labels += field["Rss"]
                assert field["Private_Dirty"] == 0  # pages of the file, not copies
        assert labels > 1024  # kB that this worker has read through the map
    # A map holds its file open, which a fork may share; a handle of the HDF5 library it may not.
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0
    mapped.close()


def test_an_adapter_s_workers_share_them_as_well(store: Path) -> None:
    data = softlabel.with_soft_labels(Images(), open_store(store, memory=1 << 20))
    batches = DataLoader(data, batch_size=512, collate_fn=data.collate, num_workers=1)
    seen = torch.cat([target.scaled_logits for _, target in batches])
    expected = open_store(store).take(range(ROWS)).columns["logits"]
    assert np.array_equal(seen.numpy(), expected)


def test_a_cache_that_was_found_whole_is_looked_at_again_when_it_changes(store: Path, tmp_path: Path) -> None:
    expected = open_store(store).take(range(ROWS)).columns["logits"]
    for _ in range(3):  # built, found whole, remembered
        assert np.array_equal(open_store(store, memory=1 << 20).take(range(ROWS)).columns["logits"], expected)
    for path in (tmp_path / "cache").rglob("logits.bin"):  # HDF5 is mapped in place and has none
        with open(path, "r+b") as file:
            file.seek(1000)
            file.write(b"damaged")
    assert np.array_equal(open_store(store, memory=1 << 20).take(range(ROWS)).columns["logits"], expected)
