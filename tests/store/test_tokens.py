"""Stores of tokens: a row is a document, whose answers are one for each labelled position.

L tokens and P labelled positions of several documents, C classes, M members.
"""

import dataclasses
import json
import re
import uuid
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from softlabel.cli.main import main
from softlabel.errors import StoreCorruptError
from softlabel.store.encodings import TopK
from softlabel.store.formats import base
from softlabel.store.formats.base import ShardIdentity
from softlabel.store.manifest import Combine, Member, Run
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.sample_rows import sample_rows
from softlabel.store.strict_json import from_json, to_json
from softlabel.store.token_rows import TokenRun
from softlabel.store.token_totals import count_tokens
from softlabel.store.verify import verify_store
from softlabel.store.view_columns import ViewPolicy
from softlabel.store.writer import Committer, write_shard
from tests.support import format_reader
from tests.support.documents import LONGEST, Documents, make_token_run
from tests.support.stores import FIDELITY, FORMATS, make_run, write_store

of_every_format = pytest.mark.parametrize("format", FORMATS)
RAGGED = {"logits": 2 * 300, "tokens": 2, "mask": 1}


def read_raw(root: Path) -> dict[str, np.ndarray]:
    """Every column of a store, with h5py or pyarrow alone; rows of Parquet as the bytes that they are."""
    parts: dict[str, list[bytes]] = {}
    for path in sorted((root / "shards").iterdir()):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            for name in table.column_names[4:]:
                parts.setdefault(name, []).append(b"".join(table[name].to_pylist()))
        else:
            with h5py.File(path) as file:
                for name in set(file) - {"key", "key_offsets", "view", "label", "content"}:
                    parts.setdefault(name, []).append(file[name][:].tobytes())
    return {name: np.frombuffer(b"".join(found), np.uint8) for name, found in parts.items()}


@of_every_format
@pytest.mark.parametrize("positions", ["all", "masked"])
@pytest.mark.parametrize("group_bytes", [8 << 20, 20_000])
def test_documents_are_read_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, positions: str, group_bytes: int
) -> None:
    monkeypatch.setattr(base, "GROUP_BYTES", group_bytes)
    run = make_token_run(format, positions=positions, views=2)
    shortest = 0 if positions == "masked" else 1  # documents without tokens or labelled positions
    documents = write_store(tmp_path / "s", run, Documents.of(run, shortest=shortest), bad=(0, 17, 49))
    good = [n for n in range(50) if n not in (0, 17, 49)]
    store = open_store(tmp_path / "s", verify="full")
    assert (run.format_version, len(store)) == (4 if format == "hdf5" else 6, 94)
    expected = [documents.join(view, good) for view in range(2)]
    whole = {name: np.concatenate([part[name] for part in expected]) for name in expected[0]}
    for name, raw in read_raw(tmp_path / "s").items():
        np.testing.assert_array_equal(raw, whole[name].reshape(-1).view(np.uint8), err_msg=name)

    streamed = list(store.stream())
    assert len(streamed) > (2 * 4 if group_bytes < 1 << 20 else 2)
    assert [key for part in streamed for key in part.keys] == [documents.keys[n] for n in good] * 2
    for name, array in whole.items():
        found = np.concatenate([part.columns[name] for part in streamed])
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype
    np.testing.assert_array_equal(np.concatenate([part.lengths for part in streamed]), whole["length"][:, 0])
    np.testing.assert_array_equal(np.concatenate([part.scaled_logits for part in streamed]), whole["logits"])

    rows = store.lookup([documents.keys[n] for n in (48, 3, 3, 1)], view=1)
    for memory in (512 << 20, 0):
        with open_store(tmp_path / "s", verify="none", memory=memory) as again:
            taken = again.take(rows)
            for name, array in documents.join(1, (48, 3, 3, 1)).items():
                np.testing.assert_array_equal(taken.columns[name], array, err_msg=name)
            assert taken.lengths.dtype == taken.positions.dtype == np.int64
            np.testing.assert_array_equal(taken.positions, documents.join(1, (48, 3, 3, 1))["positions"][:, 0])
            assert set(again.take(rows, ["tokens"]).columns) == {"tokens", "length"}
            empty = again.take([])
            assert (empty.scaled_logits.shape, len(empty.lengths)) == ((0, 300), 0)
    few = sample_rows(store, [2, 40, 90], ["key", "tokens", "logits"])
    by_take = store.take([2, 40, 90])
    assert few.keys == by_take.keys
    for name in ("tokens", "length", "positions", "logits"):
        np.testing.assert_array_equal(few.columns[name], by_take.columns[name])
    part = by_take.slice(1, 3)
    np.testing.assert_array_equal(part.columns["logits"], store.take([40, 90]).columns["logits"])
    assert part.keys == by_take.keys[1:]


