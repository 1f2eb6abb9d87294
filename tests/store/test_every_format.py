"""One suite that every file format of the store passes."""

import ast
import dataclasses
import json
import multiprocessing
import pickle
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from softlabel.common.keys import Keys
from softlabel.errors import (
    DataError,
    MismatchError,
    MissingKeyError,
    StoreError,
    StoreIncompleteError,
    StoreLockedError,
    StoreNotFoundError,
    UsageError,
)
from softlabel.store.fidelity import Fidelity
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import Combine, DatasetInfo, Extent, Member, ShardRecord
from softlabel.store.open import open_store
from softlabel.store.sample_rows import sample_rows
from softlabel.store.verify import verify_store
from softlabel.store.view_columns import ViewPolicy
from softlabel.store.writer import Committer, write_shard
from tests.support import format_reader
from tests.support.documents import make_samples
from tests.support.stores import FIDELITY, FORMATS, Samples, make_reference_rows, make_run, read_files, write_store

pytestmark = pytest.mark.parametrize("format", FORMATS)
both_kinds = pytest.mark.parametrize("kind", ["images", "tokens"])
both_activations = pytest.mark.parametrize("activation", ["softmax", "sigmoid"])


@both_activations
def test_what_was_written_is_what_is_read(tmp_path: Path, format: str, activation: str) -> None:
    run, bad = make_run(format, views=3, activation=activation), (0, 17, 18, 49)
    samples = write_store(tmp_path / "s", run, bad=bad)
    expected = make_reference_rows(run, samples, bad)
    store = open_store(tmp_path / "s", verify="full")
    assert len(store) == 3 * 46
    assert list(store.bad) == [samples.keys[index] for index in bad]
    rows = store.take(range(len(store)))
    assert rows.keys == expected["keys"]
    for name in ("views", "labels", "content"):
        np.testing.assert_array_equal(getattr(rows, name), expected[name])
        assert getattr(rows, name).dtype == expected[name].dtype
    np.testing.assert_array_equal(rows.hard_labels, expected["hard"])
    assert rows.scaled_logits.dtype == np.float32
    np.testing.assert_array_equal(rows.scaled_logits, expected["logits"].astype(np.float16))
    streamed = list(store.stream())
    np.testing.assert_array_equal(np.concatenate([part.scaled_logits for part in streamed]), rows.scaled_logits)
    np.testing.assert_array_equal(np.concatenate([part.hard_labels for part in streamed]), expected["hard"])
    assert verify_store(tmp_path / "s").ok
    totals = store.manifest.totals
    assert (totals.shards, totals.rows, totals.bad) == (12, 138, 12)
    assert totals.fidelity is not None
    assert totals.fidelity.worst_t == FIDELITY.worst_t
    assert totals.fidelity.mean_t == pytest.approx(FIDELITY.mean_t)


