"""Keys find their rows whatever the data looks like beside the one that was labelled, held against a dictionary."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.store.open import open_store
from softlabel.store.reader import Store
from tests.support.stores import make_run, write_store

SAMPLES, VIEWS, BAD = 300, 2, (0, 17, 18, 120, 299)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[str], list[dict[str, int]]]:
    path = tmp_path_factory.mktemp("lookup") / "store"
    samples = write_store(path, make_run(samples=SAMPLES, views=VIEWS), bad=BAD)
    good = [key for index, key in enumerate(samples.keys) if index not in BAD]
    return (
        open_store(path),
        samples.keys,
        [{key: v * len(good) + n for n, key in enumerate(good)} for v in range(VIEWS)],
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_lookup_is_a_dictionary(stored: tuple[Store, list[str], list[dict[str, int]]], data: st.DataObject) -> None:
    store, keys, rows = stored
    asked = list(keys)
    for _ in range(data.draw(st.integers(0, 3))):
        place, other = data.draw(st.integers(0, len(asked) - 1)), data.draw(st.integers(0, len(asked) - 1))
        match data.draw(st.sampled_from(["swap", "drop", "repeat", "rename", "cut", "grow", "as labelled"])):
            case "swap":
                asked[place], asked[other] = asked[other], asked[place]
            case "drop":
                del asked[place]
            case "repeat":
                asked.insert(place, asked[other])
            case "rename":
                asked[place] += "x"
            case "cut":
                asked = asked[: max(1, place)]
            case "grow":
                asked += [f"new {number}" for number in range(other)]
            case "as labelled":
                asked = [key for key in asked if key in rows[0]] or asked
    view = data.draw(st.integers(0, VIEWS - 1))
    if data.draw(st.booleans()):
        store.close()  # drops the index
    found = store.lookup(asked, view=view, missing="mask")
    assert found.dtype == np.int64
    assert found.tolist() == [rows[view].get(key, -1) for key in asked]
