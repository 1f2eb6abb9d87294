"""Stores out of stores: against what the teachers would have written, against float64, and against other programs.

Legend: V views, N samples, M members, C classes, B rows.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash

from softlabel.cli.main import main
from softlabel.convert import combine_store, convert_store, export_store, merge_stores
from softlabel.errors import MismatchError, StoreCorruptError, StoreError, UsageError
from softlabel.generation.generate import generate
from softlabel.labels.encodings import encode
from softlabel.labels.fidelity import FidelityMeter
from softlabel.store.encodings import Encoding, Float16, Float32, Head, Int8, Sampled, TopK
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import BadRow, Combine, DatasetInfo, Extent, Member, Run
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer, write_shard
from tests.support.commands import make_environment
from tests.support.datasets import write_dataset
from tests.support.stores import Samples, make_run, read_files, write_head_store, write_store
from tests.support.teachers import write_teacher

T = 4.0
F32 = Float32()
TOPK = TopK(k=4, temperatures=(1.0, T))
SAMPLED = Sampled(samples=6, draw="systematic")
BAD = (3, 20)

Array = np.ndarray[Any, Any]


def members(count: int, classes: int) -> tuple[Member, ...]:
    return tuple(Member(spec=f"zoo:net{m}", sha256=f"{m:064x}", num_classes=classes) for m in range(1, count + 1))


def kept_run(encoding: Encoding = F32, *, count: int = 3, rule: str = "keep", **changes: Any) -> Run:
    classes = changes.pop("classes", 11)
    combine = Combine(rule=rule, weights=(1 / count,) * count)
    return make_run(classes=classes, members=members(count, classes), encoding=encoding, combine=combine, **changes)


def teach(run: Run, seed: int = 0) -> Array:
    """Raw logits of what a row stores: float32 (V, N, M, C), one class of one row masked."""
    shape = (run.views.count, run.dataset.rows, run.members_stored, run.num_classes)
    logits = np.random.default_rng(seed).normal(0, 4, shape).astype(np.float32)
    logits[:, 1, :, 2] = -np.inf
    return logits


def names(run: Run, prefix: str = "é") -> list[str]:
    return [f"{prefix}/{index:04d}.jpg" for index in range(run.dataset.rows)]


def label(index: int) -> int:
    return -100 if index % 5 == 0 else index % 7


def store_of(root: Path, run: Run, logits: Array, *, bad: tuple[int, ...] = (), prefix: str = "é") -> Path:
    """Write a store of these logits as an engine would, measured."""
    scaled = torch.from_numpy(logits) / run.temperature
    scaled = scaled - scaled.amax(dim=-1, keepdim=True)
    keys = names(run, prefix)
    with Committer.open(root, run, {"data": f"{root.name}.parquet"}) as committer:
        for plan in committer.missing():
            good = [index for index in range(plan.start, plan.stop) if index not in bad]
            flat = scaled[plan.view, good].reshape(-1, run.num_classes)
            columns = encode(flat, run.encoding, temperature=run.temperature, seeds_R=torch.arange(len(flat)) * 7919)
            meter = FidelityMeter(temperature=run.temperature, encoding=run.encoding)
            meter.add(flat, columns)
            rows = Rows(
                keys=[keys[index] for index in good],
                labels=np.array([label(index) for index in good], np.int64),
                content=np.array([index + 1 for index in good], np.uint64),
                columns={name: column.reshape(len(good), -1).numpy() for name, column in columns.items()},
            )
            wrong = [BadRow(index=i, key=keys[i], reason="cut") for i in bad if plan.start <= i < plan.stop]
            committer.commit(write_shard(root, run, plan, rows, wrong, fidelity=meter.result()))
        committer.finish()
    return root


def whole(root: Path) -> Store:
    report = verify_store(root)
    assert report.ok, report.problems
    return open_store(root)


def softmax(scaled: Array) -> Array:
    scaled = np.asarray(scaled, np.float64)
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    result: Array = powers / powers.sum(axis=-1, keepdims=True)
    return result


def reference_mix(logits_BMC: Array, weights: list[float], rule: str, temperature: float) -> Array:
    """Probabilities of a mix at `temperature`, in float64 and by the definition."""
    shares = np.array(weights, np.float64) / sum(weights)
    if rule == "probs":
        return np.einsum("m,bmc->bc", shares, softmax(logits_BMC.astype(np.float64) / temperature))
    return softmax(np.einsum("m,bmc->bc", shares, logits_BMC.astype(np.float64)) / temperature)


def good_rows(run: Run, bad: tuple[int, ...] = BAD) -> tuple[Array, Array]:
    """(view, sample) of every row, in the store's order."""
    good = [index for index in range(run.dataset.rows) if index not in bad]
    views = np.repeat(np.arange(run.views.count), len(good))
    return views, np.tile(good, run.views.count)