def test_formats_hold_the_same_values(tmp_path: Path, format: str) -> None:
    other = next(name for name in FORMATS if name != format)
    for name in (format, other):
        write_store(tmp_path / name, make_run(name, views=2), bad=(3,))
    one, two = (open_store(tmp_path / name).take(range(98)) for name in (format, other))
    assert one.keys == two.keys
    for name in ("views", "labels", "content", "scaled_logits"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@both_activations
def test_read_by_the_format_document_alone(tmp_path: Path, format: str, activation: str) -> None:
    source = Path(format_reader.__file__).read_text()
    modules = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {str(name).split(".")[0] for name in modules} <= {"json", "h5py", "numpy", "pyarrow"}
    assert sum(bool(line.strip()) for line in source.splitlines()) < 60
    run = make_run(format, views=2, activation=activation)
    expected = make_reference_rows(run, write_store(tmp_path / "s", run, bad=(20,)), bad=(20,))
    found = format_reader.read_store(tmp_path / "s")
    assert list(found["key"]) == expected["keys"]
    for name, column in (("views", "view"), ("labels", "label"), ("content", "content")):
        np.testing.assert_array_equal(found[column], expected[name])
    np.testing.assert_array_equal(found["scaled_logits"], expected["logits"].astype(np.float16))
    np.testing.assert_array_equal(found.get("multi_hot", found["label"]), expected["hard"])


def test_lookup_joins_by_key_and_view(tmp_path: Path, format: str) -> None:
    run = make_run(format, views=2)
    samples = write_store(tmp_path / "s", run)
    store = open_store(tmp_path / "s")
    order = np.random.default_rng(1).permutation(50)
    asked = [samples.keys[index] for index in order]
    for view in range(2):
        rows = store.lookup(asked, view=view)
        assert rows.dtype == np.int64
        taken = store.take(rows)
        assert taken.keys == asked
        assert (taken.views == view).all()
        np.testing.assert_array_equal(taken.scaled_logits, samples.logits[view][order].astype(np.float16))
    twice = store.lookup([asked[0], asked[1], asked[0]])
    assert twice[0] == twice[2] != twice[1]
    np.testing.assert_array_equal(store.lookup(np.array(asked, object)), store.lookup(Keys.of(asked)))
    assert store.lookup([]).shape == (0,)


def test_lookup_of_keys_that_are_not_there(tmp_path: Path, format: str) -> None:
    samples = write_store(tmp_path / "s", make_run(format), bad=(7,))
    store = open_store(tmp_path / "s")
    np.testing.assert_array_equal(store.lookup(["x", samples.keys[3], ""], missing="mask"), [-1, 3, -1])
    with pytest.raises(MissingKeyError, match=r"2 of 3 keys.*'x', 'y'"):
        store.lookup(["x", samples.keys[3], "y"])
    with pytest.raises(MissingKeyError, match="truncated JPEG"):
        store.lookup([samples.keys[7]])
    for view in (True, 0.0, "0"):
        with pytest.raises(UsageError, match="view: expected"):
            store.lookup(["a"], view)
    with pytest.raises(UsageError, match="found 1"):
        store.lookup([samples.keys[0]], view=1)
    with pytest.raises(DataError):
        store.lookup(["\ud800"])


def test_take_and_stream(tmp_path: Path, format: str) -> None:
    run = make_run(format, samples=100)
    samples = write_store(tmp_path / "s", run)
    store = open_store(tmp_path / "s")
    rows = [99, 0, 50, 50, 16]
    taken = store.take(rows)
    assert taken.keys == [samples.keys[row] for row in rows]
    np.testing.assert_array_equal(taken.columns["logits"], samples.logits[0][rows].astype(np.float16))
    assert len(store.take([])) == 0
    assert store.take([]).scaled_logits.shape == (0, 7)
    for wrong in ([100], [-1]):
        with pytest.raises(UsageError, match="not one of its 100 rows"):
            store.take(wrong)
    for start, stop in ((0, None), (17, 80), (5, 5), (99, 100)):
        parts = list(store.stream(start=start, stop=stop))
        expected = list(range(start, 100 if stop is None else stop))
        assert [key for part in parts for key in part.keys] == [samples.keys[row] for row in expected]
        logits = np.concatenate([np.zeros((0, 7), np.float32), *(part.scaled_logits for part in parts)])
        np.testing.assert_array_equal(logits, samples.logits[0][expected].astype(np.float16))
    for nonsense in (
        np.zeros(100, bool),
        [True, False],
        np.array([0.0]),
        [[1]],
        ["1"],
        [1, None],
        {"a": 1},
        [[1], [2, 3]],
    ):
        with pytest.raises(UsageError, match=r"rows: expected integers \(B,\), found"):
            store.take(nonsense)
    assert store.take([]).keys == []
    assert store.take(np.array([3, 1], np.uint8)).keys == store.take([3, 1]).keys
    with pytest.raises(UsageError, match="no column"):
        list(store.stream(columns=["nothing"]))


@both_activations
def test_a_few_rows_come_from_their_shards_alone(tmp_path: Path, format: str, activation: str) -> None:
    run = make_run(format, samples=50, views=2, shard_rows=8, activation=activation)
    write_store(tmp_path / "store", run, bad=[3])
    names = ["key", "label", "content", *(column.name for column in run.columns)]
    rows = [1, 2, 9, 60, 61, 97]
    with open_store(tmp_path / "store") as store:
        expected = store.take(rows)
        stop = 0
        for record in store.shards:
            start, stop = stop, stop + record.rows
            if not any(start <= row < stop for row in rows):
                (tmp_path / "store" / record.file).unlink()
    with open_store(tmp_path / "store", verify="none") as store:
        found = sample_rows(store, rows, names)
        assert found.keys == expected.keys
        np.testing.assert_array_equal(found.views, expected.views)
        np.testing.assert_array_equal(found.hard_labels, expected.hard_labels)
        np.testing.assert_array_equal(found.content, expected.content)
        np.testing.assert_array_equal(found.scaled_logits, expected.scaled_logits)
        with pytest.raises(UsageError, match="was not read"):
            _ = sample_rows(store, rows, ["label"]).keys


def test_a_store_without_any_good_row(tmp_path: Path, format: str) -> None:
    write_store(tmp_path / "s", make_run(format, samples=20), bad=range(20))
    store = open_store(tmp_path / "s", verify="full")
    assert len(store) == 0
    assert len(store.bad) == 20
    assert len(store.take([])) == 0
    np.testing.assert_array_equal(store.lookup(["a"], missing="mask"), [-1])
    assert sum(len(part) for part in store.stream()) == 0


def test_many_bad_rows_and_long_keys(tmp_path: Path, format: str) -> None:
    """An HDF5 attribute of more than 64 KB and keys of every length up to the longest."""
    run = make_run(format, samples=1200, shard_rows=1000)
    keys = ["k" * (1 + length) for length in range(600)] + [f"{'ü' * 300}{number}" for number in range(600)]
    keys[5] = "x" * 65_535
    samples = write_store(tmp_path / "s", run, Samples.of(run, keys=keys), bad=range(600, 1100))
    store = open_store(tmp_path / "s", verify="full")
    assert len(store.bad) == 500
    good = [key for index, key in enumerate(keys) if not 600 <= index < 1100]
    np.testing.assert_array_equal(store.lookup(good), np.arange(700))
    assert store.take([5]).keys == [keys[5]]
    assert samples.keys == keys


def test_rows_that_do_not_fit_the_plan_are_refused(tmp_path: Path, format: str) -> None:
    run = make_run(format)
    samples = Samples.of(run)
    with Committer.open(tmp_path / "s", run) as committer:
        plan = committer.missing()[0]
        rows, _ = samples.rows(plan)
        half = dataclasses.replace(rows, columns={"logits": rows.columns["logits"].astype(np.float32)})
        for wrong, error, words in (
            (dataclasses.replace(rows, keys=rows.keys[1:]), ValueError, "found 15"),
            (half, ValueError, "float16"),
            (dataclasses.replace(rows, columns={}), ValueError, "columns"),
            (dataclasses.replace(rows, labels=np.zeros(3, np.int64)), ValueError, "labels"),
            (dataclasses.replace(rows, keys=["x" * 65_536, *rows.keys[1:]]), DataError, "65535 are allowed"),
            (dataclasses.replace(rows, keys=["\ud800", *rows.keys[1:]]), DataError, "Unicode"),
        ):
            with pytest.raises(error, match=words):
                write_shard(tmp_path / "s", run, plan, wrong)
        assert not list((tmp_path / "s" / "shards").iterdir())


def test_a_key_twice_is_found(tmp_path: Path, format: str) -> None:
    run = make_run(format)
    keys = Samples.of(run).keys
    keys[40] = keys[3]
    write_store(tmp_path / "s", run, Samples.of(run, keys=keys))
    assert any("occurs twice" in problem for problem in verify_store(tmp_path / "s").problems)
    with pytest.raises(StoreError, match="occurs twice"):
        open_store(tmp_path / "s").lookup([keys[0]])


def test_nan_is_found(tmp_path: Path, format: str) -> None:
    run = make_run(format)
    samples = Samples.of(run)
    samples.logits[0, 33, 2] = np.nan
    write_store(tmp_path / "s", run, samples)
    problems = verify_store(tmp_path / "s").problems
    assert len(problems) == 1
    assert "00002-" in problems[0]
    assert "nan" in problems[0]


def test_masked_classes_survive(tmp_path: Path, format: str) -> None:
    run = make_run(format)
    samples = Samples.of(run)
    samples.logits[0, :, 2:5] = -np.inf
    samples.logits[0] -= samples.logits[0].max(axis=-1, keepdims=True)
    write_store(tmp_path / "s", run, samples)
    logits = open_store(tmp_path / "s", verify="full").take(range(50)).scaled_logits
    np.testing.assert_array_equal(logits, samples.logits[0].astype(np.float16))


@both_kinds
def test_writing_is_deterministic_and_idempotent(tmp_path: Path, format: str, kind: str) -> None:
    run, samples = make_samples(kind, format, views=2)
    for name in ("one", "two"):
        write_store(tmp_path / name, run, samples)
    one, two = (
        {name: data for name, data in read_files(tmp_path / name).items() if name != "manifest.json"}
        for name in ("one", "two")
    )
    assert one == two
    before = {path: path.stat().st_ino for path in (tmp_path / "one" / "shards").iterdir()}
    for plan in run.plan():
        write_shard(tmp_path / "one", run, plan, *samples.rows(plan), fidelity=FIDELITY)
    assert {path: path.stat().st_ino for path in (tmp_path / "one" / "shards").iterdir()} == before


def test_first_record_of_a_shard_wins(tmp_path: Path, format: str) -> None:
    run = make_run(format)
    samples, others = Samples.of(run), Samples.of(run, seed=1)
    with Committer.open(tmp_path / "s", run) as committer:
        plans = committer.missing()
        first = write_shard(tmp_path / "s", run, plans[0], *samples.rows(plans[0]))
        late = write_shard(tmp_path / "s", run, plans[0], *others.rows(plans[0]))
        assert first.file != late.file
        assert committer.commit(first) == 1
        assert committer.commit(late, late) == 0
        assert committer.commit(*(write_shard(tmp_path / "s", run, one, *samples.rows(one)) for one in plans[1:])) == 3
        committer.finish()
    assert not (tmp_path / "s" / late.file).exists()
    found = open_store(tmp_path / "s", verify="full").take(range(50)).columns["logits"]
    np.testing.assert_array_equal(found, samples.logits[0].astype(np.float16))


def test_unfinished_and_absent_stores_are_refused(tmp_path: Path, format: str) -> None:
    run = make_run(format)
    samples = Samples.of(run)
    with pytest.raises(StoreNotFoundError, match="no store here"):
        open_store(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    for call in (open_store, verify_store, lambda path: Committer.open(path, run)):
        with pytest.raises(StoreError, match="file"):
            call(tmp_path / "file")
    with Committer.open(tmp_path / "s", run) as committer:
        plan = committer.missing()[1]
        committer.commit(write_shard(tmp_path / "s", run, plan, *samples.rows(plan)))
        with pytest.raises(StoreError, match="3 of 4 shards are missing"):
            committer.finish()
    with pytest.raises(StoreIncompleteError, match="1 of 4 shards"):
        open_store(tmp_path / "s")
    with pytest.raises(StoreIncompleteError):
        verify_store(tmp_path / "s")
    half = open_store(tmp_path / "s", allow_incomplete=True)
    assert half.take(range(len(half))).keys == samples.keys[16:32]


def test_another_version_is_refused(tmp_path: Path, format: str) -> None:
    import xxhash

    write_store(tmp_path / "s", make_run(format))
    root = tmp_path / "s" / "manifest.json"
    version = make_run(format).format_version
    raw = root.read_bytes().replace(b'"format_version": %d' % version, b'"format_version": 7')
    digits = json.loads(raw)["checksum"].encode()
    raw = raw.replace(digits, b"0" * 32)
    root.write_bytes(raw.replace(b"0" * 32 + b'"\n}', xxhash.xxh3_128_hexdigest(raw).encode() + b'"\n}'))
    for call in (open_store, verify_store):
        try:
            message = "; ".join(call(tmp_path / "s").problems)  # type: ignore[union-attr]
        except StoreError as error:
            message = str(error)
        assert "format version: expected 1, 2, 3, 4, 5 or 6, found 7" in message


def test_another_run_is_refused_by_name(tmp_path: Path, format: str) -> None:
    run = make_run(format)
    write_store(tmp_path / "s", run)
    before = read_files(tmp_path / "s")
    other_format = next(name for name in FORMATS if name != format)
    teacher = dataclasses.replace(run.members[0], sha256="1" * 64)
    for change, words in (
        ({"temperature": 2.0}, "temperature: the store has 4.0, this run 2.0"),
        ({"format": other_format, "compression": None}, f"format: the store has {format}, this run {other_format}"),
        ({"combine": Combine(rule="probs")}, "combine rule: the store has logits, this run probs"),
        ({"members": (teacher,)}, "teacher 1.sha256: the store has 000"),
        (
            {"members": (*run.members, Member(spec="zoo:resnet20", sha256="2"))},
            "teachers: the store has ['zoo:resnet8']",
        ),
        (
            {"dataset": DatasetInfo(kind="parquet", rows=51, fingerprint="x")},
            "dataset size: the store has 50, this run 51",
        ),
        ({"views": ViewPolicy(count=1, policy={"name": "crop"})}, "view policy: the store has center, this run crop"),
        ({"shard_rows": 8}, "rows per shard (--shard-rows): the store has 16, this run 8"),
    ):
        with pytest.raises(MismatchError) as caught:
            Committer.open(tmp_path / "s", dataclasses.replace(run, **change))
        assert words in str(caught.value)
    assert read_files(tmp_path / "s") == before


def test_two_writers_at_once(tmp_path: Path, format: str) -> None:
    run = make_run(format)
    with Committer.open(tmp_path / "s", run), pytest.raises(StoreLockedError, match=r"process \d+ on "):
        Committer.open(tmp_path / "s", run)
    Committer.open(tmp_path / "s", run).close()
    assert not (tmp_path / "s" / ".lock").exists()


def _rest(seconds: float) -> None:
    import time

    time.sleep(seconds)


def test_a_forked_child_does_not_keep_the_lease(tmp_path: Path, format: str) -> None:
    run = make_run(format)
    committer = Committer.open(tmp_path / "s", run)
    child = multiprocessing.get_context("fork").Process(target=_rest, args=(30,))
    child.start()
    committer.close()
    try:
        Committer.open(tmp_path / "s", run).close()
    finally:
        child.kill()
        child.join()


@both_kinds
def test_orphans_are_adopted_or_collected(tmp_path: Path, format: str, kind: str) -> None:
    """A killed run left shards unrecorded: ours is adopted, a damaged one and one of another run are not."""
    (run, samples), root = make_samples(kind, format), tmp_path / "s"
    with Committer.open(root, run) as committer:
        plans = committer.missing()
        ours, cut = (write_shard(root, run, plan, *samples.rows(plan), fidelity=FIDELITY) for plan in plans[:2])
        other = dataclasses.replace(run, temperature=1.0)
        foreign = write_shard(root, other, plans[2], *samples.rows(plans[2]))
    raw = (root / cut.file).read_bytes()
    (root / cut.file).write_bytes(raw[:-1])
    (root / "shards" / ".tmp-1-dead").write_bytes(b"half")
    (root / ".tmp-1-dead").write_bytes(b"half")
    (root / "shards" / "notes.txt").write_text("of the user")
    with Committer.open(root, run) as committer:
        assert [plan.number for plan in committer.missing()] == [1, 2, 3]
        assert committer.resumed == 0
        assert committer.manifest.totals.shards == 1
    assert not list(root.rglob(".tmp-*"))
    inode = (root / ours.file).stat().st_ino
    write_store(root, run, samples)
    assert (root / ours.file).stat().st_ino == inode
    assert (root / cut.file).read_bytes() == raw, "the damaged file was replaced by the same shard, whole"
    assert not (root / foreign.file).exists()
    assert (root / "shards" / "notes.txt").exists()
    assert len(open_store(root, verify="full")) == 50


def test_resuming_with_a_lost_or_cut_shard_is_refused(tmp_path: Path, format: str) -> None:
    run, root = make_run(format), tmp_path / "s"
    write_store(root, run)
    shard = sorted((root / "shards").iterdir())[1]
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1])
    for call in (open_store, lambda path: Committer.open(path, run)):
        with pytest.raises(StoreError, match=f"{shard.name}: expected {len(raw)} bytes, found {len(raw) - 1}"):
            call(root)
    shard.unlink()
    for call in (open_store, lambda path: Committer.open(path, run)):
        with pytest.raises(StoreError, match=f"{shard.name}: expected {len(raw)} bytes, found no file"):
            call(root)


