"""One sequence of global batches, however many ranks and workers there are and wherever a run was resumed."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from softlabel.errors import UsageError
from softlabel.loader import Batch, SoftLabelLoader
from softlabel.views import CropFlip
from tests.support.stores import draw_logits, write_logits

SAMPLES, CLASSES = 45, 5
WORLDS = (1, 2, 3, 4, 8)


class Arrays(Dataset[tuple[np.ndarray, int]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.random.default_rng(index).integers(0, 256, (6, 6, 3), dtype=np.uint8), index % CLASSES


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "store"
    write_logits(path, [str(index) for index in range(SAMPLES)], draw_logits(SAMPLES, CLASSES), temperature=1)
    return path


def loaders(store: Path, world: int, **changes: Any) -> list[SoftLabelLoader]:
    """One for each rank. The augmentation makes a view's number visible in the pixels."""
    chosen: dict[str, Any] = {"batch_size": 12, "tail": "pad", "seed": 3, "augment": CropFlip(padding=2), **changes}
    return [SoftLabelLoader(Arrays(), store, rank=rank, world_size=world, **chosen) for rank in range(world)]


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a global batch that counts, as its rank saw it."""

    key: str
    image: bytes
    label: int
    logits: bytes


def counted(batch: Batch) -> list[Row]:
    assert batch.target is not None
    keep = range(len(batch)) if batch.weight is None else np.flatnonzero(batch.weight.numpy()).tolist()
    return [
        Row(
            batch.keys[n],
            batch.inputs[n].numpy().tobytes(),
            int(batch.labels[n]),
            batch.target.scaled_logits[n].numpy().tobytes(),
        )
        for n in keep
    ]


def run(ranks: Sequence[SoftLabelLoader], steps: int | None = None) -> list[list[Row]]:
    """Global batches: what all ranks of a step saw, in the order of the ranks. Checks that they are in step."""
    found = []
    iterators = [iter(loader) for loader in ranks]
    for _ in range(steps) if steps is not None else itertools.count():
        batches = [next(iterator, None) for iterator in iterators]
        if batches[0] is None:
            assert batches == [None] * len(ranks)
            break
        assert len({len(batch) for batch in batches}) == 1
        assert len({batch.weight is None for batch in batches}) == 1
        found.append([row for batch in batches for row in counted(batch)])
    states = [loader.state_dict() for loader in ranks]
    assert all(state == states[0] for state in states)
    return found


def flat(batches: list[list[Row]]) -> list[tuple[Any, ...]]:
    return [(row.key, row.image, row.label, row.logits) for batch in batches for row in batch]


def keys(batches: list[list[Row]]) -> list[list[str]]:
    return [[row.key for row in batch] for batch in batches]


@pytest.mark.parametrize("batch_size", [8, 12, 13, SAMPLES])
def test_every_number_of_ranks_sees_the_same_global_batches(store: Path, batch_size: int) -> None:
    (one,) = loaders(store, 1, batch_size=batch_size, tail="keep")
    reference = [run([one]), run([one])]
    assert [len(batch) for batch in reference[0]] == [
        min(batch_size, SAMPLES - start) for start in range(0, SAMPLES, batch_size)
    ]
    for epoch in reference:
        assert Counter(row[0] for row in flat(epoch)) == Counter(map(str, range(SAMPLES)))
    assert keys(reference[0]) != keys(reference[1])
    for world in WORLDS:
        ranks = loaders(store, world, batch_size=batch_size)
        assert {len(rank) for rank in ranks} == {len(reference[0])}
        for epoch in reference:
            found = run(ranks)
            assert keys(found) == keys(epoch)
            assert flat(found) == flat(epoch)
        dropping = loaders(store, world, batch_size=batch_size, tail="drop")
        full = [batch for batch in reference[0] if len(batch) == batch_size]
        assert keys(run(dropping)) == keys(full)
        assert {len(rank) for rank in dropping} == {len(full)}


def test_an_epoch_smaller_than_a_batch_is_one_step_on_every_rank(store: Path) -> None:
    for tail in ("drop", "pad"):
        ranks = loaders(store, 4, batch_size=100, tail=tail)
        assert {len(rank) for rank in ranks} == {1}
        (batch,) = run(ranks)
        assert sorted(int(row.key) for row in batch) == list(range(SAMPLES))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(8, 50), min_size=1, max_size=4),
    worlds=st.lists(st.sampled_from(WORLDS), min_size=4, max_size=4),
    steps=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    epoch=st.integers(0, 10**9),
)
def test_a_run_that_is_stopped_and_resumed_anywhere_goes_on_in_the_same_order(
    store: Path, sizes: list[int], worlds: list[int], steps: list[int], epoch: int
) -> None:
    """Stopped and resumed with other numbers of ranks and other batch sizes: every sample once, in the one order."""
    (one,) = loaders(store, 1, tail="keep")
    one.set_epoch(epoch)
    expected = flat(run([one]))
    found, state = [], {**one.state_dict(), "epoch": epoch, "sample": 0}
    for size, world, count in zip(sizes, worlds, steps, strict=False):
        ranks = loaders(store, world, batch_size=size)
        for rank in ranks:
            rank.load_state_dict(state)
        found += flat(run(ranks, count))
        state = ranks[-1].state_dict()
        if state["epoch"] != epoch:  # it was the end of the epoch
            break
        assert state["sample"] == len(found)
        if len(found) == SAMPLES:  # its last batch was, and what follows is the next one
            ranks[0].load_state_dict(state)
            assert ranks[0].epoch == epoch + 1
            break
    else:
        (last,) = loaders(store, 1, tail="keep")
        last.load_state_dict(state)
        found += flat(run([last]))
    assert found == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_four_ranks_with_workers_then_two_then_three(store: Path, workers: int) -> None:
    (one,) = loaders(store, 1, tail="keep")
    expected = run([one])
    found: list[list[Row]] = []
    state = {**one.state_dict(), "epoch": 0}
    for world, count in [(4, 1), (2, 2), (3, None)]:
        ranks = loaders(store, world, workers=workers if world < 4 else 1)
        for rank in ranks:
            rank.load_state_dict(state)
        found += run(ranks, count)
        state = ranks[0].state_dict()
        for rank in ranks:
            rank.close()
    assert keys(found) == keys(expected)
    assert flat(found) == flat(expected)


def rank_main(rank: int, meeting: str, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    loader = SoftLabelLoader(
        Arrays(), store, batch_size=13, tail="pad", seed=3, rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    steps = []
    for batch in loader:
        mine = [key for key, weight in zip(batch.keys, batch.weight.tolist(), strict=True) if weight]
        everyone: list[list[str]] = [[], []]
        dist.all_gather_object(everyone, mine)
        steps.append([key for part in everyone for key in part])
    torch.save(steps, f"{out}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_load_what_one_does(store: Path, tmp_path: Path) -> None:
    arguments = (str(tmp_path / "meeting"), str(store), str(tmp_path))
    mp.start_processes(rank_main, args=arguments, nprocs=2, start_method="forkserver")
    (one,) = loaders(store, 1, batch_size=13, tail="keep", augment=None)
    expected = [list(batch.keys) for batch in one]
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) == expected


def test_ranks_that_cannot_be_in_step_are_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="'keep' would give 2 ranks different batches"):
        loaders(store, 2, tail="keep")
    with pytest.raises(UsageError, match="at least one row for each of 8 ranks, found 4"):
        loaders(store, 8, batch_size=4)
    with pytest.raises(UsageError, match="expected 0 <= rank < world_size, found 2 and 2"):
        SoftLabelLoader(Arrays(), store, rank=2, world_size=2, tail="drop")
    with pytest.raises(UsageError, match="tail: expected keep, drop or pad, found 'cut'"):
        loaders(store, 1, tail="cut")
