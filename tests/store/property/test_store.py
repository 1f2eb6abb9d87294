"""Whatever is written is what is read, in both formats: random sizes, keys, views, members, labels and encodings."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softlabel.common.hashing import Hasher
from softlabel.common.keys import Keys
from softlabel.labels.encodings import encode
from softlabel.store.encodings import Encoding, Float16, Float32, Int8, Sampled, TopK
from softlabel.store.formats.base import Rows
from softlabel.store.key_index import KeyIndex
from softlabel.store.manifest import BadRow, Combine, DatasetInfo, Member, Run
from softlabel.store.open import open_store
from softlabel.store.view_columns import ViewPolicy
from softlabel.store.writer import Committer, write_shard

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
LONG = st.builds(lambda one, count: one * count, TEXT, st.integers(100, 400))
ENCODINGS = st.one_of(
    st.sampled_from([Float32(), Float16(), Int8()]),
    st.builds(lambda k: TopK(k=k, temperatures=(2.0, 1.0)), st.integers(1, 50_000)),
    st.builds(Sampled, samples=st.integers(1, 20), draw=st.sampled_from(["independent", "systematic"])),
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    classes=st.one_of(st.integers(1, 300), st.sampled_from([257, 1000, 21_841, 40_000, 65_537])),
    keys=st.lists(st.one_of(TEXT, LONG), max_size=12, unique=True),
    shard_rows=st.integers(1, 13),
    views=st.integers(1, 3),
    members=st.integers(1, 3),
    encoding=ENCODINGS,
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    masked=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_written_is_read(
    classes: int,
    keys: list[str],
    shard_rows: int,
    views: int,
    members: int,
    encoding: Encoding,
    spread: float,
    masked: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    count = len(keys)
    logits = rng.normal(size=(views, count, members, classes)).astype(np.float32) * np.float32(spread)
    if masked and classes > 1:
        logits[..., rng.integers(1, classes) :] = -np.inf
    logits -= logits.max(axis=-1, keepdims=True)
    labels = np.where(rng.random(count) < 0.3, -100, rng.integers(0, classes, count))
    content = rng.integers(0, 2**64, count, dtype=np.uint64)
    bad = set(np.flatnonzero(rng.random(count) < 0.15).tolist())
    stored = {}
    for view in range(views):
        flat = torch.from_numpy(logits[view].reshape(-1, classes))
        seeds = torch.from_numpy(rng.integers(-(2**63), 2**63, len(flat)))
        columns = encode(flat, encoding, temperature=2.0, seeds_R=seeds)
        stored[view] = {name: column.reshape(count, -1).numpy() for name, column in columns.items() if count}
    for format in ("parquet", "hdf5"):
        run = Run(
            format=format,  # type: ignore[arg-type]
            num_classes=classes,
            temperature=2.0,
            encoding=encoding,
            combine=Combine(rule="keep" if members > 1 else "logits"),
            members=tuple(Member(spec=str(member), sha256="0") for member in range(members)),
            dataset=DatasetInfo(kind="folder", rows=count, fingerprint="0"),
            views=ViewPolicy(count=views),
            shard_rows=shard_rows,
        )
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            with Committer.open(root, run) as committer:
                for plan in committer.missing():
                    good = [index for index in range(plan.start, plan.stop) if index not in bad]
                    wrong = [index for index in range(plan.start, plan.stop) if index in bad]
                    rows = Rows(
                        keys=[keys[index] for index in good],
                        labels=labels[good].astype(np.int64),
                        content=content[good],
                        columns={one: array[good] for one, array in stored[plan.view].items()},
                    )
                    lost = [BadRow(index=index, key=keys[index], reason="x") for index in wrong]
                    committer.commit(write_shard(root, run, plan, rows, lost))
                committer.finish()
            store = open_store(root, verify="full")
            good = [index for index in range(count) if index not in bad]
            assert len(store) == views * len(good)
            assert set(store.bad) == {keys[index] for index in bad}
            for view in range(views):
                order = rng.permutation(good).astype(int).tolist()
                rows_found = store.lookup([keys[index] for index in order], view=view)
                taken = store.take(rows_found)
                assert taken.keys == [keys[index] for index in order]
                np.testing.assert_array_equal(taken.views, np.full(len(order), view))
                np.testing.assert_array_equal(taken.labels, labels[order])
                np.testing.assert_array_equal(taken.content, content[order])
                for one, array in stored[view].items():
                    np.testing.assert_array_equal(taken.columns[one], array[order])
                if order:
                    check_bound(encoding, taken.scaled_logits, logits[view][order], classes)
                    np.testing.assert_array_equal(
                        taken.scaled_logits,
                        encoding.decode(
                            {one: array[order] for one, array in stored[view].items()},
                            num_classes=classes,
                            temperature=2.0,
                            members=members,
                            kept=members > 1,
                        ),
                    )


def check_bound(encoding: Encoding, found: np.ndarray, true: np.ndarray, classes: int) -> None:
    found = found.reshape(true.shape)
    assert not np.isnan(found).any()
    if encoding == Float32():
        np.testing.assert_array_equal(found, true)
    elif encoding == Float16():
        finite = np.maximum(true, -65504)
        np.testing.assert_allclose(found, np.where(np.isneginf(true), true, finite), rtol=2.0**-11, atol=2.0**-24)
    elif encoding == Int8():
        lowest = np.maximum(true, -64.0)  # 128 / T
        step = (lowest.max(axis=-1) - lowest.min(axis=-1)) / 254
        error = np.abs(np.maximum(found, -64.0) - lowest)
        assert (error <= np.maximum(step[..., None] * 0.501, np.abs(lowest) * 2.0**-11) + 1e-4).all()
    elif isinstance(encoding, TopK):
        kept = np.argsort(-true, axis=-1, kind="stable")[..., : encoding.kept(classes)]
        values = np.take_along_axis(np.maximum(true, -65504), kept, -1)
        largest = -np.sort(-found, axis=-1)[..., :1]
        # Equal logits: the tail, spread evenly, lies a rounding of its logarithm above or below the kept ones.
        np.testing.assert_allclose(largest[..., 0], np.zeros(true.shape[:-1]), atol=1e-5)
        got = np.take_along_axis(found, kept, -1)
        exact = np.take_along_axis(true, kept, -1)
        ok = np.isclose(got, values, rtol=2.0**-10, atol=1e-6) | np.isneginf(exact)
        # Ties at the edge of the k largest may be kept one for the other; then the value is that of the even tail.
        assert (ok | (values <= values.min(axis=-1, keepdims=True))).all()
    else:
        assert (np.exp(found.astype(np.float64)).sum(axis=-1) < 1.0001).all()
        assert np.isneginf(found[np.isneginf(true)]).all()


class Colliding(Hasher):
    """A hasher whose answers collide all the time."""

    def __call__(self, keys, views):  # type: ignore[no-untyped-def]
        return super().__call__(keys, views) % np.uint64(3)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, max_size=40, unique=True), st.lists(TEXT, max_size=20), st.integers(1, 3))
def test_hash_collisions_never_return_another_row(keys: list[str], asked: list[str], views: int) -> None:
    table = Keys.of(keys * views)
    views_N = np.repeat(np.arange(views, dtype=np.int32), len(keys))
    index = KeyIndex(table, views_N, where="here", hasher=Colliding(1))
    for view in range(views):
        query = keys + asked
        found = index(Keys.of(query), view, views_N).tolist()
        assert found == [view * len(keys) + keys.index(key) if key in keys else -1 for key in query]