# combine


@pytest.mark.parametrize("rule", ["logits", "probs"])
@pytest.mark.parametrize(
    ("encoding", "tolerance"),
    [(F32, 1e-6), (Float16(), 3e-3), (Int8(), 3e-2)],
    ids=lambda v: str(v)[15:30],
)
def test_combine_is_the_mix_of_the_members(tmp_path: Path, encoding: Encoding, tolerance: float, rule: Any) -> None:
    run = kept_run(encoding, views=2, format="hdf5")
    logits = teach(run)
    kept = store_of(tmp_path / "kept", run, logits, bad=BAD)
    weights = [0.5, 3.0]
    done = combine_store(kept, tmp_path / "mix", members=[3, "zoo:net1"], weights=weights, combine=rule, temperature=2)
    store = whole(tmp_path / "mix")
    assert done.total_rows == len(store) == 2 * (run.dataset.rows - len(BAD))
    views, index = good_rows(run)
    rows = store.take(np.arange(len(store)))
    assert rows.keys == [names(run)[i] for i in index]
    assert rows.views.tolist() == views.tolist()
    assert rows.labels.tolist() == [label(i) for i in index]
    assert rows.content.tolist() == (index + 1).tolist()
    assert store.bad == {names(run)[i]: "cut" for i in BAD}
    expected = reference_mix(logits[views, index][:, [2, 0]], weights, rule, 2.0)
    np.testing.assert_allclose(softmax(rows.scaled_logits), expected, atol=tolerance)
    assert [member.spec for member in store.run.members] == ["zoo:net3", "zoo:net1"]
    assert (store.run.combine.rule, store.run.temperature) == (rule, 2.0)
    assert sum(store.run.combine.weights) == pytest.approx(1)


def test_a_member_without_weight_does_not_touch_masked_classes(tmp_path: Path) -> None:
    run = kept_run()
    logits = teach(run)
    kept = store_of(tmp_path / "kept", run, logits)
    combine_store(kept, tmp_path / "mix", weights=[0, 1, 0])
    found = open_store(tmp_path / "mix").take(np.arange(50)).scaled_logits
    np.testing.assert_allclose(softmax(found), softmax(logits[0, :, 1] / T), atol=1e-6)
    assert np.isneginf(found[1, 2])


def test_combine_writes_what_generate_would_have_written(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "train.parquet", 20)
    teachers = [write_teacher(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2, 3)]
    common: dict[str, Any] = {"shard_rows": 8, "batch_size": 8, "encoding": "float32", "progress": False}
    generate(data, teachers=teachers, out=tmp_path / "kept", combine="keep", temperature=4.0, **common)
    for rule in ("logits", "probs"):
        chosen, weights = [teachers[2], teachers[0]], [1.0, 3.0]
        direct, mixed = tmp_path / f"direct-{rule}", tmp_path / f"mixed-{rule}"
        generate(data, teachers=chosen, out=direct, combine=rule, weights=weights, temperature=2.0, **common)
        combine_store(tmp_path / "kept", mixed, members=[3, 1], weights=weights, combine=rule, temperature=2.0)  # type: ignore[arg-type]
        one, other = open_store(direct), whole(mixed)
        assert one.run.differences(other.run) == []
        assert one.keys.to_list() == other.keys.to_list()
        assert one.labels.tolist() == other.labels.tolist()
        assert one.content.tolist() == other.content.tolist()
        rows = np.arange(len(one))
        np.testing.assert_allclose(one.take(rows).scaled_logits, other.take(rows).scaled_logits, atol=2e-5)
        assert other.manifest.recorded["teachers"] == one.manifest.recorded["teachers"]


def test_combine_measures_from_float32_and_says_unknown_otherwise(tmp_path: Path) -> None:
    exact = store_of(tmp_path / "exact", kept_run(), teach(kept_run()))
    combine_store(exact, tmp_path / "from-exact", combine="probs")
    cost = open_store(tmp_path / "from-exact").manifest.totals.fidelity
    assert cost is not None
    assert cost.worst_t < 1e-9
    lossy = store_of(tmp_path / "lossy", kept_run(Float16()), teach(kept_run()))
    done = combine_store(lossy, tmp_path / "from-lossy", combine="probs")
    manifest = open_store(tmp_path / "from-lossy").manifest
    assert manifest.totals.fidelity is None
    made = manifest.recorded["derived"]
    assert made["command"] == "combine"
    assert made["sources"][0]["encoding"] == {"name": "float16"}
    assert made["sources"][0]["fidelity"]["worst_t"] > 0
    assert done.step is not None
    assert 0 < made["step"]["mean_t"] == done.step.mean_t < 1e-6
    # A finer encoding cannot bring back what is lost: still unknown, and the way is recorded.
    convert_store(tmp_path / "from-lossy", tmp_path / "finer", encoding="float32")
    convert_store(tmp_path / "finer", tmp_path / "again", encoding="float16")
    manifest = open_store(tmp_path / "again").manifest
    assert manifest.totals.fidelity is None
    assert manifest.recorded["derived"]["sources"][0]["derived"]["sources"][0]["derived"]["command"] == "combine"


