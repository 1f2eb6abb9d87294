"""Soft labels attached by key to torch, WebDataset and Hugging Face datasets, each against the file."""

import dataclasses
import io
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

import softlabel
from softlabel.convert.recode import convert_store
from softlabel.errors import DataError, MismatchError, MissingKeyError, UsageError
from softlabel.loss import DenseTarget, TopKTarget
from softlabel.store.encodings import TopK
from softlabel.store.open import open_store
from tests.support.stores import Samples, draw_logits, make_run, write_logits, write_store

ROWS, CLASSES = 60, 7
KEYS = [f"n0{number % 3}/image-{number:03d}" for number in range(ROWS)]
LOGITS = draw_logits(ROWS, CLASSES)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in another order than the data's."""
    path = tmp_path_factory.mktemp("adapters") / "store"
    order = np.random.default_rng(1).permutation(ROWS)
    write_logits(path, [KEYS[place] for place in order], LOGITS[order], temperature=2)
    return path


def check(keys: list[str], target: Any) -> None:
    assert isinstance(target, DenseTarget)
    assert target.temperature == 2
    logits = LOGITS[[KEYS.index(key) for key in keys]] / 2
    expected = (logits - logits.max(axis=1, keepdims=True)).astype(np.float16)
    assert np.array_equal(target.scaled_logits.numpy(), expected)


class Pairs(Dataset[tuple[torch.Tensor, int]]):
    """Item i is (a tensor of i, i), so that a batch says which samples it holds."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(index)), index


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_a_plain_dataloader_gets_the_label_of_each_item(store: Path, workers: int, batched: bool) -> None:
    numbers = torch.arange(ROWS)
    dataset: Dataset[Any] = TensorDataset(numbers.float(), numbers) if batched else Pairs()
    data = softlabel.with_soft_labels(dataset, store, key_fn=KEYS.__getitem__)
    assert len(data) == ROWS
    assert data.temperature == 2
    loader = DataLoader(data, batch_size=16, shuffle=True, collate_fn=data.collate, num_workers=workers)
    seen: Counter[int] = Counter()
    for (items, labels), target in loader:
        assert torch.equal(items.reshape(len(labels), -1)[:, 0].long(), labels)
        check([KEYS[number] for number in labels], target)
        seen.update(labels.tolist())
    assert seen == Counter(range(ROWS))
    item, row = data[3]
    assert int(item[1]) == 3
    check([KEYS[3]], data.join.of_rows(np.array([row])))


def test_a_dataset_that_batches_is_asked_for_batches(store: Path) -> None:
    class Batched(Pairs):
        def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
            asked.append(list(indices))
            return [self[index] for index in indices]

    asked: list[list[int]] = []
    data = softlabel.with_soft_labels(Batched(), store, key_fn=KEYS.__getitem__)
    next(iter(DataLoader(data, batch_size=5, collate_fn=data.collate)))
    assert asked == [[0, 1, 2, 3, 4]]


def test_samples_without_labels_are_named_or_left_out(store: Path) -> None:
    def key(index: int) -> str:
        return KEYS[index] if index % 10 else f"new {index}"

    with pytest.raises(MissingKeyError, match=r"6 of 60 keys have no row, the first: 'new 0', 'new 10', 'new 20'"):
        softlabel.with_soft_labels(Pairs(), store, key_fn=key)
    data = softlabel.with_soft_labels(Pairs(), store, key_fn=key, missing="skip")
    seen = []
    for (_, labels), target in DataLoader(data, batch_size=20, collate_fn=data.collate):
        check([KEYS[number] for number in labels], target)
        seen += labels.tolist()
    assert seen == [number for number in range(ROWS) if number % 10]
    with pytest.raises(DataError, match="none of its 60 samples has a row"):
        softlabel.with_soft_labels(Pairs(), store, missing="skip")
    with pytest.raises(UsageError, match="'error' or 'skip'"):
        softlabel.with_soft_labels(Pairs(), store, missing="hard-only")  # type: ignore[arg-type]


def write_tars(folder: Path) -> list[str]:
    """Two WebDataset shards of raw arrays and class numbers."""
    names = []
    for number, keys in enumerate((KEYS[:40], KEYS[40:])):
        names.append(str(folder / f"data-{number}.tar"))
        with tarfile.open(names[-1], "w") as tar:
            for key in keys:
                for suffix, data in (("cls", str(KEYS.index(key)).encode()), ("txt", key.encode())):
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return names


@pytest.mark.parametrize("workers", [0, 2])
def test_a_webdataset_pipeline_gets_its_targets(store: Path, tmp_path: Path, workers: int) -> None:
    wds = pytest.importorskip("webdataset", reason="needs the extra 'webdataset'")
    urls = write_tars(tmp_path)
    join = softlabel.LabelJoin(store)
    dicts = wds.WebDataset(urls, shardshuffle=False).shuffle(10).decode().batched(8).map(join)
    seen: Counter[str] = Counter()
    for batch in wds.WebLoader(dicts, batch_size=None, num_workers=workers):
        assert [KEYS[number] for number in batch["cls"]] == batch["__key__"] == batch["txt"]
        check(batch["__key__"], batch["target"])
        seen.update(batch["__key__"])
    assert seen == Counter(KEYS)
    by_place = softlabel.LabelJoin(store, key=1)
    tuples = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("cls", "__key__").batched(8).map(by_place)
    classes, keys, target = next(iter(tuples))
    assert [KEYS[number] for number in classes] == keys
    check(keys, target)


def test_hard_labels_of_a_batch_are_compared(tmp_path: Path) -> None:
    labels = [number % 3 for number in range(ROWS)]
    write_logits(tmp_path / "store", KEYS, LOGITS, labels=labels, temperature=2)
    join = softlabel.LabelJoin(tmp_path / "store", key="name", label="label")
    assert "target" in join({"name": KEYS[:3], "label": torch.tensor([0, -100, 2])})
    with pytest.raises(MismatchError, match=r"batch: 1 of 2 samples have another hard label .*: 0 here, 1 there"):
        join({"name": KEYS[:2], "label": [0, 0]})
    with pytest.raises(DataError, match="expected its labels under 'label'"):
        join({"name": KEYS[:2]})


def test_hugging_face_datasets_carry_the_columns(store: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face datasets")
    data = datasets.Dataset.from_dict({"name": KEYS, "label": list(range(ROWS))})
    join = softlabel.LabelJoin(store, key="name")
    written = data.map(join.columns, batched=True, batch_size=7).with_format("torch")
    for dataset in (data.with_transform(join.columns), written):
        for batch in DataLoader(dataset, batch_size=16, shuffle=True):
            keys = [KEYS[number] for number in batch["label"]]
            assert batch["name"] == keys
            check(keys, join.from_columns(batch))
            assert set(batch) == {"name", "label"}
    for batch in DataLoader(data, batch_size=16, collate_fn=lambda rows: join(default_collate(rows))):
        check([KEYS[number] for number in batch["label"]], batch["target"])
    with pytest.raises(DataError, match="expected the column 'soft_logits'"):
        join.from_columns({"name": KEYS})


def test_other_encodings_survive_being_columns(tmp_path: Path) -> None:
    run = make_run(samples=30, classes=300)
    samples = Samples.of(run, keys=[str(number) for number in range(30)])
    write_store(tmp_path / "dense", run, samples)
    encoding = TopK(k=5, temperatures=(run.temperature,))
    convert_store(tmp_path / "dense", tmp_path / "topk", encoding=encoding, progress=False)
    join = softlabel.LabelJoin(tmp_path / "topk", key="id")
    rows = [
        {"id": number, **{k: v[0] for k, v in join.columns({"id": [number]}).items() if k != "id"}} for number in (7, 3)
    ]
    target, expected = join.from_columns(default_collate(rows)), join.target(["7", "3"])
    assert isinstance(target, TopKTarget)
    for field in dataclasses.fields(target):
        one, other = getattr(target, field.name), getattr(expected, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    top = samples.logits[0, [7, 3]].argmax(axis=1)
    assert target.index[:, 0].tolist() == top.tolist()


def test_a_join_says_what_it_cannot_do(store: Path, tmp_path: Path) -> None:
    join = softlabel.LabelJoin(store)
    with pytest.raises(MissingKeyError, match="'nobody'"):
        join({"__key__": [KEYS[0], "nobody"]})
    with pytest.raises(DataError, match="expected its keys under '__key__', found name, x; say where they are"):
        join({"name": KEYS, "x": KEYS})
    with pytest.raises(DataError, match="expected its keys under '__key__', found 2 places"):
        join((KEYS, KEYS))
    copy = pickle.loads(pickle.dumps(join))
    check(KEYS[:3], copy.target(KEYS[:3]))
    write_store(tmp_path / "views", make_run(views=3))
    with pytest.raises(UsageError, match="its rows are views of the images; SoftLabelLoader"):
        softlabel.LabelJoin(open_store(tmp_path / "views"))


@pytest.mark.parametrize("key", ["n00/image-000", b"n00", 3, torch.tensor(3), 1.5, True])
def test_a_key_that_was_not_batched_is_no_batch_of_letters(store: Path, key: Any) -> None:
    join = softlabel.LabelJoin(store)
    for ask in (lambda: join({"__key__": key}), lambda: join.columns({"__key__": key}), lambda: join.target(key)):
        with pytest.raises(DataError, match=r"expected those of a whole batch, found one alone.*batched"):
            ask()
    with pytest.raises(DataError, match="found None"):
        join.target([KEYS[0], None])


class Numbered(Dataset[tuple[torch.Tensor, int]]):
    """Item i is of class i mod 7; `listed`: as torchvision's datasets, it has a list of that."""

    def __init__(self, listed: bool) -> None:
        if listed:
            self.targets = [index % CLASSES for index in range(ROWS)]

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((2,), float(index)), index % CLASSES