@both_kinds
def test_a_swapped_or_stale_shard_is_refused(tmp_path: Path, format: str, kind: str) -> None:
    """Bytes of another shard, or of an older run, under the right name and even with the right length."""
    (run, samples), root, older = make_samples(kind, format, samples=64), tmp_path / "s", tmp_path / "older"
    write_store(root, run, samples)
    write_store(older, dataclasses.replace(run, temperature=1.0), samples)
    one, two = sorted((root / "shards").iterdir())[:2]
    stale = next(path for path in (older / "shards").iterdir() if path.name.startswith("00000-"))
    whole = one.read_bytes()
    for wrong in (two.read_bytes(), stale.read_bytes()):
        one.write_bytes(wrong)
        problems = verify_store(root).problems
        assert len(problems) == 1
        assert one.name in problems[0]
        with pytest.raises(StoreError, match=one.name):
            open_store(root, verify="none").take([0])
    one.write_bytes(whole)
    assert verify_store(root).ok


def test_segments_are_sealed_and_the_tail_replaced(tmp_path: Path, format: str) -> None:
    run, root = make_run(format, samples=300, shard_rows=1), tmp_path / "s"
    samples = Samples.of(run)

    def write(numbers: Iterable[int]) -> list[ShardRecord]:
        return [write_shard(root, run, run.shard(number), *samples.rows(run.shard(number))) for number in numbers]

    with Committer.open(root, run) as committer:
        committer.commit(*write(range(100)))
        committer.commit(*write(range(100, 255)))
    with Committer.open(root, run) as committer:
        assert len(list((root / "segments").iterdir())) == 1
        committer.commit(*write(range(255, 290)))
        sealed = sorted((root / "segments").iterdir())[0]
        inode = sealed.stat().st_ino
        for number in reversed(range(290, 300)):
            committer.commit(*write([number]))
        committer.finish()
    assert sealed.stat().st_ino == inode
    assert [ref.shards for ref in open_store(root).manifest.segments] == [256, 44]
    assert len(list((root / "segments").iterdir())) == 2
    found = open_store(root, verify="full").take(range(300))
    assert found.keys == samples.keys


