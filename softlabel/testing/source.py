"""What every source of samples must do, as tests that the tests of a source inherit.

    class TestZipSource(SourceTests):
        @pytest.fixture
        def expected(self):
            return [ExpectedSample(key="cat/1.png", label=0, pixels=..., encoded=...), ...]  # or text=...

        @pytest.fixture
        def make_source(self, tmp_path, expected):
            write_zip(tmp_path / "images.zip", expected)
            return lambda: ZipSource(tmp_path / "images.zip")

N samples, C classes, H and W height and width.
"""

import multiprocessing
import pickle
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from softlabel.common.multi_hot import is_labelled
from softlabel.dataset import Source, open_source
from softlabel.inputs.base import IGNORE, InputKind, Sample, Text
from softlabel.inputs.image_decode import IMAGES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpectedSample:
    """One sample as the test wrote it, known without the source.

    Attributes:
        key: its key.
        pixels: uint8 (H, W, 3), its image decoded; of a source of arrays its numbers, in the type that they have there.
        label: its class, -100 for none; or, where a sample may have several classes, 1, 0 or -1 (unknown) for each.
        encoded: the bytes of its image file; None where the source gives pixels.
        text: of a source of texts, instead of `pixels`: the text, or the pair; of chats the JSON of their messages.
        ids: of a source of documents, instead of `pixels`: the ids of the tokens.
        counts: of such, which of its positions count; None for all.
    """

    key: str
    pixels: NDArray[Any] | None = None
    label: int | tuple[int, ...] = IGNORE
    encoded: bytes | None = None
    text: Text | None = None
    ids: Sequence[int] | None = None
    counts: Sequence[int] | None = None

    def __post_init__(self) -> None:
        given = sum(one is not None for one in (self.pixels, self.text, self.ids))
        assert given == 1, f"{self.key}: give one of `pixels`, `text` and `ids`"

    @property
    def decoded(self) -> Any:
        """What `decode` gives."""
        if self.ids is not None:
            counts = [1] * len(self.ids) if self.counts is None else self.counts
            return np.array([list(self.ids), list(counts)])
        return self.pixels if self.text is None else self.text

    def hash_content(self) -> int:
        """The content hash that FORMAT.md defines, computed here."""
        if self.encoded is not None:
            return xxhash.xxh3_64_intdigest(self.encoded)
        if self.ids is not None:
            return xxhash.xxh3_64_intdigest(np.array(self.ids, "<i4").tobytes())
        if isinstance(self.text, str):
            return xxhash.xxh3_64_intdigest(self.text.encode())
        if self.text is not None:
            first, second = (one.encode() for one in self.text)
            return xxhash.xxh3_64_intdigest(str(len(first)).encode() + b":" + first + second)
        assert self.pixels is not None
        shape = "x".join(map(str, self.pixels.shape))
        seed = xxhash.xxh3_64_intdigest(f"{self.pixels.dtype.str} {shape}".encode())
        return xxhash.xxh3_64_intdigest(self.pixels.tobytes(), seed) >> 16 << 16 | 0x7870