@pytest.mark.parametrize("listed", [True, False])
def test_a_subset_that_counts_otherwise_than_the_store_is_refused(listed: bool, tmp_path: Path) -> None:
    whole = [str(number) for number in range(ROWS)]
    write_logits(tmp_path / "store", whole, LOGITS, labels=[number % CLASSES for number in range(ROWS)], temperature=2)
    subset = Subset(Numbered(listed), [5, 3, 40])

    def first_batch(**options: Any) -> Any:
        data = softlabel.with_soft_labels(subset, tmp_path / "store", **options)
        return next(iter(DataLoader(data, batch_size=3, collate_fn=data.collate)))

    with pytest.raises(MismatchError, match=r"3 of 3 samples have another hard label.*'0': 5 here, 0 there"):
        first_batch()
    _, target = first_batch(key_fn=lambda index: str(subset.indices[index]))
    assert target.scaled_logits.argmax(dim=1).tolist() == LOGITS[[5, 3, 40]].argmax(axis=1).tolist()
    assert len(first_batch(check_labels=False)[1].scaled_logits) == 3


def test_a_subset_without_labels_to_compare_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_logits(tmp_path / "store", [str(number) for number in range(ROWS)], LOGITS)
    softlabel.with_soft_labels(Subset(Pairs(), [5, 3]), tmp_path / "store")
    assert "its keys are its own numbers, 0 to 1" in caplog.text