def test_a_reader_while_a_run_commits(tmp_path: Path, format: str) -> None:
    """It sees whole shards in order, never fewer than before, and all of them once the run closes or waits."""
    run, root = make_run(format, samples=20, shard_rows=1), tmp_path / "s"
    samples = Samples.of(run)

    def seen() -> int:
        half = open_store(root, allow_incomplete=True)
        assert half.take(range(len(half))).keys == samples.keys[: len(half)]
        return len(half)

    with Committer.open(root, run) as committer:
        before = 0
        for plan in committer.missing()[:18]:
            committer.commit(write_shard(root, run, plan, *samples.rows(plan)))
            assert plan.number not in [one.number for one in committer.missing()]
            assert before <= seen() <= plan.number + 1
            before = seen()
    assert seen() == 18
    with Committer.open(root, run) as committer:
        for plan in committer.missing():
            committer.commit(write_shard(root, run, plan, *samples.rows(plan)))
            time.sleep(1.1)  # records that come slower than that do not wait for another
        assert seen() >= 19
        committer.finish()
        assert seen() == 20


def test_records_that_wait_survive_an_exception(tmp_path: Path, format: str) -> None:
    run, root = make_run(format), tmp_path / "s"
    samples = Samples.of(run)

    def interrupted() -> None:
        with Committer.open(root, run) as committer:
            for plan in committer.missing()[:3]:
                committer.commit(write_shard(root, run, plan, *samples.rows(plan)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert open_store(root, allow_incomplete=True).manifest.totals.shards == 3


def test_pickle_reopens(tmp_path: Path, format: str) -> None:
    run = make_run(format)
    samples = write_store(tmp_path / "s", run)
    store = open_store(tmp_path / "s")
    store.take([3])
    again = pickle.loads(pickle.dumps(store))
    assert again.take([3, 40]).keys == [samples.keys[3], samples.keys[40]]


@both_kinds
def test_a_grown_dataset_keeps_its_shards(tmp_path: Path, format: str, kind: str) -> None:
    run, samples = make_samples(kind, format, samples=40, views=2)
    first = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, rows=25, fingerprint="a"))
    extents = (Extent(rows=25, fingerprint="a"),)
    grown = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, fingerprint="b", earlier=extents))
    assert grown.plan()[: first.shard_count] == first.plan()
    assert [(plan.view, plan.start, plan.stop) for plan in grown.plan()[first.shard_count :]] == [
        (0, 25, 40),
        (1, 25, 40),
    ]
    assert grown.fingerprint(0) == first.fingerprint()
    plan = grown.shard(4)
    with Committer.open(tmp_path / "s", grown) as committer:
        for plan in first.plan():
            committer.commit(write_shard(tmp_path / "s", first, plan, *samples.rows(plan)))
        assert [plan.number for plan in committer.missing()] == [4, 5]
        for plan in committer.missing():
            committer.commit(write_shard(tmp_path / "s", grown, plan, *samples.rows(plan)))
        committer.finish()
    store = open_store(tmp_path / "s", verify="full")
    for view in range(2):
        taken = store.take(store.lookup(samples.keys, view=view))
        expected = np.concatenate([np.reshape(one, (-1, run.num_classes)) for one in samples.logits[view]])
        np.testing.assert_array_equal(taken.columns["logits"], expected.astype(np.float16))