@pytest.mark.parametrize("encoding", [F32, Float16(), Int8()], ids=lambda e: e.name)
def test_logits_change_their_temperature(tmp_path: Path, encoding: Encoding) -> None:
    run = kept_run(encoding, rule="logits")
    logits = teach(run)
    combine_store(store_of(tmp_path / "a", run, logits), tmp_path / "b", temperature=1.5)
    found = whole(tmp_path / "b")
    assert found.run == dataclasses.replace(run, temperature=1.5)
    expected = softmax(logits[0, :, 0] / 1.5)
    tolerance = 1e-6 if encoding == F32 else 3e-2
    np.testing.assert_allclose(softmax(found.take(np.arange(50)).scaled_logits), expected, atol=tolerance)


def test_top_k_changes_its_temperature_where_its_tail_is_known(tmp_path: Path) -> None:
    run = kept_run(TOPK, rule="logits")
    logits = teach(run)
    source = store_of(tmp_path / "a", run, logits)
    combine_store(source, tmp_path / "b", temperature=1.0)
    rows = whole(tmp_path / "b").take(np.arange(50))
    truth = softmax(logits[0, :, 0])
    top = np.argsort(-truth, axis=1)[:, :4]
    found = softmax(rows.scaled_logits)
    # Kept classes and the mass of the tail are exact.
    np.testing.assert_allclose(np.take_along_axis(found, top, 1), np.take_along_axis(truth, top, 1), atol=3e-3)
    assert rows.columns["tail"].shape == (50, 2)
    with pytest.raises(MismatchError, match="at temperatures 1, 4, found 2"):
        combine_store(source, tmp_path / "c", temperature=2.0)
    kept = store_of(tmp_path / "kept", kept_run(TOPK), teach(kept_run()))
    combine_store(kept, tmp_path / "d", temperature=1.0, combine="probs", weights=[2, 1, 1])
    mixed = whole(tmp_path / "d")
    assert mixed.run.encoding == TopK(k=4, temperatures=(1.0,))
    with pytest.raises(MismatchError, match="at temperatures 1, 4, found 2"):
        combine_store(kept, tmp_path / "e", temperature=2.0)


def test_a_head_is_exact_at_every_temperature_and_in_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "head", make_run(classes=11, encoding=Head(width=6, hidden="float16"))
    logits = write_head_store(source, run, Samples.of(run, keys=names(run)))
    combine_store(source, tmp_path / "warm", temperature=9.0)
    convert_store(tmp_path / "warm", tmp_path / "hdf5", format="hdf5", shard_rows=7)
    convert_store(tmp_path / "hdf5", tmp_path / "dense", encoding="float32")
    for name in ("warm", "hdf5", "dense"):
        found = whole(tmp_path / name).take(np.arange(50)).scaled_logits
        np.testing.assert_allclose(softmax(found), softmax(logits / 9.0), atol=1e-6)
    with pytest.raises(MismatchError, match="encoding 'head' stores the input"):
        convert_store(tmp_path / "dense", tmp_path / "x", encoding=Head(width=6, hidden="float16"))
    with pytest.raises(
        MismatchError, match=r"encoding 'head' cannot be re-encoded with another type.*generate with it"
    ):
        convert_store(source, tmp_path / "x", encoding=Head(width=6, hidden="int8"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), str(tmp_path / "x"), "--encoding", "head", "--hidden", "int8"])
    assert ended.value.code == 2
    assert "a store of head neither: 'softlabel generate' alone writes it)" in capsys.readouterr().err