class SourceTests:
    """The contract of `softlabel.Source`. A subclass gives the fixtures `expected` and `make_source`.

    A test that a source cannot pass for a reason, such as one in another process for data in memory, is taken out by
    setting it to None in the subclass.
    """

    @pytest.fixture
    def expected(self) -> Sequence[ExpectedSample]:
        """All samples in their order, at least three, of any keys, labels and sizes."""
        raise NotImplementedError("give the fixture `expected`: the samples that the source must have")

    @pytest.fixture
    def make_source(self) -> Callable[[], Source]:
        """Opens the same data as often as it is called."""
        raise NotImplementedError("give the fixture `make_source`: a function that opens the source")

    @pytest.fixture
    def source(self, make_source: Callable[[], Source]) -> Source:
        return make_source()

    def test_keys_and_labels(self, source: Source, expected: Sequence[ExpectedSample]) -> None:
        keys, labels_N = [one.key for one in expected], np.array([one.label for one in expected])
        several = labels_N.ndim == 2
        assert isinstance(source, Source)
        assert isinstance(source.kind, str)
        assert isinstance(source.name, str)
        assert len(source) == len(expected)
        assert len(set(keys)) == len(keys), "the keys of `expected` must differ"
        assert source.keys() == source.key_table().to_list() == keys
        assert source.label_width == (labels_N.shape[1] if several else None)
        assert source.labels().dtype == (np.int8 if several else np.int64)
        assert source.labels().tolist() == labels_N.tolist()
        assert source.has_labels == is_labelled(labels_N).any()
        assert source.count_labelled() in (None, is_labelled(labels_N).sum())
        if source.class_names is not None:
            assert (labels_N.shape[1] if several else labels_N.max() + 1) <= len(source.class_names)

    def test_ranges_of_keys_and_labels(self, source: Source, expected: Sequence[ExpectedSample]) -> None:
        n = len(expected)
        ends = [(0, 0), (0, n // 2), (n // 3, n // 2 + 1), (n - 1, n), (n - 1, n + 77), (n, None), (n // 3, None)]
        for start, stop in ends:
            part = expected[start:stop]
            assert source.keys(start, stop) == [one.key for one in part]
            assert source.key_table(start, stop).to_list() == [one.key for one in part]
            assert source.labels(start, stop).tolist() == [_plain(one.label) for one in part]

    def test_fingerprint_is_the_hash_of_the_keys(self, source: Source, expected: Sequence[ExpectedSample]) -> None:
        keys = [one.key for one in expected]
        assert source.fingerprint() == source.digest(0, len(keys)) == hash_keys(keys)
        assert source.digest(1, 3) == hash_keys(keys[1:3])

    def test_samples_are_read_in_any_order(self, source: Source, expected: Sequence[ExpectedSample]) -> None:
        n = len(expected)
        for indices in ([], [n // 2], list(range(n)), [n - 1, 0, n // 2, n // 2, 1], list(range(n // 3, n // 2))):
            check_samples(source.read(indices), [expected[index] for index in indices], source.inputs)
            check_samples(
                source.read(np.array(indices, np.int64)), [expected[index] for index in indices], source.inputs
            )

    def test_opened_again_it_is_the_same(
        self, make_source: Callable[[], Source], source: Source, expected: Sequence[ExpectedSample]
    ) -> None:
        again = make_source()
        assert (again.keys(), again.class_names, again.fingerprint()) == (
            source.keys(),
            source.class_names,
            source.fingerprint(),
        )
        check_samples(again.read([1, 0]), [expected[1], expected[0]], source.inputs)
        check_samples(source.read([2, 1]), [expected[2], expected[1]], source.inputs)

    def test_blocks_cover_the_samples_once(self, source: Source, expected: Sequence[ExpectedSample]) -> None:
        blocks = source.blocks()
        assert all(start < stop for start, stop in blocks)
        assert [index for start, stop in blocks for index in range(start, stop)] == list(range(len(expected)))

    def test_labels_may_be_ignored(self, source: Source, expected: Sequence[ExpectedSample]) -> None:
        plain = open_source(source, ignore_labels=True)
        assert (plain.has_labels, plain.class_names) == (False, None)
        assert plain.labels().tolist() == [IGNORE] * len(expected)
        assert plain.keys() == source.keys()
        assert [sample.label for sample in plain.read([1, 0])] == [IGNORE, IGNORE]

    def test_a_pickled_copy_reads_on(self, source: Source, expected: Sequence[ExpectedSample]) -> None:
        source.read([0])  # what is open now must not be in the pickle
        copy = pickle.loads(pickle.dumps(source))
        check_samples(copy.read([len(expected) - 1, 1]), [expected[-1], expected[1]], source.inputs)
        check_samples(source.read([2]), [expected[2]], source.inputs)

    def test_worker_processes_read_it(self, source: Source, expected: Sequence[ExpectedSample]) -> None:
        source.read([0, len(expected) // 2])  # what is open now must not be used by forked children
        loader = DataLoader(_Samples(source), batch_size=None, num_workers=2, collate_fn=_return_unchanged)
        found = list(loader)
        assert [(key, _plain(label)) for key, label, _ in found] == [(one.key, _plain(one.label)) for one in expected]
        for (_, _, decoded), one in zip(found, expected, strict=True):
            _check_decoded(decoded, one)
        check_samples(source.read([len(expected) - 1]), [expected[-1]], source.inputs)

    def test_a_process_that_inherits_nothing_reads_it(self, source: Source, expected: Sequence[ExpectedSample]) -> None:
        source.read([1])
        found = start_process().submit(read_sums, source).result()
        assert found == [(one.key, _sum(one.decoded)) for one in expected]


class _Samples(Dataset[tuple[str, Any, Any]]):
    """A map-style dataset over a source, for worker processes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, Any, Any]:
        (sample,) = self.source.read([index])
        return sample.key, sample.label, decode(sample, self.source.inputs)


def _return_unchanged(sample: Any) -> Any:
    return sample


def decode(sample: Sample, kind: InputKind) -> NDArray[Any] | Text:
    """Decode a sample as its source's kind does: an image (H, W, 3), an array, a text or a pair of them, or a document,
    (2, L) of ids and of which positions count."""
    item, _ = kind.decode(sample)
    if isinstance(item, str | tuple):
        return item
    if isinstance(item, dict):
        return np.stack([item["input_ids"].numpy(), item["mask"].numpy()])
    assert isinstance(item, Tensor)
    return item.permute(1, 2, 0).numpy() if kind == IMAGES else item.numpy()


def check_samples(samples: Sequence[Sample], expected: Sequence[ExpectedSample], kind: InputKind = IMAGES) -> None:
    """Compare what a source of a kind has read: keys, labels, decoded samples and content hashes."""
    found = [(sample.key, _plain(sample.label)) for sample in samples]
    assert found == [(one.key, _plain(one.label)) for one in expected]
    for sample, one in zip(samples, expected, strict=True):
        _check_decoded(decode(sample, kind), one)
        assert kind.content_hash(sample.raw) == one.hash_content(), f"{one.key}: the sample's content differs"


def _check_decoded(found: Any, one: ExpectedSample) -> None:
    if one.text is None:
        np.testing.assert_array_equal(found, one.decoded)
    else:
        assert found == one.text


def _plain(label: Any) -> Any:
    return np.asarray(label).tolist()


def hash_keys(keys: Iterable[str]) -> str:
    """The fingerprint of these keys in this order, by its definition in FORMAT.md."""
    encoded = [key.encode() for key in keys]
    return xxhash.xxh3_128_hexdigest(b"".join(len(key).to_bytes(4, "little") + key for key in encoded))


def read_sums(source: Source) -> list[tuple[str, Any]]:
    """The keys of all samples and the sums of their numbers, or their texts, in another process."""
    samples = source.read(range(len(source)))
    return [(sample.key, _sum(decode(sample, source.inputs))) for sample in samples]


def _sum(decoded: Any) -> Any:
    return decoded if isinstance(decoded, str | tuple) else float(decoded.sum(dtype=np.float64))


@cache
def start_process() -> ProcessPoolExecutor:
    """Start one process that shares no memory and no open file with this one; it lives until this one ends."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
