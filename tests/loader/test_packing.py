"""Packed lines: every document once, nothing too long, few lines, and a pure function of seed, epoch and lengths."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.errors import UsageError
from softlabel.loader.packing import Packing


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=300),
    st.integers(50, 80),
    st.integers(1, 100),
    st.booleans(),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_every_document_is_packed_once_and_fits(
    lengths: list[int], length: int, window: int, shuffle: bool, epoch: int
) -> None:
    packing = Packing(lengths=np.array(lengths), length=length, window=window, shuffle=shuffle)
    packed = packing.pack(epoch)
    assert sorted(packed.documents.tolist()) == list(range(len(lengths)))
    assert all(0 < sum(lengths[one] for one in packed.line(number)) <= length for number in range(len(packed)))
    again = Packing(lengths=np.array(lengths), length=length, window=window, shuffle=shuffle).pack(epoch)
    assert np.array_equal(again.documents, packed.documents)
    assert np.array_equal(again.edges, packed.edges)


def test_lines_are_nearly_full_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 5000)
    packing = Packing(lengths=lengths, length=512, seed=1)
    first, second = packing.pack(0), packing.pack(1)
    assert math.ceil(lengths.sum() / 512) <= len(first) <= 1.05 * lengths.sum() / 512
    assert {frozenset(first.line(number).tolist()) for number in range(len(first))} != {
        frozenset(second.line(number).tolist()) for number in range(len(second))
    }
    other = Packing(lengths=lengths, length=512, seed=2).pack(0)
    assert not np.array_equal(other.documents, first.documents)
    # Lines of long documents come no earlier than those of short ones.
    means = [lengths[first.line(number)].mean() for number in range(len(first))]
    half = len(means) // 2
    assert abs(np.mean(means[:half]) - np.mean(means[half:])) < 4 * np.std(means) / math.sqrt(half)


def test_a_document_alone_in_a_line() -> None:
    packed = Packing(lengths=np.array([3, 1, 2]), length=8, alone=True, shuffle=False).pack(5)
    assert [packed.line(number).tolist() for number in range(3)] == [[0], [1], [2]]


def test_a_document_longer_than_a_line_is_refused() -> None:
    with pytest.raises(UsageError, match="the longest document has 9 tokens, a line 8"):
        Packing(lengths=np.array([3, 9]), length=8)