def test_combine_refuses_what_is_not_exact(tmp_path: Path) -> None:
    probs = store_of(tmp_path / "probs", kept_run(rule="probs"), teach(kept_run(rule="probs")))
    logits = store_of(tmp_path / "logits", kept_run(rule="logits"), teach(kept_run(rule="logits")))
    draws = store_of(tmp_path / "draws", kept_run(SAMPLED, rule="logits"), teach(kept_run(rule="logits")))
    drawn = store_of(tmp_path / "drawn", kept_run(SAMPLED), teach(kept_run()))
    kept = store_of(tmp_path / "kept", kept_run(), teach(kept_run()))
    out = tmp_path / "out"
    for error, message, source, options in [
        (MismatchError, "mean of 3 teachers' probabilities at temperature 4", probs, {"temperature": 2}),
        (MismatchError, "keeps its members, found 3 combined", logits, {"weights": [1, 1, 1]}),
        (
            MismatchError,
            "combine: expected 'logits', by which its members were combined",
            logits,
            {"combine": "probs", "temperature": 2},
        ),
        (UsageError, "nothing to do", logits, {}),
        (MismatchError, "random draws from the softmax", draws, {"temperature": 2}),
        (MismatchError, "random draws of each member", drawn, {}),
        (UsageError, "one for each of the 2 teachers, found 3", kept, {"weights": [1, 1, 1], "members": [1, 2]}),
        (UsageError, "expected one of .* found 'zoo:other'", kept, {"members": ["zoo:other"]}),
        (UsageError, "3 zoo:net3 in .*, found 4", kept, {"members": [4]}),
        (UsageError, "each once", kept, {"members": [1, "1"]}),
        (UsageError, "temperature: expected a number above 0", kept, {"temperature": 0}),
        (UsageError, "combine: expected .*found 'keep'", kept, {"combine": "keep"}),
    ]:
        with pytest.raises(error, match=message):
            combine_store(source, out, **options)  # type: ignore[arg-type]
        assert not out.exists()
    before = read_files(kept)
    with pytest.raises(UsageError, match="found the store itself"):
        combine_store(kept, kept / ".." / "kept")
    assert read_files(kept) == before


# merge


@pytest.mark.parametrize("format", ["parquet", "hdf5"])
def test_merge_changes_no_bit_of_a_row(tmp_path: Path, format: str) -> None:
    sizes, runs, logits = (50, 21, 1), [], []
    for number, size in enumerate(sizes):
        run = kept_run(Int8(), samples=size, views=2, format=format)
        if number == 0:  # one of them has grown
            run = dataclasses.replace(
                run, dataset=dataclasses.replace(run.dataset, earlier=(Extent(rows=19, fingerprint="0" * 32),))
            )
        runs.append(run)
        logits.append(np.random.default_rng(number).normal(0, 4, (2, size, 3, 11)).astype(np.float32))
        store_of(tmp_path / str(number), run, logits[-1], bad=BAD if size > 20 else (), prefix=str(number))
    done = merge_stores([tmp_path / str(number) for number in range(3)], tmp_path / "all")
    store = whole(tmp_path / "all")
    assert done.total_rows == 2 * (72 - 4)
    assert list(store.bad) == [f"{number}/{index:04d}.jpg" for number in (0, 1) for index in BAD]
    assert [row.index for record in store.shards for row in record.bad] == 2 * [3, 20, 53, 70]
    ordered = [key for number, run in enumerate(runs) for key in names(run, str(number))]
    digest = xxhash.xxh3_128()
    for key in ordered:
        digest.update(len(key.encode()).to_bytes(4, "little") + key.encode())
    assert store.run.dataset == DatasetInfo(kind="parquet", rows=72, fingerprint=digest.hexdigest())
    for number, run in enumerate(runs):
        part = open_store(tmp_path / str(number))
        good = [key for key in names(run, str(number)) if key not in part.bad]
        for view in (0, 1):
            one, other = part.take(part.lookup(good, view)), store.take(store.lookup(good, view))
            assert one.keys == other.keys
            assert one.labels.tolist() == other.labels.tolist()
            assert one.content.tolist() == other.content.tolist()
            for name, array in one.columns.items():
                assert array.tobytes() == other.columns[name].tobytes()
    # The rows are the same, so is their cost.
    costs = [(open_store(tmp_path / str(number)).manifest.totals) for number in range(3)]
    found = store.manifest.totals.fidelity
    assert found is not None
    mean = sum(c.rows * c.fidelity.mean_t for c in costs if c.fidelity) / sum(c.rows for c in costs)
    assert found.mean_t == pytest.approx(mean)
    assert found.worst_t == max(c.fidelity.worst_t for c in costs if c.fidelity)
    before = read_files(tmp_path / "all")
    again = merge_stores([tmp_path / str(number) for number in range(3)], tmp_path / "all")
    assert again.shards_written == 0
    assert read_files(tmp_path / "all") == before