def test_rows_without_labels_or_content(tmp_path: Path, format: str) -> None:
    run = make_run(format, samples=10)
    samples = Samples.of(run)
    with Committer.open(tmp_path / "s", run) as committer:
        plan = committer.missing()[0]
        columns = {"logits": samples.logits[0].astype(np.float16)}
        committer.commit(write_shard(tmp_path / "s", run, plan, Rows(keys=samples.keys, columns=columns)))
        committer.finish()
    rows = open_store(tmp_path / "s", verify="full").take(range(10))
    assert (rows.labels == -100).all()
    assert (rows.content == 0).all()


def test_totals_of_fidelity_weigh_by_rows(tmp_path: Path, format: str) -> None:
    one = Fidelity(mean_t1=1.0, worst_t1=2.0, mean_t=3.0, worst_t=4.0)
    two = Fidelity(mean_t1=5.0, worst_t1=1.0, mean_t=7.0, worst_t=8.0)
    run, root = make_run(format, samples=20, shard_rows=15), tmp_path / "s"
    samples = Samples.of(run)
    with Committer.open(root, run) as committer:
        for plan, fidelity in zip(committer.missing(), (one, two), strict=True):
            committer.commit(write_shard(root, run, plan, *samples.rows(plan), fidelity=fidelity))
    totals = open_store(root, allow_incomplete=True).manifest.totals.fidelity
    assert totals == Fidelity(mean_t1=2.0, worst_t1=2.0, mean_t=4.0, worst_t=8.0)
