"""torch datasets, torchvision's and scikit-learn's digits as sources."""

import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder

from softlabel import SoftLabelLoader, generate
from softlabel.dataset import open_source
from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import IGNORE
from softlabel.inputs.image_decode import decode_image
from softlabel.models import build_model


class Items:
    """A map-style dataset of whatever the test wants."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


PIXELS = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)


def name_of(index: int) -> str:
    return f"sample-{index}"


def test_digits_are_those_of_scikit_learn() -> None:
    source, reference = open_source("digits"), load_digits()
    assert (source.kind, source.name, len(source)) == ("digits", "digits", 1797)
    assert source.class_names == tuple("0123456789")
    assert source.labels().tolist() == reference.target.tolist()
    assert source.keys(1795) == ["1795", "1796"]
    for index in (0, 17, 1796):
        sample = source.read([index])[0]
        decoded_CHW = decode_image(sample.raw)
        assert decoded_CHW.shape == (3, 8, 8)
        for channel_HW in decoded_CHW:
            assert np.abs(channel_HW.numpy() - reference.images[index] * 255 / 16).max() <= 0.5
        assert sample.label == reference.target[index]
    assert not open_source("digits", ignore_labels=True).has_labels
    assert open_source("digits?rows=10:20").labels().tolist() == reference.target[10:20].tolist()
    with pytest.raises(SpecError, match="unknown option split"):
        open_source("digits?split=train")


@pytest.mark.parametrize(
    ("item", "label"),
    [
        ((PIXELS, 3), 3),
        ([PIXELS, np.int32(4)], 4),
        ((PIXELS, torch.tensor(5)), 5),
        ((PIXELS, None), IGNORE),
        ((PIXELS, -1), IGNORE),
        ((PIXELS, 2, "more"), 2),
        ((PIXELS,), IGNORE),
        (PIXELS, IGNORE),
        ({"image": PIXELS, "label": 1}, 1),
        ({"img": Image.fromarray(PIXELS), "fine_label": 6, "coarse_label": 2}, 6),
        ({"image": PIXELS, "Label": 7}, 7),
        ({"image": PIXELS, "class": 8, "id": 3}, 8),
        ({"image": PIXELS}, IGNORE),
    ],
)
def test_every_shape_of_item(item: Any, label: int) -> None:
    source = open_source(Items(item))
    sample = source.read([0])[0]
    assert (sample.key, sample.label) == ("0", label)
    assert np.array_equal(decode_image(sample.raw).permute(1, 2, 0).numpy(), PIXELS)
    assert source.labels().tolist() == [label]
    assert (source.kind, source.name) == ("dataset", "Items")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((PIXELS, "cat"), "expected a class number, found str"),
        ((PIXELS, {"boxes": []}), "expected a class number, found dict"),
        ((PIXELS, 0.5), "expected a class number, found float"),
        ((PIXELS, torch.full((10,), 0.5)), "expected 1, 0 or -1 .not known. for each class, found 0.5"),
        ((PIXELS, -5), "found -5"),
        ((), "found an empty tuple"),
        ({"picture": PIXELS}, "expected items with 'image', .*found picture"),
    ],
)
def test_ambiguous_items_are_refused(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(Items(item)).read([0])


def test_labels_that_are_no_classes_can_be_ignored() -> None:
    source = open_source(Items((PIXELS, "cat")), ignore_labels=True)
    assert source.read([0])[0].label == IGNORE
    assert not source.has_labels


def test_keys_by_function() -> None:
    data = Items(*[(PIXELS, i) for i in range(4)])
    source = open_source(data, key_fn=name_of)
    assert source.keys(1, 3) == ["sample-1", "sample-2"]
    assert [sample.key for sample in source.read([3, 0])] == ["sample-3", "sample-0"]
    assert pickle.loads(pickle.dumps(source)).keys() == source.keys()
    assert source.fingerprint() != open_source(data).fingerprint()
    with pytest.raises(DataError, match=r"'0' \(samples 0 and 2\) and '1' \(samples 1 and 3\)"):
        open_source(data, key_fn=lambda index: str(index % 2))
    for whole in (int, np.int64, torch.tensor):
        assert open_source(data, key_fn=lambda index, whole=whole: whole(index + 7)).keys() == ["7", "8", "9", "10"]
    for odd in (bool, float, Path):
        with pytest.raises(DataError, match=r"key_fn\(0\): expected a string or an integer, found "):
            open_source(data, key_fn=lambda index, odd=odd: odd(str(index)))


def test_the_fingerprint_is_that_of_its_definition(tmp_path: Path) -> None:
    names = ["", "ä/é.jpg", *(f"{'x' * (number % 40)}-{number}" for number in range(70_000))]
    digest = xxhash.xxh3_128()
    for name in names:
        digest.update(len(name.encode()).to_bytes(4, "little") + name.encode())
    items = Items(*[(PIXELS, 0)] * len(names))
    source = open_source(items, key_fn=names.__getitem__)
    assert source.fingerprint() == digest.hexdigest()
    assert source.key_table(1, 4).to_list() == source.keys(1, 4) == names[1:4]
    assert open_source(items).key_table(8, 11).to_list() == ["8", "9", "10"]
    with pytest.raises(DataError, match="valid Unicode"):
        open_source(Items((PIXELS, 0)), key_fn=lambda index: "\udcff.jpg")


def test_whole_batches_are_asked_for_where_the_dataset_can() -> None:
    class Batched(Items):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            asked.append(indices)
            return [self.items[index] for index in indices]

    asked: list[list[int]] = []
    source = open_source(Batched(*[(PIXELS, i) for i in range(5)]))
    asked.clear()
    assert [sample.label for sample in source.read([4, 2, 2])] == [4, 2, 2]
    assert asked == [[4, 2, 2]]


def test_subsets_and_tensor_datasets() -> None:
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    data = TensorDataset(images, torch.arange(6))
    source = open_source(Subset(data, [5, 1, 3]))
    assert source.labels().tolist() == [5, 1, 3]
    assert torch.equal(decode_image(source.read([1])[0].raw), images[1])


class Counted:
    """Items of which the number alive at once is counted."""

    alive = most = 0

    class Item(tuple[np.ndarray, int]):
        def __del__(self) -> None:
            Counted.alive -= 1

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, index: int) -> "Counted.Item":
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        return Counted.Item((np.ones(3, np.float32), index % 7))


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 1999)])
def test_labels_are_read_without_holding_all_items(start: int, stop: int | None) -> None:
    Counted.alive = Counted.most = 0
    labels_N = open_source(Counted()).labels(start, stop)
    np.testing.assert_array_equal(labels_N, np.arange(2000)[start:stop] % 7)
    assert Counted.most < 200


@pytest.mark.parametrize("subset", [False, True])
def test_labels_of_a_hugging_face_column_are_known_without_reading_items(subset: bool) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"text": list("vwxyz"), "label": [0, 1, None, 1, 0]}, features=features)
    data = data.select([4, 2, 1, 3])
    source = open_source(Subset(data, [3, 1, 0]) if subset else data)
    expected = [1, IGNORE, 0] if subset else [0, IGNORE, 1, 1]
    assert source.count_labelled() == len(expected) - 1  # not None, as of labels that are in the items alone
    assert source.labels().tolist() == [sample.label for sample in source.read(range(len(source)))] == expected
    changed = open_source(data.with_transform(lambda rows: {"text": rows["text"], "label": [1] * len(rows["text"])}))
    assert changed.count_labelled() is None
    assert changed.labels().tolist() == [1] * 4


def test_an_unreadable_image_is_the_only_bad_one(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(PIXELS).save(tmp_path / name)
    (tmp_path / "a" / "1.png").write_bytes(b"damaged")
    source = open_source(ImageFolder(str(tmp_path)))
    bad, good = source.read([0, 1])
    assert (bad.label, good.label) == (0, 1)
    with pytest.raises(BadImageError, match="cannot identify"):
        decode_image(bad.raw)
    assert decode_image(good.raw).shape == (3, 2, 2)


def test_an_error_of_the_dataset_itself_names_the_sample_and_the_line() -> None:
    data = Items((PIXELS, 1), ZeroDivisionError("one\nline"))
    reason = r"Items: sample 1: the dataset raised ZeroDivisionError: one line \(test_torch_dataset\.py, line \d+\)"
    with pytest.raises(DataError, match=reason) as raised:
        open_source(data).read([0, 1])
    assert raised.value.__cause__ is data.items[1]
    data.__class__ = type("Batched", (Items,), {"__getitems__": lambda self, rows: [self[row] for row in rows]})
    with pytest.raises(DataError, match=reason.replace("Items", "Batched")):
        open_source(data).read([0, 1])


@pytest.mark.parametrize("absent", [None, (None, 1), {"image": None, "label": 1}, {"bytes": None, "path": None}])
def test_a_missing_image_is_the_only_bad_one(absent: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a row without bytes does in a Parquet file: it is listed by its key, or stops the run if asked to."""
    if isinstance(absent, dict) and "bytes" in absent:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        images = {"image": [Image.fromarray(PIXELS), None], "label": [0, 1]}
        source = open_source(datasets.Dataset.from_dict(images, features=features))
    else:
        source = open_source(Items((PIXELS, 0), absent))
    good, bad = source.read([0, 1])
    assert decode_image(good.raw).shape == (3, 2, 2)
    assert (bad.key, bad.label) == ("1", IGNORE if absent is None else 1)
    with pytest.raises(BadImageError, match="returns None"):
        decode_image(bad.raw)
    torch.save(build_model("zoo:resnet8", num_classes=2).state_dict(), tmp_path / "w.pt")
    teachers = [f"zoo:resnet8@{tmp_path / 'w.pt'}?num_classes=2&resize=8"]
    with pytest.raises(DataError, match=r"'?1'?.*returns None"):
        generate(source, teachers=teachers, out=tmp_path / "s", preflight=False, device="cpu", on_bad_image="error")
    generate(source, teachers=teachers, out=tmp_path / "t", preflight=False, device="cpu", progress=False)
    assert "1 of 2 samples have no row; the first, sample 1, '1': " in caplog.text