def test_merge_is_what_one_source_of_both_gives(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "t.safetensors")
    folder = tmp_path / "both"
    folder.mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        table = pq.read_table(write_dataset(tmp_path / f"{name}.parquet", 13, seed=seed))
        paths = [f"{name}-{number}.jpg" for number in range(13)]
        images = [
            {"bytes": row["bytes"], "path": path} for row, path in zip(table["image"].to_pylist(), paths, strict=True)
        ]
        table = table.set_column(0, table.schema.field(0), [images])
        for path in (tmp_path / f"{name}.parquet", folder / f"{name}.parquet"):
            pq.write_table(table, path)
    common: dict[str, Any] = {"teachers": [teacher], "shard_rows": 8, "batch_size": 8, "progress": False}
    for name in ("a", "b"):
        generate(tmp_path / f"{name}.parquet", out=tmp_path / name, **common)
    merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    # The same identity: generating over both finds nothing left to do.
    assert generate(folder, out=tmp_path / "merged", **common).shards_written == 0


def test_merge_refuses_shared_keys_and_other_runs_by_name(tmp_path: Path) -> None:
    run = make_run(samples=20)
    left, right = Samples.of(run), Samples.of(run, seed=1, keys=[f"r{index}" for index in range(20)])
    write_store(tmp_path / "a", run, left, bad=[4])
    write_store(tmp_path / "b", run, right, bad=[5])
    for name, key in (("shares", left.keys[7]), ("bad", left.keys[4])):
        keys = [f"s{index}" for index in range(19)] + [key]
        write_store(tmp_path / name, run, Samples.of(run, keys=keys))
        for pair in ((tmp_path / "a", tmp_path / name), (tmp_path / name, tmp_path / "a")):
            with pytest.raises(MismatchError, match=f"found keys in both, the first: '{key}'"):
                merge_stores(pair, tmp_path / "out")
    other = dataclasses.replace(run, temperature=2.0, shard_rows=10)
    write_store(tmp_path / "other", other, right)
    with pytest.raises(
        MismatchError, match=r"rows per shard .*: it has 16, the other 10; temperature: it has 4.0, the other 2.0"
    ):
        merge_stores([tmp_path / "a", tmp_path / "other"], tmp_path / "out")
    with pytest.raises(UsageError, match="two stores or more"):
        merge_stores([tmp_path / "a"], tmp_path / "out")
    with pytest.raises(UsageError, match="found the store itself"):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "b")
    assert not (tmp_path / "out").exists()


# convert


@pytest.mark.parametrize("encoding", [F32, Float16(), Int8(), TOPK, SAMPLED], ids=lambda e: e.name)
def test_convert_of_the_format_changes_no_bit(tmp_path: Path, encoding: Encoding) -> None:
    run = kept_run(encoding, views=2)
    source = store_of(tmp_path / "a", run, teach(run), bad=BAD)
    convert_store(source, tmp_path / "b", format="hdf5", shard_rows=7)
    convert_store(tmp_path / "b", tmp_path / "c", format="parquet", shard_rows=1000)
    first = open_store(source)
    rows = first.take(np.arange(len(first)))
    for name in ("b", "c"):
        store = whole(tmp_path / name)
        found = store.take(np.arange(len(store)))
        assert found.keys == rows.keys
        assert found.views.tolist() == rows.views.tolist()
        assert found.labels.tolist() == rows.labels.tolist()
        for column, array in rows.columns.items():
            assert array.tobytes() == found.columns[column].tobytes()
        one, other = first.manifest.totals.fidelity, store.manifest.totals.fidelity
        assert one is not None
        assert other is not None
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(other))
        assert store.bad == first.bad
    assert {record.rows for record in open_store(tmp_path / "c").shards} == {48}


@pytest.mark.parametrize("encoding", [Float16(), Int8(), TOPK, SAMPLED], ids=lambda e: e.name)
def test_convert_from_float32_is_what_the_teacher_would_have_given(tmp_path: Path, encoding: Encoding) -> None:
    run = kept_run(count=1, rule="logits")
    logits = teach(run)
    source = store_of(tmp_path / "a", run, logits)
    convert_store(source, tmp_path / "b", encoding=encoding)
    convert_store(source, tmp_path / "c", encoding=encoding, shard_rows=9, format="hdf5")
    one, other = whole(tmp_path / "b"), whole(tmp_path / "c")
    rows = one.take(np.arange(50))
    for name, array in rows.columns.items():  # also draws follow from the key, not from the shard
        assert array.tobytes() == other.take(np.arange(50)).columns[name].tobytes()
    cost = one.manifest.totals.fidelity
    assert cost is not None
    p, q = softmax(logits[0, :, 0] / T), softmax(rows.scaled_logits)
    p, q = (q, p) if encoding == SAMPLED else (p, q)
    with np.errstate(divide="ignore", invalid="ignore"):
        nats = np.where(p > 0, p * np.log(p / q), 0).sum(axis=1)
    assert cost.mean_t == pytest.approx(nats.mean(), rel=1e-3, abs=2e-7)
    assert cost.worst_t == pytest.approx(nats.max(), rel=1e-3, abs=2e-7)


