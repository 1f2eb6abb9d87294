"""The pass over a store that a report is made from: every row once, in order, and whole rows of a sample."""

from pathlib import Path

import numpy as np
import pytest

from softlabel.report.probabilities import LabelReader
from softlabel.report.store_pass import Block, choose_samples, run_pass
from softlabel.store.open import open_store
from tests.support.stores import Samples, make_run, write_store


class Blocks:
    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def add(self, block: Block) -> None:
        self.blocks.append(block)


@pytest.mark.parametrize("format", ["parquet", "hdf5"])
def test_every_row_is_shown_once_and_a_sample_has_all_views(tmp_path: Path, format: str) -> None:
    run = make_run(format, samples=50, classes=7, views=3)
    samples, bad = Samples.of(run), [4, 17, 33]
    write_store(tmp_path / "store", run, samples, bad=bad)
    good = np.setdiff1d(np.arange(50), bad)
    with open_store(tmp_path / "store") as store:
        seen = Blocks()
        found = run_pass(store, LabelReader(store), [seen], sample_rows=30, progress=False)
        assert np.concatenate([block.rows for block in seen.blocks]).tolist() == list(range(len(store)))
        assert np.concatenate([block.samples for block in seen.blocks]).tolist() == good.tolist() * 3
        views = np.concatenate([np.full(len(block), block.view) for block in seen.blocks])
        np.testing.assert_array_equal(views, store.views)
        np.testing.assert_array_equal(np.concatenate([block.labels for block in seen.blocks]), store.labels)
        chosen = np.intersect1d(choose_samples(50, 10), good)
        assert found.samples.tolist() == chosen.tolist() * 3
        taken = store.take(found.rows)
        np.testing.assert_array_equal(found.columns["logits"], taken.columns["logits"])
        np.testing.assert_array_equal(found.labels, taken.labels)
        np.testing.assert_array_equal(found.views, taken.views)
        assert run_pass(store, LabelReader(store), [], progress=False).rows.tolist() == list(range(len(store)))


def test_samples_are_spread_over_the_dataset_and_over_what_repeats_itself_in_it() -> None:
    chosen = choose_samples(1_000_000, 50_000)
    assert len(chosen) == 50_000
    np.testing.assert_array_equal(chosen // 20, np.arange(50_000))
    assert len(np.unique(chosen % 20)) == 20
    np.testing.assert_array_equal(choose_samples(1_000_000, 50_000), chosen)
    np.testing.assert_array_equal(choose_samples(7, 50_000), np.arange(7))
