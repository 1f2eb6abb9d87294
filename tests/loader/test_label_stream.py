"""Labels that are read in step with the images: the same batches, in bounded memory, from stores in one order."""

import dataclasses
import io
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash

from softlabel.errors import MismatchError, MissingKeyError, StoreCorruptError, UsageError
from softlabel.loader import Batch, SoftLabelLoader
from softlabel.loader.label_stream import LabelStream
from softlabel.loader.order import BlockOrder
from softlabel.store.open import open_store
from tests.support.datasets import write_parquet
from tests.support.digits import make_digit_jpegs
from tests.support.stores import FORMATS, Samples, make_run, write_store

ROWS, CLASSES = 200, 7
KEYS = [f"digits/{number:04d}.jpg" for number in range(ROWS)]


def write_data(path: Path, keys: list[str], group: int = 13) -> Path:
    """Digits under these keys, in row groups of 13."""
    images, _ = make_digit_jpegs()
    write_parquet(path, [images[int(key[-8:-4])] for key in keys], keys=keys)
    pq.write_table(pq.read_table(path), path, row_group_size=group)
    return path


@pytest.fixture(scope="module", params=FORMATS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples]:
    """data.parquet, and a store in shards of 16 rows; image 30 could not be labelled."""
    folder = tmp_path_factory.mktemp("streaming")
    write_data(folder / "data.parquet", KEYS)
    run = make_run(request.param, samples=ROWS, classes=CLASSES)
    hashes = [xxhash.xxh3_64_intdigest(image) for image in make_digit_jpegs()[0][:ROWS]]
    samples = dataclasses.replace(
        Samples.of(run, keys=KEYS), labels=np.full(ROWS, -100), content=np.array(hashes, dtype=np.uint64)
    )
    write_store(folder / "store", run, samples, bad=[30])
    return folder, samples


def loader(folder: Path, **changes: Any) -> SoftLabelLoader:
    chosen: dict[str, Any] = {"batch_size": 9, "seed": 2, "streaming": True, "window": 3, **changes}
    return SoftLabelLoader(folder / "data.parquet", folder / "store", **chosen)


def check(batch: Batch, samples: Samples) -> None:
    """Each row has the logits that were written for its key."""
    places = [samples.keys.index(key) for key in batch.keys]
    expected = samples.logits[0, places].astype(np.float16)
    assert batch.target is not None
    assert np.array_equal(batch.target.scaled_logits.numpy(), expected)


@pytest.mark.parametrize(
    "settings", [{}, {"workers": 2}, {"cache_mb": 0, "shuffle": False}, {"window": 1}, {"window": None}]
)
def test_streamed_labels_are_those_of_the_key(made: tuple[Path, Samples], settings: dict[str, Any]) -> None:
    folder, samples = made
    streamed = loader(folder, **settings)
    orders = []
    for _ in range(2):
        seen: list[str] = []
        for batch in streamed:
            check(batch, samples)
            seen += batch.keys
        assert Counter(seen) == Counter(KEYS) - Counter([KEYS[30]])
        orders.append(seen)
    assert (orders[0] == orders[1]) == (settings.get("shuffle") is False)
    streamed.close()
    assert [key for batch in streamed for key in batch.keys] != orders[0] or settings.get("shuffle") is False
    streamed.close()


def test_ranks_and_resumed_runs_stream_the_same_batches(made: tuple[Path, Samples]) -> None:
    folder, samples = made
    expected = [list(batch.keys) for batch in loader(folder)]
    ranks = [loader(folder, rank=rank, world_size=2, tail="pad") for rank in range(2)]
    found = []
    for one, other in zip(*ranks, strict=True):
        keys = []
        for batch in (one, other):
            check(batch, samples)
            keep = [True] * len(batch) if batch.weight is None else batch.weight.bool().tolist()
            keys += [key for key, counts in zip(batch.keys, keep, strict=True) if counts]
        found.append(keys)
    assert found == expected
    stopped = loader(folder)
    for number, _ in enumerate(stopped):
        if number == 7:
            break
    resumed = loader(folder, batch_size=5, workers=1)
    resumed.load_state_dict(stopped.state_dict())
    rest = []
    for batch in resumed:
        check(batch, samples)
        rest += batch.keys
    assert rest == [key for keys in expected[8:] for key in keys]
    for other_order in ({"window": 5}, {"streaming": False, "window": None}):
        with pytest.raises(MismatchError, match="order: 'shuffled, 16 blocks in 6 windows' in the state"):
            loader(folder, **other_order).load_state_dict(stopped.state_dict())
    for one in (stopped, resumed, *ranks):
        one.close()


def test_samples_without_labels_are_refused_left_out_or_filled(made: tuple[Path, Samples], tmp_path: Path) -> None:
    folder, samples = made
    (tmp_path / "store").symlink_to(folder / "store")
    keys = [*KEYS[:100], *(f"new/{number:04d}.jpg" for number in range(60)), *KEYS[100:]]
    write_data(tmp_path / "data.parquet", keys)
    with pytest.raises(MissingKeyError, match="60 of 260 samples have no row"):
        loader(tmp_path)
    for batch in loader(tmp_path, missing="skip"):
        check(batch, samples)
    hard = Counter[bool]()
    for batch in loader(tmp_path, missing="hard-only", window=1, batch_size=4):
        assert batch.has_target is not None
        assert batch.has_target.tolist() == [key in samples.keys for key in batch.keys]
        kept = batch.has_target.numpy()
        expected = samples.logits[0, [samples.keys.index(key) for key in batch.keys if key in samples.keys]]
        assert np.array_equal(batch.target.scaled_logits.numpy()[kept], expected.astype(np.float16))
        hard.update(kept.tolist())
    assert hard == {True: ROWS - 1, False: 60}


