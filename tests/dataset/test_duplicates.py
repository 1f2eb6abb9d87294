"""Equal keys are found among more of them than are sorted at once."""

import numpy as np
import pytest
import xxhash

import softlabel
from softlabel.inputs.base import Sample

ROWS = 2_200_000


class Numbered(softlabel.Source):
    """Keys that are computed; those of `twins` are that of another sample."""

    kind, name, has_labels = "dataset", "numbered", False

    def __init__(self, twins: dict[int, int]) -> None:
        self.twins = twins

    def __len__(self) -> int:
        return ROWS

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        stop = ROWS if stop is None else min(stop, ROWS)
        keys = [f"{number}" for number in range(start, stop)]
        for one, other in self.twins.items():
            if start <= one < stop:
                keys[one - start] = f"{other}"
        return keys

    def labels(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise AssertionError("labels are not asked for")

    def read(self, indices: object) -> list[Sample]:
        raise AssertionError("images are not asked for")


def test_two_equal_keys_far_apart_are_named() -> None:
    with pytest.raises(softlabel.SoftLabelError, match=r"'17' \(samples 17 and 2100000\)"):
        Numbered({2_100_000: 17}).fingerprint()


def test_distinct_keys_have_the_fingerprint_of_their_text() -> None:
    text = b"".join(len(key).to_bytes(4, "little") + key for key in (b"%d" % n for n in range(ROWS)))
    assert Numbered({}).fingerprint() == xxhash.xxh3_128_hexdigest(text)