def test_stores_behind_urls(tmp_path: Path) -> None:
    run = kept_run()
    source = store_of(tmp_path / "a", run, teach(run))
    there = f"memory://{tmp_path.name}/mix"
    combine_store(source, there, combine="probs")
    convert_store(there, tmp_path / "back", format="hdf5")
    combine_store(source, tmp_path / "direct", combine="probs")
    one, other = open_store(tmp_path / "direct"), whole(tmp_path / "back")
    rows = np.arange(len(one))
    assert one.take(rows).scaled_logits.tobytes() == other.take(rows).scaled_logits.tobytes()
    with pytest.raises(UsageError, match="found the store itself"):
        convert_store(there, f"{there}/", format="hdf5")


def test_convert_refuses(tmp_path: Path) -> None:
    source = store_of(tmp_path / "a", kept_run(rule="probs"), teach(kept_run(rule="probs")))
    draws = store_of(tmp_path / "draws", kept_run(SAMPLED), teach(kept_run()))
    top = store_of(tmp_path / "top", kept_run(TOPK), teach(kept_run()))
    lacking, three = TopK(k=3, temperatures=(1.0,)), TopK(k=3, temperatures=(1.0, T))
    out = tmp_path / "out"
    for error, message, store, options in [
        (UsageError, "has this format, encoding and shard size already", source, {"format": "parquet"}),
        (UsageError, "its temperatures .* lack 4.0", source, {"encoding": lacking}),
        (MismatchError, "exists at one temperature.*expected only 4, found 1", source, {"encoding": three}),
        (MismatchError, "only the sum of its tail is known", top, {"encoding": three}),
        (MismatchError, "random draws", draws, {"encoding": "float16"}),
        (UsageError, "found 'fp16'", source, {"encoding": "fp16"}),
        (UsageError, "'topk' needs", source, {"encoding": "topk"}),
        (UsageError, "shard_rows", source, {"shard_rows": 0}),
        (UsageError, "parquet or hdf5, found 'csv'", source, {"format": "csv"}),
    ]:
        with pytest.raises(error, match=message):
            convert_store(store, out, **options)  # type: ignore[arg-type]
        assert not out.exists()


def test_a_damaged_store_is_not_converted(tmp_path: Path) -> None:
    source = store_of(tmp_path / "a", kept_run(), teach(kept_run()))
    shard = source / open_store(source).shards[1].file
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(StoreCorruptError, match=shard.name):
        convert_store(source, tmp_path / "b", format="hdf5")
    with pytest.raises(StoreCorruptError, match=shard.name):
        export_store(source, tmp_path / "c", to="hf")


def test_a_folder_with_other_rows_is_refused(tmp_path: Path) -> None:
    exact = store_of(tmp_path / "exact", kept_run(), teach(kept_run()))
    half = store_of(tmp_path / "half", kept_run(Float16()), teach(kept_run()))
    convert_store(half, tmp_path / "out", encoding="int8")
    # The same run, but these rows came through float16.
    with pytest.raises(MismatchError, match="found one made by 'softlabel convert' from other stores"):
        convert_store(exact, tmp_path / "out", encoding="int8")
    with pytest.raises(MismatchError, match="found one made by a teacher"):
        convert_store(half, exact, encoding="float32")
    with pytest.raises(MismatchError, match=r"store of another run; .*encoding"):
        convert_store(half, tmp_path / "out", encoding="float32")


KILLED = """
import os, sys, threading, time
from pathlib import Path
from softlabel.convert import convert_store
source, out = sys.argv[1:]
def kill():
    while len(list(Path(out, "shards").glob("0*"))) < 3:
        time.sleep(0.001)
    os._exit(9)
threading.Thread(target=kill, daemon=True).start()
convert_store(source, out, encoding="float16", shard_rows=1)
"""


def test_a_killed_command_resumes(tmp_path: Path) -> None:
    run = kept_run(samples=60)
    source = store_of(tmp_path / "a", run, teach(run))
    out = tmp_path / "b"
    done = subprocess.run([sys.executable, "-c", KILLED, source, out], env=make_environment(), check=False)
    assert done.returncode == 9
    first = sorted(path.name for path in (out / "shards").glob("0*"))
    assert 3 <= len(first) < 60
    summary = convert_store(source, out, encoding="float16", shard_rows=1)
    assert summary.shards_written == 60 - len(first)
    assert set(first) <= {path.name for path in (out / "shards").iterdir()}
    convert_store(source, tmp_path / "c", encoding="float16", shard_rows=1)
    assert read_files(out / "shards") == read_files(tmp_path / "c" / "shards")
    whole(out)