def test_a_store_in_another_order_is_refused_by_name(made: tuple[Path, Samples], tmp_path: Path) -> None:
    folder, _ = made
    (tmp_path / "store").symlink_to(folder / "store")
    write_data(tmp_path / "data.parquet", [*KEYS[:50], KEYS[51], KEYS[50], *KEYS[52:]])
    with pytest.raises(MismatchError, match=r"'digits/0051.jpg' before 'digits/0050.jpg'.* the other way round"):
        loader(tmp_path)
    assert len(loader(tmp_path, streaming=False, window=None)) == 23


def test_a_shard_that_vanishes_in_the_middle_of_an_epoch_is_named_and_the_run_resumes(
    made: tuple[Path, Samples], tmp_path: Path
) -> None:
    folder, samples = made
    expected = [key for batch in loader(folder) for key in batch.keys]
    store = open_store(folder / "store")
    streamed = loader(folder)
    seen: list[str] = []
    moved = []

    def train() -> None:
        for number, batch in enumerate(streamed):
            check(batch, samples)
            seen.extend(batch.keys)
            if number == 3:
                for record in store.shards:
                    path = folder / "store" / record.file
                    moved.append((path, path.rename(tmp_path / path.name)))

    with pytest.raises(StoreCorruptError, match=r"shards/0\d+-.*: missing; run 'softlabel repair"):
        train()
    assert seen == expected[: len(seen)]
    assert 36 <= len(seen) < ROWS - 1
    for path, kept in moved:
        kept.rename(path)
    resumed = loader(folder)
    resumed.load_state_dict(streamed.state_dict())
    assert seen + [key for batch in resumed for key in batch.keys] == expected
    # The loader itself goes on as well.
    streamed.load_state_dict(streamed.state_dict())
    assert seen + [key for batch in streamed for key in batch.keys] == expected


def test_memory_is_that_of_a_few_windows(tmp_path: Path) -> None:
    """60 MB of labels, of which three windows of 2 MB and the 8 MiB of one read may be in memory at a time."""
    rows, classes, block, batch = 30_000, 1000, 256, 256
    run = dataclasses.replace(make_run("hdf5", samples=rows, classes=classes), shard_rows=4096)
    samples = Samples.of(run, keys=map(str, range(rows)))
    write_store(tmp_path / "store", run, samples)
    order = BlockOrder(np.append(np.arange(0, rows, block), rows), window=4)
    stream = LabelStream(open_store(tmp_path / "store"), order, lambda epoch, sample: sample)
    tracemalloc.start()
    try:
        for start in range(0, rows, batch):
            stop = min(start + batch, rows)
            picked = order.at(0, np.arange(start, stop))
            target, _ = stream.take(0, start, stop, picked)
            assert np.array_equal(target.scaled_logits.numpy()[7], samples.logits[0, picked[7]].astype(np.float16))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        stream.close()
    assert peak < 4 * (4 * block * classes * 2) + (9 << 20)


def test_tar_shards_are_streamed_beside_their_labels(tmp_path: Path) -> None:
    """Two shards as WebDataset writes them, in which labels and images lie in one order."""
    images, _ = make_digit_jpegs()
    for number, part in enumerate((range(120), range(120, ROWS))):
        with tarfile.open(tmp_path / f"data-{number}.tar", "w") as tar:
            for place in part:
                entry = tarfile.TarInfo(f"digit-{place:04d}.jpg")
                entry.size = len(images[place])
                tar.addfile(entry, io.BytesIO(images[place]))
    run = make_run(samples=ROWS, classes=CLASSES)
    hashes = np.array([xxhash.xxh3_64_intdigest(image) for image in images[:ROWS]], dtype=np.uint64)
    samples = Samples.of(run, keys=[f"digit-{place:04d}" for place in range(ROWS)])
    samples = dataclasses.replace(samples, labels=np.full(ROWS, -100), content=hashes)
    write_store(tmp_path / "store", run, samples)
    streamed = SoftLabelLoader(
        str(tmp_path / "data-*.tar"), tmp_path / "store", batch_size=16, streaming=True, window=1, workers=1
    )
    seen: list[str] = []
    for batch in streamed:
        check(batch, samples)
        seen += batch.keys
    streamed.close()
    assert Counter(seen) == Counter(samples.keys)
    # One shard after the other, each shuffled within.
    assert len({key < "digit-0120" for key in seen[:80]}) == 1
    assert seen[:80] != sorted(seen[:80])


def test_a_window_is_for_streaming_alone(made: tuple[Path, Samples]) -> None:
    folder, _ = made
    with pytest.raises(UsageError, match="window: expected at least 1 block, and streaming"):
        loader(folder, streaming=False)
    with pytest.raises(UsageError, match="window"):
        loader(folder, window=0)
    hard_alone = SoftLabelLoader(folder / "data.parquet", streaming=True, batch_size=50)
    batches = list(hard_alone)
    assert all(batch.target is None for batch in batches)
    assert torch.equal(torch.cat([batch.samples for batch in batches]).sort().values, torch.arange(ROWS))
