"""Stores that earlier versions of the format wrote stay readable."""

import json
from pathlib import Path

import numpy as np
import pytest

from softlabel.store.open import open_store
from tests.support import format_reader

FOLDERS = {version: Path(__file__).parent / f"stores-v{version}" for version in (1, 6)}
EXPECTED = {version: json.loads((folder / "expected.json").read_text()) for version, folder in FOLDERS.items()}


def test_every_encoding_has_one() -> None:
    kinds = ("float32", "float16", "int8", "topk", "sampled", "head-float16", "head-int8", "keep")
    assert sorted(EXPECTED[1]) == sorted(f"{kind}-{format}" for kind in kinds for format in ("parquet", "hdf5"))
    assert sorted(EXPECTED[6]) == sorted(f"{kind}-parquet" for kind in kinds)  # HDF5 shards have no version 6


@pytest.mark.parametrize(("version", "name"), [(version, name) for version in EXPECTED for name in EXPECTED[version]])
def test_golden_store(version: int, name: str) -> None:
    expected, root = EXPECTED[version][name], FOLDERS[version] / name
    logits = np.array([[float.fromhex(one) for one in row] for row in expected["scaled_logits"]], np.float32)
    store = open_store(root, verify="full")
    assert store.manifest.format_version == version
    assert store.bad == {"ordner 2/bild-2-ü.jpg": "truncated"}
    rows = store.take(store.lookup(expected["keys"][:5]).tolist() + store.lookup(expected["keys"][5:], view=1).tolist())
    assert rows.keys == expected["keys"]
    assert rows.views.tolist() == expected["views"]
    assert rows.labels.tolist() == expected["labels"]
    assert rows.content.tolist() == expected["content"]
    np.testing.assert_allclose(rows.scaled_logits.reshape(len(rows), -1), logits, rtol=1e-6, atol=1e-6)
    alone = format_reader.read_store(root)
    assert list(alone["key"]) == expected["keys"]
    for one, values in expected.get("of_views", {}).items():
        assert rows.columns[one].tolist() == values
        assert alone[one].tolist() == values
    np.testing.assert_allclose(alone["scaled_logits"].reshape(len(rows), -1), logits, rtol=1e-6, atol=1e-6)


FEATURES = Path(__file__).parent / "stores-v5"


@pytest.mark.parametrize("name", ["kept-parquet", "kept-hdf5", "alone-parquet", "alone-hdf5"])
def test_golden_store_of_features(name: str) -> None:
    expected = json.loads((FEATURES / "expected.json").read_text())[name]
    store = open_store(FEATURES / name, verify="full")
    rows = store.take(store.lookup(expected["keys"]))
    assert rows.labels.tolist() == expected["labels"]
    for feature in {"embedding", "attention"} & set(expected):
        numbers = [[float.fromhex(one) for one in row] for row in expected[feature]]
        assert getattr(rows, feature).reshape(len(rows), -1).tolist() == numbers


@pytest.mark.parametrize("version", [2, 3, 4])
def test_golden_store_of_views_sigmoids_and_tokens(version: int) -> None:
    root = Path(__file__).parent / f"stores-v{version}"
    store = open_store(root, verify="full")  # the values are those of the files, by their hashes
    assert (store.manifest.format_version, store.run.compression) == (version, "none")
    shards = [format_reader.read_shard(str(path)) for path in sorted((root / "shards").iterdir())]
    keys, views = (np.concatenate([row[name] for row, _ in shards]) for name in ("key", "view"))
    rows = store.take([int(store.lookup([key], view=int(view))[0]) for key, view in zip(keys, views, strict=True)])
    assert rows.labels.tolist() == np.concatenate([row["label"] for row, _ in shards]).tolist()
    assert rows.content.tolist() == np.concatenate([row["content"] for row, _ in shards]).tolist()
    for name, column in rows.columns.items():
        assert column.tolist() == np.concatenate([columns[name] for _, columns in shards]).tolist()
