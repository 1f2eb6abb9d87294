"""However a store grows, by samples and by views: old shards stay, and every (sample, view) has one place."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.store.manifest import DatasetInfo, Extent, Run
from softlabel.store.strict_json import from_json, to_json
from softlabel.store.view_columns import ViewPolicy
from tests.support.stores import make_run

POLICY = {"name": "crop-flip", "steps": [{"op": "crop-flip", "padding": 4, "flip": True}]}
STEPS = st.lists(st.tuples(st.sampled_from(["samples", "views"]), st.integers(1, 9)), max_size=5)


def run_of(extents: list[tuple[int, int]], shard_rows: int) -> Run:
    *past, (rows, views) = extents
    earlier = tuple(Extent(rows=rows, fingerprint=f"{rows:032x}", views=views) for rows, views in past)
    dataset = DatasetInfo(kind="parquet", rows=rows, fingerprint=f"{rows:032x}", earlier=earlier)
    views_then = ViewPolicy(count=views, policy=POLICY, seed=3)
    return dataclasses.replace(make_run(), dataset=dataset, views=views_then, shard_rows=shard_rows)


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 20), views=st.integers(1, 4), steps=STEPS, shard_rows=st.integers(1, 12))
def test_growth(rows: int, views: int, steps: list[tuple[str, int]], shard_rows: int) -> None:
    extents = [(rows, views)]
    for kind, more in steps:
        rows, views = (rows + more, views) if kind == "samples" else (rows, views + more)
        extents.append((rows, views))
    runs = [run_of(extents[: number + 1], shard_rows) for number in range(len(extents))]
    last = runs[-1]
    cells = [(plan.view, sample) for plan in last.plan() for sample in range(plan.start, plan.stop)]
    assert sorted(cells) == [(view, sample) for view in range(views) for sample in range(rows)]
    for number, run in enumerate(runs):
        assert last.plan()[: run.shard_count] == run.plan()
        # What an old shard says of its run is what the grown run expects of it.
        assert last.fingerprint(number) == run.fingerprint()
        assert from_json(Run, to_json(run)) == run
        assert last.grew_from(run) == (run != last)
        assert not run.grew_from(last)
    assert [(one.rows, one.views) for one in last.extents] == extents


def test_an_extent_names_its_views_only_where_they_were_fewer() -> None:
    run = run_of([(5, 2), (7, 2), (7, 4), (9, 4)], 3)
    assert [one.views for one in run.dataset.earlier] == [2, 2, None]
    assert "views" not in to_json(run_of([(5, 2), (7, 2)], 3).dataset)["earlier"][0]


@pytest.mark.parametrize("last", [(5, 2), (7, 3), (5, 1), (7, 1), (4, 2)])
def test_extents_that_do_not_grow_by_one_thing_are_refused(last: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must grow"):
        run_of([(5, 2), last], 3)