# export


def exported(tmp_path: Path, encoding: Encoding = F32, rule: str = "logits") -> tuple[Store, Path]:
    run = kept_run(encoding, rule=rule, views=2)
    source = store_of(tmp_path / "a", run, teach(run), bad=BAD)
    export_store(source, tmp_path / "hf", to="hf")
    return open_store(source), tmp_path / "hf"


def check_columns(columns: dict[str, list[Any]], store: Store) -> None:
    rows = store.take(np.arange(len(store)))
    assert columns["key"] == rows.keys
    assert columns["view"] == rows.views.tolist()
    labels = [None if value is None or value != value else int(value) for value in columns["label"]]
    assert labels == [None if value == -100 else value for value in rows.labels.tolist()]
    assert (
        np.array([list(row) for row in columns["scaled_logits"]], np.float32).tobytes() == rows.scaled_logits.tobytes()
    )


def test_export_is_read_by_pyarrow_and_says_what_it_is(tmp_path: Path) -> None:
    store, folder = exported(tmp_path)
    files = sorted((folder / "data").iterdir())
    assert [path.name for path in files[:2]] == ["train-00000-of-00008.parquet", "train-00001-of-00008.parquet"]
    table = pq.read_table(folder / "data")
    check_columns(table.to_pydict(), store)
    about = json.loads(table.schema.metadata[b"softlabel"])
    assert (about["temperature"], about["combine"]["rule"], about["num_classes"]) == (T, "logits", 11)
    before = read_files(folder)
    assert export_store(tmp_path / "a", folder, to="hf").files_written == 0
    assert read_files(folder) == before
    # What a kill leaves: some files, and no word of completeness.
    files[2].unlink()
    note = folder / "_softlabel-export.json"
    said = json.loads(note.read_text())
    note.write_text(json.dumps({**said, "complete": False}))
    with pytest.raises(StoreError, match="checksum"):
        export_store(tmp_path / "a", folder, to="hf")
    # An earlier version wrote no checksum, under another name.
    note.unlink()
    del said["checksum"]
    (folder / "softlabel-export.json").write_text(json.dumps({**said, "complete": False}))
    assert export_store(tmp_path / "a", folder, to="hf").files_written == 1
    assert read_files(folder) == before


def test_export_is_read_by_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    store, folder = exported(tmp_path)
    check_columns({name: column.tolist() for name, column in pandas.read_parquet(folder).items()}, store)