def test_several_datasets_by_name_are_refused() -> None:
    several = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"image": [1]}), "test": None})
    for given, name in ((several, "DatasetDict"), (dict(several), "dict")):
        with pytest.raises(DataError, match=rf"{name}: expected one dataset, .*: 'train', 'test'; .* data\['train'\]"):
            open_source(given)


def test_an_image_of_a_wrong_kind_names_its_sample() -> None:
    loader = SoftLabelLoader(Items((PIXELS, 0), ("a.jpg", 1)), None, batch_size=2)
    with pytest.raises(DataError, match=r"Items: sample '1': expected an image as bytes, .* found str"):
        list(loader)


def test_a_list_of_labels_that_disagrees_with_the_items_is_refused() -> None:
    data = Items((PIXELS, 1), (PIXELS, 2))
    data.targets = [1, 1]
    source = open_source(data)
    with pytest.raises(DataError, match="sample '1': expected label 1 as in the dataset's list of labels, found 2"):
        source.read([0, 1])


def test_a_transformed_target_is_taken_from_the_items(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(PIXELS).save(tmp_path / name / "1.png")
    source = open_source(ImageFolder(str(tmp_path), target_transform=lambda label: label + 5))
    assert source.labels().tolist() == [5, 6]


def test_datasets_without_a_length_are_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([PIXELS])

    with pytest.raises(DataError, match="expected a map-style dataset"):
        open_source(Stream())
    with pytest.raises(DataError, match="expected a map-style dataset"):
        open_source(42)


def test_torchvision_by_name_equals_the_class(tmp_path: Path) -> None:
    source = open_source("torchvision:FakeData?size=7&image_size=[3,9,8]&num_classes=4")
    reference = FakeData(size=7, image_size=(3, 9, 8), num_classes=4)
    assert (source.kind, len(source)) == ("torchvision", 7)
    for sample, (image, label) in zip(source.read(range(7)), reference, strict=True):
        assert sample.label == int(label)
        assert np.array_equal(decode_image(sample.raw).permute(1, 2, 0).numpy(), np.asarray(image))


def test_nothing_is_downloaded_unasked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not found or corrupted.*download=true"):
        open_source(f"torchvision:CIFAR10?root={tmp_path}&train=true")
    assert not list(tmp_path.iterdir())


def test_torchvision_folders_are_read_as_files(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        Image.fromarray(PIXELS).save(tmp_path / name / "1.png")
    source = open_source(f"torchvision:ImageFolder?root={tmp_path}")
    assert source.keys() == ["x/1.png", "y/1.png"]
    assert source.class_names == ("x", "y")
    assert source.read([1])[0].raw == (tmp_path / "y" / "1.png").read_bytes()
    assert not open_source(f"torchvision:ImageFolder?root={tmp_path}", ignore_labels=True).has_labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchvision:Cifar10?root=x", "has no 'Cifar10'"),
        ("torchvision:vision?root=x", "has no 'vision'"),
        ("torchvision:CIFAR10", "root"),
        ("torchvision:FakeData?colour=3", "colour"),
        ("torchvision:SVHN?root=x&split=nope", "nope"),
    ],
)
def test_torchvision_mistakes(text: str, message: str) -> None:
    with pytest.raises((SpecError, DataError), match=message):
        open_source(text)
