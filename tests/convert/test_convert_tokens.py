"""Stores of tokens out of stores of tokens: every command keeps documents, their answers and the tokenizer.

P labelled positions of several documents, C classes, M members.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash

from softlabel.common.hashing import Hasher
from softlabel.common.keys import Keys
from softlabel.convert import combine_store, convert_store, export_store, merge_stores
from softlabel.convert.merge_folds import merge_folds
from softlabel.errors import MismatchError
from softlabel.labels.encodings import encode
from softlabel.maintain.repair import repair
from softlabel.store.encodings import Encoding, Float32, Sampled, TopK
from softlabel.store.manifest import Combine, Member, Run
from softlabel.store.open import open_store
from softlabel.store.stored_rows import StoredRows
from softlabel.store.token_rows import TokenRun
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer
from tests.support.documents import LONGEST, Documents, make_token_run
from tests.support.language_models import write_tokenizer
from tests.support.stores import write_store

TOKENIZER = json.dumps({"model": {"vocab": {"a": 0}}}).encode()
BAD = (3, 20)
T = 2.0


def write_tokens(
    root: Path,
    run: Run,
    documents: Documents | None = None,
    bad: tuple[int, ...] = BAD,
    tokenizer: bytes = TOKENIZER,
) -> Documents:
    """A store of float32 answers, with a tokenizer."""
    documents = documents or Documents.of(run)
    if documents.columns is None:
        width = run.num_classes * run.members_stored
        answers = [[one.reshape(-1, width) for one in view] for view in documents.logits]
        documents = dataclasses.replace(documents, columns={"logits": answers})
    with Committer.open(root, run) as committer:
        committer.add_extra("tokenizer", tokenizer, "json")
    write_store(root, run, documents, bad=bad)
    return documents


def read_whole(root: Path) -> StoredRows:
    assert verify_store(root).ok
    with open_store(root) as store:
        assert store.tokenizer == TOKENIZER
        return store.take(range(len(store)))


def assert_equal(found: StoredRows, expected: StoredRows) -> None:
    assert found.keys == expected.keys
    np.testing.assert_array_equal(found.content, expected.content)
    assert found.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        np.testing.assert_array_equal(found.columns[name], column, err_msg=name)


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_format_and_shard_size_change_no_bit(tmp_path: Path, positions: str) -> None:
    run = make_token_run("parquet", encoding=Float32(), positions=positions, views=2)
    write_tokens(tmp_path / "one", run)
    convert_store(tmp_path / "one", tmp_path / "two", format="hdf5", shard_rows=7)
    convert_store(tmp_path / "two", tmp_path / "three", format="parquet", shard_rows=16)
    expected = read_whole(tmp_path / "one")
    for name in ("two", "three"):
        assert_equal(read_whole(tmp_path / name), expected)


@pytest.mark.parametrize("positions", ["all", "masked"])
@pytest.mark.parametrize("encoding", [TopK(k=5, temperatures=(T,)), Sampled(samples=6, draw="systematic")])
def test_an_encoding_is_that_of_each_position_by_itself(tmp_path: Path, encoding: Encoding, positions: str) -> None:
    run = make_token_run("hdf5", encoding=Float32(), classes=40, positions=positions)
    documents = write_tokens(tmp_path / "one", run)
    for name, shard_rows in (("two", 16), ("three", 50)):
        convert_store(tmp_path / "one", tmp_path / name, encoding=encoding, shard_rows=shard_rows)
    found = read_whole(tmp_path / "two")
    assert_equal(read_whole(tmp_path / "three"), found)

    good = [n for n in range(50) if n not in BAD]
    seeds = []
    for number in good:
        places = np.arange(len(documents.ids[number]))
        if positions == "masked":
            places = np.flatnonzero(documents.masks[number])
        base = hash_key(documents.keys[number])
        seeds += [base + (int(place) << 16) for place in places]
    logits = torch.from_numpy(np.concatenate([documents.logits[0][n] for n in good]))
    wrapped = torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in seeds], dtype=torch.int64)
    expected = encode(logits, encoding, temperature=T, seeds_R=wrapped)
    for name, column in expected.items():
        np.testing.assert_array_equal(found.columns[name], column.numpy(), err_msg=name)


def hash_key(key: str) -> int:
    return int(Hasher(0)(Keys.of([key]), 0).view(np.int64)[0])


def test_merge_and_repair_from_the_sources(tmp_path: Path) -> None:
    run = make_token_run("hdf5", encoding=Float32())
    documents = write_tokens(tmp_path / "one", run)
    others = dataclasses.replace(Documents.of(run, seed=1), keys=[f"other-{n}" for n in range(50)])
    write_tokens(tmp_path / "two", run, others, bad=())
    merge_stores([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    found = read_whole(tmp_path / "both")
    one, two = read_whole(tmp_path / "one"), read_whole(tmp_path / "two")
    assert found.keys == one.keys + two.keys
    for name in one.columns:
        np.testing.assert_array_equal(found.columns[name], np.concatenate([one.columns[name], two.columns[name]]))
    assert documents.keys[0] in found.keys

    shards = sorted((tmp_path / "both" / "shards").iterdir())
    shards[1].write_bytes(shards[1].read_bytes()[:-9])
    (extra,) = (tmp_path / "both" / "extra").iterdir()
    extra.unlink()
    repair(tmp_path / "both")
    assert_equal(read_whole(tmp_path / "both"), found)

    assert run.tokens is not None
    other = dataclasses.replace(run, tokens=TokenRun(tokenizer="cd" * 32, max_length=LONGEST, bos=1))
    write_tokens(tmp_path / "strange", other, dataclasses.replace(others, keys=[f"x{n}" for n in range(50)]))
    with pytest.raises(MismatchError, match=r"tokenizer \(sha256 of its vocabulary\): it has abab.*the other cdcd"):
        merge_stores([tmp_path / "one", tmp_path / "strange"], tmp_path / "wrong")
    for name, one, added in (("plain", run, []), ("more", other, ["<more>"])):
        folder = write_tokenizer(tmp_path / f"{name}-tokenizer", added=added)
        write_tokens(tmp_path / name, one, others, tokenizer=(folder / "tokenizer.json").read_bytes())
    with pytest.raises(MismatchError, match=r"expected one vocabulary, found .*: id 263 is no token and '<more>'"):
        merge_stores([tmp_path / "plain", tmp_path / "more"], tmp_path / "wrong")


def test_members_are_combined_at_each_position(tmp_path: Path) -> None:
    members = tuple(Member(spec=f"lm:{name}", sha256=name * 64, num_classes=30) for name in "ab")
    combine = Combine(rule="keep", weights=(0.5, 0.5))
    run = make_token_run("hdf5", encoding=Float32(), classes=30, members=members, combine=combine)
    documents = Documents.of(run)
    rng = np.random.default_rng(5)
    logits_PMC = [rng.normal(0, 3, (len(ids), 2, 30)).astype(np.float32) for ids in documents.ids]
    answers = [[(one - one.max(axis=2, keepdims=True)).reshape(-1, 60) for one in logits_PMC]]
    write_tokens(tmp_path / "kept", run, dataclasses.replace(documents, columns={"logits": answers}), bad=())
    combine_store(tmp_path / "kept", tmp_path / "mean", combine="logits", weights=[3, 1])
    found = read_whole(tmp_path / "mean").scaled_logits
    mean = np.concatenate([(3 * one[:, 0].astype(np.float64) + one[:, 1]) / 4 for one in logits_PMC])
    np.testing.assert_allclose(found, mean - mean.max(axis=1, keepdims=True), atol=2e-5)
    combine_store(tmp_path / "mean", tmp_path / "warmer", temperature=2 * T)
    np.testing.assert_allclose(read_whole(tmp_path / "warmer").scaled_logits, found / 2, atol=1e-6)


@pytest.mark.parametrize("encoding", [Float32(), TopK(k=5, temperatures=(T,)), Sampled(samples=4, draw="systematic")])
def test_export_is_read_by_others(tmp_path: Path, encoding: Encoding) -> None:
    run = make_token_run("hdf5", encoding=Float32(), classes=20)
    documents = write_tokens(tmp_path / "exact", run)
    store = tmp_path / "exact"
    if encoding != Float32():
        store = tmp_path / "store"
        convert_store(tmp_path / "exact", store, encoding=encoding)
    export_store(store, tmp_path / "hf", to="hf")
    export_store(store, tmp_path / "flat.npz", to="npz")
    rows = read_whole(store)
    table = pq.read_table(tmp_path / "hf" / "data").to_pydict()
    flat: Any = np.load(tmp_path / "flat.npz")
    assert table["key"] == rows.keys == flat["key"].tolist()
    good = [n for n in range(50) if n not in BAD]
    for name in ("tokens", "mask"):
        of = documents.ids if name == "tokens" else documents.masks
        assert table[name] == [of[n].tolist() for n in good]
        np.testing.assert_array_equal(flat[name], rows.columns[name][:, 0])
    for name in ("length", "positions"):
        assert table[name] == flat[name].tolist() == rows.columns[name][:, 0].tolist()
    answers = {"scaled_logits": rows.scaled_logits}
    if encoding != Float32():
        answers = {column.name: rows.columns[column.name] for column in run_of(store).label_columns}
    for name, array in answers.items():
        np.testing.assert_allclose(flat[name], array, rtol=1e-6)
        used = rows.columns["weight"] > 0 if encoding.drawn else np.ones_like(array, bool)  # others are left out
        lists = [line[mask].astype(float).tolist() for line, mask in zip(array, used, strict=True)]
        assert [line for document in table[name] for line in document] == lists
        assert [len(document) for document in table[name]] == rows.positions.tolist()
    about = json.loads(pq.read_schema(next((tmp_path / "hf" / "data").iterdir())).metadata[b"softlabel"])
    assert about["tokens"]["max_length"] == LONGEST


def test_exported_row_groups_are_cut_by_what_they_hold(tmp_path: Path) -> None:
    """Not by the vocabulary, of which few tokens are kept."""
    run = make_token_run(classes=60_000, samples=12, encoding=TopK(k=3, temperatures=(T,)))
    few = Documents.of(make_token_run(classes=4, samples=12))
    kept = [[np.tile(np.array([[0, -1, -2]], "<f2"), (len(one), 1)) for one in view] for view in few.logits]
    columns = {
        "index": [[np.tile(np.array([[7, 5, 59_999]], "<u2"), (len(one), 1)) for one in view] for view in kept],
        "value": kept,
        "tail": [[np.zeros((len(one), 1), "<f4") for one in view] for view in kept],
    }
    ids = [one + 50_000 for one in few.ids]
    content = np.array([xxhash.xxh3_64_intdigest(one.astype("<i4").tobytes()) for one in ids], np.uint64)
    write_store(tmp_path / "store", run, dataclasses.replace(few, run=run, columns=columns, ids=ids, content=content))
    export_store(tmp_path / "store", tmp_path / "hf", to="hf")
    (file,) = (tmp_path / "hf" / "data").iterdir()
    assert pq.ParquetFile(file).num_row_groups == 1


def run_of(root: Path) -> Run:
    with open_store(root) as store:
        return store.run


def test_folds_are_put_into_the_order_of_the_data(tmp_path: Path) -> None:
    run = make_token_run("parquet", encoding=Float32())
    documents = Documents.of(run)
    folds = np.arange(50) % 3 % 2
    for fold in (0, 1):
        picks = np.flatnonzero(folds == fold)
        part = dataclasses.replace(
            documents,
            keys=[documents.keys[n] for n in picks],
            ids=[documents.ids[n] for n in picks],
            masks=[documents.masks[n] for n in picks],
            content=documents.content[picks],
            logits=[[documents.logits[0][n] for n in picks]],
        )
        fewer = dataclasses.replace(run.dataset, rows=len(picks), fingerprint=f"{fold}")
        write_tokens(tmp_path / f"{fold}", dataclasses.replace(run, dataset=fewer), part, bad=())
    digest = xxhash.xxh3_128()
    for key in documents.keys:
        digest.update(len(key.encode()).to_bytes(4, "little") + key.encode())
    dataset = dataclasses.replace(run.dataset, fingerprint=digest.hexdigest())
    sources = [tmp_path / "0", tmp_path / "1"]
    merge_folds(sources, tmp_path / "out", folds_N=folds, dataset=dataset, spec="crossfit:2:lm:x", recorded={})
    whole = dataclasses.replace(documents, columns={"logits": documents.logits})
    found = read_whole(tmp_path / "out")
    assert found.keys == documents.keys
    for name, column in whole.join(0, range(50)).items():
        np.testing.assert_array_equal(found.columns[name], column, err_msg=name)
