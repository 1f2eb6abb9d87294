"""Stores that earlier code wrote, of the first version of the format and of that with features, stay readable."""

import json
from pathlib import Path

import numpy as np
import pytest

from softlabel.store.open import open_store
from tests.support import format_reader

FOLDER = Path(__file__).parent / "stores-v1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def test_every_encoding_has_one() -> None:
    kinds = ("float32", "float16", "int8", "topk", "sampled", "head-float16", "head-int8", "keep")
    assert sorted(EXPECTED) == sorted(f"{kind}-{format}" for kind in kinds for format in ("parquet", "hdf5"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden_store(name: str) -> None:
    expected = EXPECTED[name]
    logits = np.array([[float.fromhex(one) for one in row] for row in expected["scaled_logits"]], np.float32)
    store = open_store(FOLDER / name, verify="full")
    assert store.bad == {"ordner 2/bild-2-ü.jpg": "truncated"}
    rows = store.take(store.lookup(expected["keys"][:5]).tolist() + store.lookup(expected["keys"][5:], view=1).tolist())
    assert rows.keys == expected["keys"]
    assert rows.views.tolist() == expected["views"]
    assert rows.labels.tolist() == expected["labels"]
    assert rows.content.tolist() == expected["content"]
    np.testing.assert_allclose(rows.scaled_logits.reshape(len(rows), -1), logits, rtol=1e-6, atol=1e-6)
    alone = format_reader.read_store(FOLDER / name)
    assert list(alone["key"]) == expected["keys"]
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
