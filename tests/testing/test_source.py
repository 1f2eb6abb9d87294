"""`softlabel.testing.SourceTests` on a source as another package has it: right ones pass, wrong ones fail."""

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import softlabel
from softlabel.dataset.source import Source
from softlabel.inputs.base import Sample
from softlabel.inputs.image_transform import Preprocessing
from softlabel.testing import ExpectedSample, SourceTests
from tests.support.teachers import write_teacher

CLASSES = ("ant", "bee")
INPUT = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=8, crop=8)


class ZipSource(Source):
    """Images in a ZIP archive, a folder for each class; the archive is opened in the process that reads."""

    kind = "zip"
    has_labels = True
    class_names = CLASSES

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        with zipfile.ZipFile(path) as archive:
            self.names = archive.namelist()

    def __len__(self) -> int:
        return len(self.names)

    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        return self.names[start:stop]

    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        return np.array([CLASSES.index(name.split("/")[0]) for name in self.names[start:stop]], dtype=np.int64)

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        with zipfile.ZipFile(self.path) as archive:
            labels = self.labels()
            return [
                Sample(key=self.names[index], raw=archive.read(self.names[index]), label=int(labels[index]))
                for index in indices
            ]


@pytest.fixture
def expected() -> list[ExpectedSample]:
    samples = []
    for number in range(11):
        pixels = np.random.default_rng(number).integers(0, 256, (8 + number, 9, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        key = f"{CLASSES[number % 2]}/ü-{number}.png"
        samples.append(ExpectedSample(key=key, label=number % 2, pixels=pixels, encoded=buffer.getvalue()))
    return samples


@pytest.fixture
def archive(tmp_path: Path, expected: list[ExpectedSample]) -> Path:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for one in expected:
            archive.writestr(one.key, one.encoded or b"")
    return tmp_path / "images.zip"


class TestZipSource(SourceTests):
    @pytest.fixture
    def expected(self, expected: list[ExpectedSample]) -> list[ExpectedSample]:
        return expected

    @pytest.fixture
    def make_source(self, archive: Path) -> Callable[[], Source]:
        return lambda: ZipSource(archive)


class SortedRead(ZipSource):
    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        return super().read(np.unique(indices))


class ClippedKeys(ZipSource):
    def keys(self, start: int = 0, stop: int | None = None) -> list[str]:
        return self.names[start : stop or len(self)]  # stop=0 gives all


class FloatLabels(ZipSource):
    def labels(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        return super().labels(start, stop).astype(np.float64)  # type: ignore[return-value]


class ShiftedLabels(ZipSource):
    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        return [Sample(key=one.key, raw=one.raw, label=1 - one.label) for one in super().read(indices)]


class ReencodedImages(ZipSource):
    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> list[Sample]:
        samples = []
        for one in super().read(indices):
            buffer = io.BytesIO()
            Image.open(io.BytesIO(one.raw)).save(buffer, "BMP")  # type: ignore[arg-type]
            samples.append(Sample(key=one.key, raw=buffer.getvalue(), label=one.label))
        return samples


class OverlappingBlocks(ZipSource):
    def blocks(self) -> list[tuple[int, int]]:
        return [(0, 6), (5, len(self))]


class OpenArchive(ZipSource):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.archive = open(path, "rb")  # noqa: SIM115  (cannot be pickled)


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (SortedRead, "test_samples_are_read_in_any_order"),
        (ClippedKeys, "test_ranges_of_keys_and_labels"),
        (FloatLabels, "test_keys_and_labels"),
        (ShiftedLabels, "test_samples_are_read_in_any_order"),
        (ReencodedImages, "test_samples_are_read_in_any_order"),
        (OverlappingBlocks, "test_blocks_cover_the_samples_once"),
        (OpenArchive, "test_a_pickled_copy_reads_on"),
    ],
)
def test_a_mistake_fails(kind: type[ZipSource], test: str, archive: Path, expected: list[ExpectedSample]) -> None:
    getattr(SourceTests(), test)(source=ZipSource(archive), expected=expected)
    with pytest.raises((AssertionError, TypeError)):
        getattr(SourceTests(), test)(source=kind(archive), expected=expected)


def test_it_is_labelled_and_trained_on(archive: Path, expected: list[ExpectedSample], tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher.safetensors", num_classes=2)
    softlabel.generate(ZipSource(archive), teachers=[f"{teacher}?resize=8&crop=8"], out=tmp_path / "store")
    with softlabel.open_store(tmp_path / "store", verify="full") as store:
        assert list(store.keys) == [one.key for one in expected]
        rows = store.take(range(len(store)))
        assert rows.labels.tolist() == [one.label for one in expected]
        assert rows.content.tolist() == [one.hash_content() for one in expected]
    loader = softlabel.SoftLabelLoader(ZipSource(archive), tmp_path / "store", batch_size=4, preprocessing=INPUT)
    found = {key: row for batch in loader for key, row in zip(batch.keys, batch.target.scaled_logits, strict=True)}
    for key, row in zip(rows.keys, rows.scaled_logits, strict=True):
        np.testing.assert_array_equal(found[key].numpy(), row)