def test_export_is_read_by_polars(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    store, folder = exported(tmp_path)
    frame = polars.read_parquet(folder / "data" / "*.parquet")
    assert frame.schema["scaled_logits"] == polars.List(polars.Float32)
    check_columns(frame.to_dict(as_series=False), store)


def test_export_is_read_by_duckdb(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    store, folder = exported(tmp_path)
    query = f"select * from read_parquet('{folder}/data/*.parquet') order by view, key"
    with duckdb.connect() as connection:
        found = connection.execute(query)
        listed = [column[0] for column in found.description]
        check_columns(dict(zip(listed, (list(c) for c in zip(*found.fetchall(), strict=True)), strict=True)), store)


def test_export_is_read_by_hugging_face_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    store, folder = exported(tmp_path)
    found = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    check_columns({name: found[:][name] for name in found.column_names}, store)


@pytest.mark.parametrize("encoding", [TOPK, SAMPLED, Float16()], ids=lambda e: e.name)
def test_export_of_members_and_sparse_encodings(tmp_path: Path, encoding: Encoding) -> None:
    store, folder = exported(tmp_path, encoding, rule="keep")
    table = pq.read_table(folder / "data").to_pydict()
    export_store(store.path, tmp_path / "all.npz", to="npz")
    rows = store.take(np.arange(len(store)))
    with np.load(tmp_path / "all.npz", allow_pickle=False) as arrays:
        assert arrays["key"].tolist() == rows.keys
        assert arrays["label"].tolist() == rows.labels.tolist()
        assert arrays["view"].tolist() == rows.views.tolist()
        assert json.loads(str(arrays["softlabel"]))["store_id"] == store.manifest.store_id
        if encoding == Float16():
            assert arrays["scaled_logits"].tobytes() == rows.scaled_logits.tobytes()
            wanted = {"scaled_logits": rows.scaled_logits}
        else:
            wanted = {name: array.reshape(len(rows), 3, -1) for name, array in rows.columns.items()}
            for name, array in wanted.items():
                np.testing.assert_array_equal(arrays[name], array)
    for name, array in wanted.items():
        for member in range(3):
            listed = table[f"{name}_{member + 1}"]
            if encoding == SAMPLED:
                used = wanted["weight"][:, member] > 0
                assert listed == [row[mask].tolist() for row, mask in zip(array[:, member], used, strict=True)]
            else:
                assert np.array(listed, array.dtype).tobytes() == array[:, member].tobytes()
    before = (tmp_path / "all.npz").read_bytes()
    assert export_store(store.path, tmp_path / "all.npz", to="npz").files_written == 0
    assert (tmp_path / "all.npz").read_bytes() == before


def test_export_refuses_what_is_there(tmp_path: Path) -> None:
    run = kept_run()
    source = store_of(tmp_path / "a", run, teach(run))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "x.npz").write_bytes(b"mine")
    other = store_of(tmp_path / "b", run, teach(run))
    export_store(other, tmp_path / "hf", to="hf")
    for error, message, out, to in [
        (MismatchError, "found something else", "full", "hf"),
        (MismatchError, "found something else", "full/notes.txt", "hf"),
        (MismatchError, "expected an export of store .*found another", "hf", "hf"),
        (MismatchError, "found another; choose another name", "x.npz", "npz"),
        (UsageError, "ends in .npz", "plain", "npz"),
        (UsageError, "expected --to hf, npz", "plain", "csv"),
        (UsageError, "found the store itself", "a", "hf"),
        (UsageError, "a local path", "memory://x", "hf"),
    ]:
        with pytest.raises(error, match=message):
            export_store(source, out if "://" in out else tmp_path / out, to=to)  # type: ignore[arg-type]
    assert read_files(tmp_path / "full") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("classes", [1, 300])
def test_one_row_and_none(tmp_path: Path, classes: int) -> None:
    for size, bad in ((1, ()), (1, (0,))):
        folder = tmp_path / f"{size}-{len(bad)}"
        run = make_run(samples=size, classes=classes)
        write_store(folder / "a", run, bad=bad)
        convert_store(folder / "a", folder / "b", encoding="int8", format="hdf5")
        assert len(whole(folder / "b")) == size - len(bad)
        for to, out in (("hf", "hf"), ("npz", "x.npz")):
            assert export_store(folder / "b", folder / out, to=to).total_rows == size - len(bad)  # type: ignore[arg-type]
        assert pq.read_table(folder / "hf" / "data").num_rows == size - len(bad)
        with np.load(folder / "x.npz") as arrays:
            assert arrays["scaled_logits"].shape == (size - len(bad), classes)


# The command line.


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = kept_run(Float16())
    kept = str(store_of(tmp_path / "kept", run, teach(run), bad=BAD))
    more = str(store_of(tmp_path / "more", run, teach(run, seed=1), prefix="more"))
    mixed, both, small, plain = (str(tmp_path / name) for name in ("mixed", "both", "small", "plain"))
    mix = ["combine", kept, mixed, "--members", "1", "zoo:net3", "--weights", "1", "3", "--combine", "probs"]
    assert main([*mix, "--temperature", "2"]) == 0
    assert "complete, 48 rows" in capsys.readouterr().out
    assert main([*mix, "--temperature", "2"]) == 0
    assert "already complete, 48 rows; nothing to do" in capsys.readouterr().out
    assert main(["merge", kept, more, "--out", both]) == 0
    assert "complete, 98 rows" in capsys.readouterr().out
    assert main(["convert", mixed, small, "--encoding", "topk", "--top-k", "3", "--format", "hdf5"]) == 0
    cost = r"cost of the new encoding: KL in nats at T = 1: mean [\d.e+-]+, worst [\d.e+-]+; at the store's T: mean"
    assert re.search(cost, capsys.readouterr().out)
    assert open_store(small).run.encoding == TopK(k=3, temperatures=(2.0,))
    assert main(["export", small, plain, "--to", "hf"]) == 0
    assert main(["export", small, plain, "--to", "hf"]) == 0
    assert "already exported, 48 rows" in capsys.readouterr().out
    assert main(["inspect", small]) == 0
    output = capsys.readouterr().out
    assert f"softlabel convert from {mixed}" in output
    assert "against the teacher unknown: the labels came through float16" in output
    assert main(["convert", mixed, str(tmp_path / "fine"), "--encoding", "float32"]) == 0
    assert main(["convert", str(tmp_path / "fine"), str(tmp_path / "last"), "--encoding", "int8"]) == 0
    assert main(["inspect", str(tmp_path / "last")]) == 0
    assert "the labels came through float16, float32" in capsys.readouterr().out
    assert main(["combine", small, str(tmp_path / "x"), "--weights", "1", "1"]) == 2
    assert "expected a store that keeps its members" in capsys.readouterr().err