@of_every_format
def test_read_by_the_format_document_alone(tmp_path: Path, format: str) -> None:
    run = make_token_run(format, classes=50)
    documents = write_store(tmp_path / "s", run, Documents.of(run), extra={})
    found = format_reader.read_store(tmp_path / "s")
    expected = documents.join(0, range(50))
    assert list(found["key"]) == documents.keys
    np.testing.assert_array_equal(found["scaled_logits"], expected["logits"].astype(np.float32))
    for name in ("length", "positions", "tokens", "mask"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert expected["tokens"].dtype == np.uint8
    hashes = [xxhash.xxh3_64_intdigest(ids.astype("<i4").tobytes()) for ids in documents.ids]
    np.testing.assert_array_equal(found["content"], np.array(hashes, np.uint64))
    assert (found["label"] == -100).all()


def test_members_are_kept_and_top_k_is_decoded_per_position(tmp_path: Path) -> None:
    run = make_token_run(
        "hdf5",
        samples=5,
        classes=9,
        encoding=TopK(k=3, temperatures=(2.0,)),
        members=(Member(spec="a", sha256="0" * 64), Member(spec="b", sha256="1" * 64)),
        combine=Combine(rule="keep", weights=(0.5, 0.5)),
        shard_rows=3,
    )
    documents = Documents.of(run)
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {"index": [[]], "value": [[]], "tail": [[]]}
    for ids in documents.ids:
        order = np.argsort(rng.random((len(ids), 2, 9)))[:, :, :3]
        values = -np.sort(rng.random((len(ids), 2, 3)))
        columns["index"][0].append(order.reshape(-1, 6).astype("|u1"))
        columns["value"][0].append((values - values[:, :, :1]).reshape(-1, 6).astype("<f2"))
        columns["tail"][0].append(rng.normal(size=(len(ids), 2)).astype("<f4"))
    documents = write_store(tmp_path / "s", run, dataclasses.replace(documents, columns=columns))
    rows = open_store(tmp_path / "s", verify="full").take([4, 0])
    found = rows.scaled_logits
    expected = documents.join(0, (4, 0))
    assert found.shape == (int(rows.positions.sum()), 2, 9)
    for position in range(len(found)):
        for member in range(2):
            dense = np.full(9, expected["tail"][position, member] - np.log(6))
            dense[expected["index"][position, 3 * member : 3 * member + 3]] = expected["value"][
                position, 3 * member : 3 * member + 3
            ]
            np.testing.assert_allclose(found[position, member], dense, rtol=1e-6)


def test_json_and_fingerprints_of_other_runs_do_not_change() -> None:
    """Field by field what the earlier versions wrote, and nothing of tokens."""
    run = make_run(compression="none")
    names = "format num_classes temperature encoding combine members dataset views shard_rows class_names"
    assert list(to_json(run)) == names.split()
    assert [set(to_json(column)) for column in run.columns] == [{"name", "dtype", "width"}]
    assert run.fingerprint() == "6e70dbb26c39d0eba8bef80660714f07"
    tokens = make_token_run()
    assert from_json(Run, json.loads(json.dumps(to_json(tokens)))) == tokens
    assert to_json(tokens)["tokens"] == {"tokenizer": "ab" * 32, "max_length": LONGEST, "bos": 1}
    pers = [to_json(column).get("per", "row") for column in tokens.columns]
    assert pers == ["position", "row", "row", "token", "token"]


def test_runs_that_make_no_sense_are_refused() -> None:
    crop = ViewPolicy(policy={"name": "crop-flip", "steps": [{"op": "crop-flip"}]})
    for change, words in (
        ({"input": "image"}, "expected input 'tokens'"),
        ({"tokens": None}, "needs the field 'tokens'"),
        ({"activation": "sigmoid"}, "softmax"),
        ({"views": crop}, "unchanged documents"),
        ({"tokens": TokenRun(tokenizer="ab" * 32, max_length=9, eos=300)}, "tokens.eos: expected an id below 300"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(make_token_run(), **change)
    for fields, words in (
        ({"tokenizer": "x"}, "64 hexadecimal digits"),
        ({"max_length": 0}, "at least 1"),
        ({"positions": "some"}, "'all' or 'masked'"),
    ):
        with pytest.raises(ValueError, match=words):
            TokenRun(**{"tokenizer": "ab" * 32, "max_length": 9, **fields})


def change_documents(documents: Documents, kind: str) -> Documents:
    """Documents of which the fourth, of the first shard, is wrong."""
    ids, masks, logits = [list(one) for one in (documents.ids, documents.masks, documents.logits[0])]
    match kind:
        case "class":
            ids[3] = np.where(np.arange(len(ids[3])) == 1, 60_000, ids[3])
        case "mask":
            masks[3] = masks[3] + 2
        case "longer":
            ids[3], masks[3] = np.zeros(99, "<i4"), np.ones(99, "u1")
        case "positions":
            logits[3] = np.concatenate([logits[3]] * 3)
        case "content":
            ids[3] = ids[3] + 1
        case "nan":
            logits[3] = np.full_like(logits[3], np.nan)
    return dataclasses.replace(documents, ids=ids, masks=masks, logits=[logits])


WRONG = {
    "class": r"row 3 of a block: token 1: `tokens` is not a class",
    "mask": r"row 3 of a block: token 0: `mask` is not 0 or 1",
    "longer": rf"row 3 of a block: `length` 99 is more than the run's {LONGEST}",
    "positions": r"row 3 of a block: `positions` is ",
}


@pytest.mark.parametrize("kind", sorted(WRONG))
@pytest.mark.parametrize("positions", ["all", "masked"])
def test_wrong_documents_are_not_written(tmp_path: Path, kind: str, positions: str) -> None:
    run = make_token_run(positions=positions)
    documents = Documents.of(run, shortest=9)
    if kind == "mask" or (kind == "longer" and positions == "masked"):
        documents = dataclasses.replace(documents, run=make_token_run())
    rows, _ = change_documents(documents, kind).rows(run.shard(0))
    with pytest.raises(ValueError, match=WRONG[kind]):
        write_shard(tmp_path / "s", run, run.shard(0), rows)


@of_every_format
@pytest.mark.parametrize("kind", [*sorted(WRONG), "content", "nan", "label"])
def test_verify_finds_wrong_documents_under_a_right_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, kind: str
) -> None:
    run, root = make_token_run(format), tmp_path / "s"
    documents = change_documents(Documents.of(run, shortest=9), kind)
    monkeypatch.setattr(base, "find_token_problem", lambda *_: None)  # a writer that checks nothing
    with Committer.open(root, run) as committer:
        for plan in committer.missing():
            rows, _ = documents.rows(plan)
            if kind == "label" and plan.number == 0:
                monkeypatch.setattr(base, "IGNORE", 5)
                rows = dataclasses.replace(rows, labels=np.full(16, 5))
            committer.commit(write_shard(root, run, plan, rows))
            monkeypatch.setattr(base, "IGNORE", -100)
        committer.finish()
    words = {
        "content": "row 3 of a block: `tokens` differ from its content hash",
        "nan": f"position {sum(len(ids) for ids in documents.ids[:3])} of a block: the maximum of `logits` is nan",
        "label": "a document has a hard label",
        **WRONG,
    }
    problems = verify_store(root).problems
    assert len(problems) == 1
    assert "00000-" in problems[0]
    assert re.search(words[kind], problems[0]), problems


def forge_sizes(path: Path, folder: Path) -> bytes:
    """A shard whose third document has a token more, the fourth one less, than `length` says; or one more in all."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        values = table["tokens"].to_pylist()
        values[2], values[3] = values[2] + values[3][:2], values[3][2:]
        place = table.column_names.index("tokens")
        field = pa.field("tokens", pa.binary(), nullable=False)
        table = table.set_column(place, field, pa.array(values, pa.binary()))
        schema = pa.schema([pa.field(one.name, one.type, one.name in ("label", "content")) for one in table.schema])
        with pq.ParquetWriter(
            folder / "forged", schema, compression="none", use_dictionary=False, store_schema=False
        ) as writer:
            writer.write_table(pa.table(table.columns, schema=schema))
            writer.add_key_value_metadata({"softlabel": pq.read_metadata(path).metadata[b"softlabel"].decode()})
    else:
        with h5py.File(path) as source, h5py.File(folder / "forged", "w") as target:
            target.attrs["softlabel"] = source.attrs["softlabel"]
            for name, dataset in source.items():
                more = [dataset[:], dataset[:1]] if name == "tokens" else [dataset[:]]
                target.create_dataset(name, data=np.concatenate(more))
    return (folder / "forged").read_bytes()


@of_every_format
def test_sizes_that_contradict_each_other_are_damage(tmp_path: Path, format: str) -> None:
    run, root = make_token_run(format), tmp_path / "s"
    write_store(root, run, Documents.of(run, shortest=2))
    first = sorted((root / "shards").iterdir())[0]
    first.write_bytes(forge_sizes(first, tmp_path))
    with (
        open_store(root, verify="none") as store,
        pytest.raises(StoreCorruptError, match=r"tokens.*(bytes expected|expected <u2)"),
    ):
        list(store.stream(["tokens"]))


def test_an_identity_without_counts_is_refused() -> None:
    run = make_token_run()
    columns = tuple(column for column in run.columns if column.name != "length")
    identity = ShardIdentity(run="x", number=0, view=0, start=0, stop=0, rows=0, columns=columns)
    with pytest.raises(StoreCorruptError, match="without their length"):
        ShardIdentity.decode(identity.encode(), "here")


def test_hdf5_is_mapped_and_blocks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_token_run("hdf5", shard_rows=50)
    write_store(tmp_path / "s", run, Documents.of(run))
    monkeypatch.setattr(base, "GROUP_BYTES", 50_000)
    with open_store(tmp_path / "s") as store:
        parts = list(store.stream(["logits"]))
        assert not any(part.columns["logits"].flags.owndata for part in parts)
        sizes = [part.columns["logits"].nbytes + 3 * int(part.positions.sum()) + 8 * len(part) for part in parts]
        assert max(sizes) <= 50_000 < sum(sizes[:2])


def test_fidelity_and_totals_count_documents(tmp_path: Path) -> None:
    run = make_token_run()
    write_store(tmp_path / "s", run, Documents.of(run), bad=(3,))
    totals = open_store(tmp_path / "s").manifest.totals
    assert (totals.rows, totals.bad, totals.fidelity.worst_t) == (49, 1, FIDELITY.worst_t)


def test_the_tokenizer_is_part_of_the_store(tmp_path: Path) -> None:
    run, root = make_token_run(), tmp_path / "s"
    content = json.dumps({"model": {"vocab": {"é": 0}}}, ensure_ascii=False).encode()
    with Committer.open(root, run) as committer:
        committer.add_extra("tokenizer", b"{}", "json")
        committer.add_extra("tokenizer", content, "json")
    write_store(root, run, Documents.of(run))
    (file,) = (root / "extra").iterdir()
    assert file.name == f"tokenizer-{xxhash.xxh3_128_hexdigest(content)}.json"
    store = open_store(root, verify="full")
    assert store.tokenizer == file.read_bytes() == content
    assert store.extra is None
    file.write_bytes(content.replace(b"0", b"1"))
    with pytest.raises(StoreCorruptError, match=r"tokenizer-.*xxh3 expected"):
        _ = open_store(root, verify="sizes").tokenizer
    report = verify_store(root)
    assert report.extra
    assert not report.damaged
    assert write_and_open(tmp_path / "without").tokenizer is None


def write_and_open(root: Path) -> Store:
    run = make_token_run()
    write_store(root, run, Documents.of(run))
    return open_store(root)


@of_every_format
def test_inspect_shows_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    run, root = make_token_run(format, positions="masked"), tmp_path / "s"
    documents = write_store(root, run, Documents.of(run), bad=(3,))
    assert main(["inspect", str(root)]) == 0
    printed = capsys.readouterr().out
    good = [n for n in range(50) if n != 3]
    tokens = sum(len(documents.ids[n]) for n in good)
    size = sum(path.stat().st_size for path in (root / "shards").iterdir())
    for line in (
        "rows       49 of 50 documents x 1 view(s), 4 shards",
        f"tokens     {tokens:,}, {sum(int(documents.masks[n].sum()) for n in good):,} positions labelled (masked)",
        f"           {tokens / 49:.1f} tokens a document, at most 23; {size / tokens:,.1f} bytes a token",
        f"tokenizer  sha256 {'ab' * 32}, bos 1, its tokenizer.json is not in the store",
        "encoding   float16, 600 bytes a labelled position",
    ):
        assert line in printed.splitlines()
    assert main(["inspect", "--json", str(root)]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["tokens"]["positions"] == "masked"


def test_documents_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTLABEL_CACHE", str(tmp_path / "cache"))
    run, url = make_token_run("hdf5"), f"memory://tokens-{uuid.uuid4().hex}"
    documents = write_store(url, run, Documents.of(run))
    for memory in (1 << 20, 100):
        with open_store(url, verify="full", memory=memory) as store:
            found = store.take([30, 2])
            for name, array in documents.join(0, [30, 2]).items():
                np.testing.assert_array_equal(found.columns[name], array, err_msg=name)
            totals = count_tokens(store)
            assert not totals.exact
            assert 0.3 < totals.tokens / sum(map(len, documents.ids)) < 3
