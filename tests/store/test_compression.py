"""What a row has beside its labels is compressed in Parquet; stores of earlier versions go on as they are."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

import softlabel
from softlabel.cli.main import main
from softlabel.convert import convert_store, merge_stores
from softlabel.errors import MismatchError, StoreCorruptError, UsageError
from softlabel.store.formats.base import Rows
from softlabel.store.formats.parquet import ParquetShard
from softlabel.store.manifest import Run
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer, write_shard
from softlabel.views.policy import view_policy
from tests.support.commands import run_softlabel
from tests.support.datasets import make_jpeg, write_parquet
from tests.support.stores import Samples, make_run, write_store
from tests.support.teachers import write_teacher

PACKED = {"key", "view", "label", "view_box", "view_flip"}


def read_codecs(root: Path) -> dict[str, set[str]]:
    """The codecs of each column over all shards, as pyarrow names them."""
    found: dict[str, set[str]] = {}
    for path in (root / "shards").iterdir():
        metadata = pq.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            for position in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(position)
                found.setdefault(chunk.path_in_schema, set()).add(chunk.compression)
    return found


def list_rows(store: Store) -> list[tuple[object, ...]]:
    rows = store.take(range(len(store)))
    arrays = [rows.views, rows.labels, rows.content, *rows.columns.values()]
    return [(key, *(array[row].tobytes() for array in arrays)) for row, key in enumerate(rows.keys)]


def copy_plainly(store: Store, out: Path, shards: int | None = None) -> Run:
    """Write the first shards of a store, or all, as versions before 6 did."""
    run = replace(store.run, compression="none")
    rows = store.take(range(len(store)))
    with Committer.open(out, run, store.manifest.recorded) as committer:
        first = 0
        for plan in committer.missing()[:shards]:
            part = slice(first, first + plan.stop - plan.start)
            first = part.stop
            columns = {name: array[part] for name, array in rows.columns.items()}
            kept = Rows(keys=rows.keys[part], labels=rows.labels[part], content=rows.content[part], columns=columns)
            fidelity = store.shards[plan.number].fidelity
            committer.commit(write_shard(out, run, plan, kept, fidelity=fidelity))
        if shards is None:
            committer.finish()
    return run


def test_a_store_of_before_goes_on_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_parquet(tmp_path / "d.parquet", [make_jpeg(number) for number in range(30)], labels=[0, 1, 2] * 10)
    teacher = write_teacher(tmp_path / "t.safetensors")

    def generate(out: Path, views: int = 2, **options: Any) -> Store:
        options |= {"augment": "crop-flip", "views": views, "shard_rows": 20, "progress": False}
        softlabel.generate(data, teachers=[teacher], out=out, **options)
        return open_store(out, verify="full")

    new = generate(tmp_path / "new")
    assert new.manifest.format_version == 6
    assert read_codecs(tmp_path / "new") == {
        name: {"ZSTD"} if name in PACKED else {"UNCOMPRESSED"}
        for name in ("key", "view", "label", "content", "logits", "view_box", "view_flip", "view_xxh3")
    }
    copy_plainly(new, tmp_path / "old", shards=1)
    copy_plainly(new, tmp_path / "whole")
    old = generate(tmp_path / "old")
    assert old.manifest.format_version == 2
    assert set.union(*read_codecs(tmp_path / "old").values()) == {"UNCOMPRESSED"}
    for name, compression in (("new", "zstd"), ("old", None)):
        capsys.readouterr()
        assert main(["inspect", "--json", str(tmp_path / name)]) == 0
        assert json.loads(capsys.readouterr().out)["run"].get("compression") == compression
    assert list_rows(old) == list_rows(new) == list_rows(open_store(tmp_path / "whole", verify="full"))
    # A lost shard is labelled again with the same bytes, and growth adds shards of the same kind.
    lost = next((tmp_path / "old" / "shards").iterdir())
    before = lost.read_bytes()
    lost.unlink()
    run_softlabel("repair", tmp_path / "old")
    assert lost.read_bytes() == before
    grown = generate(tmp_path / "old", views=3, grow=True)
    assert (grown.manifest.format_version, len(grown)) == (2, 90)
    assert set.union(*read_codecs(tmp_path / "old").values()) == {"UNCOMPRESSED"}


def test_derived_stores_are_compressed_whatever_they_are_made_of(tmp_path: Path) -> None:
    run = replace(make_run(samples=40), views=view_policy("crop-flip", count=1, seed=0))
    for name, seed in (("one", 1), ("two", 2)):
        samples = Samples.of(run, seed, keys=[f"{name}/{number}" for number in range(40)])
        rng = np.random.default_rng(seed)
        columns: dict[str, np.ndarray[Any, Any]] = {
            "logits": samples.logits.astype(np.float16),
            "view_box": np.tile(rng.integers(-4, 30, (1, 40, 4)), 1).astype(np.int32) + 8,
            "view_flip": rng.integers(0, 2, (1, 40, 1)).astype(np.uint8),
            "view_xxh3": rng.integers(1, 2**64, (1, 40, 1), dtype=np.uint64),
        }
        write_store(tmp_path / name, run, replace(samples, columns=columns))
    copy_plainly(open_store(tmp_path / "one"), tmp_path / "old")
    convert_store(tmp_path / "old", tmp_path / "small", progress=False)
    merge_stores([tmp_path / "old", tmp_path / "two"], tmp_path / "merged", progress=False)
    for name in ("small", "merged"):
        assert verify_store(tmp_path / name).ok
        assert open_store(tmp_path / name).manifest.format_version == 6
    assert list_rows(open_store(tmp_path / "small")) == list_rows(open_store(tmp_path / "old"))
    with pytest.raises(UsageError, match="has this format, encoding and shard size already"):
        convert_store(tmp_path / "small", tmp_path / "again", progress=False)
    with pytest.raises(MismatchError, match="compression of keys and views: the store has none, this run zstd"):
        Committer.open(tmp_path / "old", run)


def forge(good: bytes, table: pa.Table, **changes: object) -> bytes:
    """A shard with the identity of a good one, its changes, and other rows, the keys under zstd."""
    metadata = pq.ParquetFile(io.BytesIO(good)).metadata.metadata
    identity = {**json.loads(metadata[b"softlabel"]), **changes}
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression={"key": "zstd"}, use_dictionary=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"softlabel": json.dumps(identity)})
    return sink.getvalue()


def encode_varint(value: int) -> bytes:
    value, raw = 2 * value, b""
    while value >= 128:
        value, raw = value >> 7, raw + bytes([value & 127 | 128])
    return raw + bytes([value])


def test_compressed_keys_are_refused_in_earlier_versions_and_where_they_fill_the_memory(tmp_path: Path) -> None:
    write_store(tmp_path / "s", make_run(samples=16))
    good = next((tmp_path / "s" / "shards").iterdir()).read_bytes()
    table = pq.read_table(io.BytesIO(good))
    keys = pa.array(["a" * (70 << 20), *table["key"].to_pylist()[1:]])
    bomb = forge(good, table.set_column(0, table.schema.field("key"), keys))
    size = pq.ParquetFile(io.BytesIO(bomb)).metadata.row_group(0).column(0).total_uncompressed_size
    assert len(bomb) < 1 << 20 < 64 << 20 < size
    footer = bomb.rindex(encode_varint(size))
    lying = bomb[:footer] + encode_varint(63 << 20) + bomb[footer + 4 :]
    for raw, words in (
        (forge(good, table), None),
        (forge(good, table, format_version=1), "codec 6 .* format version 1 does not allow"),
        (bomb, "'key' claims more bytes than it can have"),
        (lying, "'key' has pages of more than 67108864 bytes"),
    ):
        path = tmp_path / f"{xxhash.xxh3_128_hexdigest(raw)}.parquet"
        path.write_bytes(raw)
        if words is None:
            found = ParquetShard(path).read(["key"], 0, 16).keys
            assert found is not None
            assert found.to_list() == table["key"].to_pylist()
            continue
        with pytest.raises(StoreCorruptError, match=words):
            ParquetShard(path).read(["key"], 0, 16)


def test_a_page_header_with_text_in_place_of_a_number_is_damage(tmp_path: Path) -> None:
    write_store(tmp_path / "s", make_run(samples=16))
    raw = bytearray(next((tmp_path / "s" / "shards").iterdir()).read_bytes())
    chunk = pq.ParquetFile(io.BytesIO(raw)).metadata.row_group(0).column(1)
    assert (chunk.path_in_schema, chunk.compression) == ("view", "ZSTD")
    first = chunk.data_page_offset
    assert raw[first : first + 3] == b"\x15\x00\x15"
    raw[first + 3 : first + 8] = b"\x06\x18\x01x\x00"  # the stored size is the text x
    path = tmp_path / "damaged.parquet"
    path.write_bytes(raw)
    with pytest.raises(StoreCorruptError, match="not readable as Parquet"):
        ParquetShard(path).read(["view"], 0, 16)
