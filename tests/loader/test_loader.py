"""The training loader: every image gets its own label whatever happened to the files, in an order that resumes."""

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import softlabel
from softlabel.errors import DataError, MismatchError, MissingKeyError, UsageError
from softlabel.loader import Batch, SoftLabelLoader
from softlabel.models import build_model
from softlabel.views import CropFlip
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, decode_by_pillow, make_digit_jpegs
from tests.support.stores import draw_logits, write_logits

ROWS = 90

# Who makes batches: the process itself, a thread of it that is one batch ahead, or worker processes.
READERS: list[dict[str, Any]] = [{}, {"pin_memory": True}, {"workers": 2}]
by_each_reader = pytest.mark.parametrize("reader", READERS, ids=["itself", "thread", "workers"])


def keys_of(count: int) -> list[str]:
    return [f"digits/{number:04d}.jpg" for number in range(count)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.parquet and its store, whose logits are random numbers by key."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = make_digit_jpegs()
    images, labels = images[:ROWS], labels[:ROWS]
    write_parquet(folder / "data.parquet", images, keys=keys_of(ROWS), labels=labels, class_names=DIGITS)
    logits_NC = draw_logits(ROWS, 10)
    write_logits(folder / "store", keys_of(ROWS), logits_NC, images=images, labels=labels, class_names=DIGITS)
    return folder


def same(one: Batch, other: Batch) -> bool:
    assert one.target is not None
    assert other.target is not None
    return (
        one.keys == other.keys
        and torch.equal(one.inputs, other.inputs)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.rows, other.rows)
        and torch.equal(one.target.scaled_logits, other.target.scaled_logits)
    )


# ---- the join ----


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_mb", [0, 64])
def test_shuffled_rows_and_another_file_name_leave_each_image_its_label(
    tmp_path: Path, workers: int, cache_mb: int
) -> None:
    images, labels = make_digit_jpegs()
    images, labels = images[:ROWS], labels[:ROWS]
    source = write_parquet(tmp_path / "train.parquet", images, keys=keys_of(ROWS), labels=labels, class_names=DIGITS)
    torch.manual_seed(0)
    teacher = build_model("zoo:resnet8", num_classes=10).eval()
    checkpoint = tmp_path / "teacher.pt"
    torch.save(teacher.state_dict(), checkpoint)
    spec = f"zoo:resnet8@{checkpoint}?resize=none&crop=none"
    softlabel.generate(source, teachers=[spec], temperature=2, out=tmp_path / "store", batch_size=16, device="cpu")

    # What the teacher says about an image is computed from its pixels alone, without a key.
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = torch.from_numpy(np.stack([decode_by_pillow(image) for image in images])).float() / 255
    with torch.inference_mode():
        scaled = teacher((inputs - mean[:, None, None]) / std[:, None, None]) / 2
    said = {
        decode_by_pillow(image).tobytes(): rest for image, *rest in zip(images, scaled.tolist(), labels, strict=True)
    }

    order = np.random.default_rng(1).permutation(ROWS)
    moved = write_parquet(
        tmp_path / "another name.parquet",
        [images[i] for i in order],
        keys=[keys_of(ROWS)[i] for i in order],
        labels=[labels[i] for i in order],
        class_names=DIGITS,
    )
    loader = SoftLabelLoader(moved, tmp_path / "store", batch_size=16, workers=workers, cache_mb=cache_mb)
    for _ in range(2):
        seen = Counter()
        for batch in loader:
            for place, key in enumerate(batch.keys):
                logits, label = said[batch.inputs[place].numpy().tobytes()]
                centred = torch.tensor(logits) - max(logits)
                assert torch.allclose(batch.target.scaled_logits[place].float(), centred, atol=5e-3, rtol=1e-3)
                assert batch.labels[place] == label
                seen[key] += 1
        assert seen == Counter(keys_of(ROWS))
    loader.close()


def test_real_cifar_images_keep_their_labels(shared_data: Path, tmp_path: Path) -> None:
    """The same with the CIFAR JPEG files and a real teacher, whose answer is accurate only for the right image."""
    import pyarrow.parquet as pq

    table = pq.read_table(shared_data / "cifar10-jpeg" / "test.parquet").slice(0, 500)
    pq.write_table(table, tmp_path / "part.parquet")
    pq.write_table(table.take(np.random.default_rng(0).permutation(500)), tmp_path / "shuffled.parquet")
    spec = f"zoo:resnet20@{shared_data / 'cifar10-resnets' / 'resnet20-jpeg.safetensors'}"
    softlabel.generate(tmp_path / "part.parquet", teachers=[spec], out=tmp_path / "store", device="cpu")
    straight = SoftLabelLoader(tmp_path / "part.parquet", tmp_path / "store", batch_size=100, shuffle=False)
    by_pixels = {
        image.numpy().tobytes(): target
        for batch in straight
        for image, target in zip(batch.inputs, batch.target.scaled_logits, strict=True)
    }
    correct = 0
    for batch in SoftLabelLoader(tmp_path / "shuffled.parquet", tmp_path / "store", batch_size=64, seed=3):
        for image, target in zip(batch.inputs, batch.target.scaled_logits, strict=True):
            assert torch.equal(by_pixels[image.numpy().tobytes()], target)
        correct += int((batch.target.scaled_logits.argmax(dim=1) == batch.labels).sum())
    assert correct / 500 > 0.85


def test_a_missing_key_is_named_skipped_or_kept_with_its_hard_label(digits: Path, tmp_path: Path) -> None:
    images, labels = make_digit_jpegs()
    keys = [*keys_of(ROWS), "digits/new one.jpg"]
    more = write_parquet(
        tmp_path / "more.parquet", images[: ROWS + 1], keys=keys, labels=labels[: ROWS + 1], class_names=DIGITS
    )
    with pytest.raises(MissingKeyError, match=r"1 of 91 samples .* 'digits/new one.jpg'"):
        SoftLabelLoader(more, digits / "store")
    skipped = SoftLabelLoader(more, digits / "store", missing="skip")
    assert skipped.num_samples == ROWS
    assert {key for batch in skipped for key in batch.keys} == set(keys_of(ROWS))
    kept = list(SoftLabelLoader(more, digits / "store", missing="hard-only", batch_size=40))
    assert sum(map(len, kept)) == ROWS + 1
    for batch in kept:
        expected = torch.tensor([key != keys[-1] for key in batch.keys])
        assert torch.equal(batch.has_target, expected)
        assert torch.equal(batch.rows >= 0, expected)
        loss = softlabel.distillation_loss(
            torch.zeros(len(batch), 10),
            batch.target,
            batch.labels,
            temperature=4,
            soft_weight=1,
            hard_weight=1,
            soft_mask=batch.has_target,
        )
        assert loss.isfinite()


def test_images_that_could_not_be_labelled_are_left_out(tmp_path: Path) -> None:
    images, labels = make_digit_jpegs()
    broken = [*images[:9], b"not an image"]
    source = write_parquet(tmp_path / "a.parquet", broken, keys=keys_of(10), labels=labels[:10], class_names=DIGITS)
    write_logits(tmp_path / "store", keys_of(9), draw_logits(9, 10), images=images[:9], bad=keys_of(10)[9:])
    loader = SoftLabelLoader(source, tmp_path / "store")
    assert [key for batch in loader for key in sorted(batch.keys)] == keys_of(9)
    assert loader.dataset.skipped_bad == 1


@by_each_reader
def test_an_image_that_changed_since_is_refused_by_name(digits: Path, tmp_path: Path, reader: dict[str, Any]) -> None:
    images, labels = make_digit_jpegs()
    changed = [*images[:40], images[ROWS + 5], *images[41:ROWS]]
    source = write_parquet(
        tmp_path / "data.parquet", changed, keys=keys_of(ROWS), labels=labels[:ROWS], class_names=DIGITS
    )
    with pytest.raises(MismatchError, match=r"'digits/0040.jpg'.*not the one that was labelled"):
        for _ in SoftLabelLoader(source, digits / "store", **reader):
            pass


class Arrays(Dataset[tuple[np.ndarray, int]]):
    """A user's dataset of decoded images; counts how often each was read."""

    def __init__(self, count: int, sizes: tuple[int, ...] = (16,)) -> None:
        self.count, self.sizes, self.reads = count, sizes, Counter[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        self.reads[index] += 1
        size = self.sizes[index % len(self.sizes)]
        return np.full((size, size, 3), index, dtype=np.uint8), index % 3


def test_a_dataset_of_ones_own_is_joined_by_its_keys_and_decoded_once(tmp_path: Path) -> None:
    logits_NC = draw_logits(20, 3)
    order = np.random.default_rng(0).permutation(20)
    write_logits(tmp_path / "store", [f"sample {i}" for i in order], logits_NC[order], temperature=1)
    mine = Arrays(20)
    loader = SoftLabelLoader(mine, tmp_path / "store", batch_size=6, key_fn=lambda index: f"sample {index}")
    already = Counter(mine.reads)
    for _ in range(3):
        for batch in loader:
            for image, key, target in zip(batch.inputs, batch.keys, batch.target.scaled_logits, strict=True):
                number = int(image[0, 0, 0])
                assert key == f"sample {number}"
                expected = torch.from_numpy(logits_NC[number] - logits_NC[number].max())
                assert torch.allclose(target.float(), expected, atol=0.02)
    assert max((mine.reads - already).values()) == 1


@pytest.mark.parametrize("network", ["teacher", "student"])
def test_images_of_several_sizes_need_a_size(tmp_path: Path, network: str) -> None:
    images = Arrays(8, sizes=(16, 20))
    spec = "python:tests.support.students:build_smooth_student?num_classes=3&mean=0&std=1"
    use = {
        "student": lambda: list(SoftLabelLoader(images, batch_size=4, shuffle=False)),
        "teacher": lambda: softlabel.generate(
            images, teachers=[spec], out=tmp_path / "store", preflight=False, device="cpu"
        ),
    }[network]
    sizes = "expected 16 x 16 pixels like those before it, found 20 x 20 pixels"
    remedy = f"give the {network} the size that it needs, such as .*resize="
    with pytest.raises(DataError, match=f"sample '1': {sizes}; {remedy}"):
        use()


def test_classes_that_are_not_those_of_the_store_are_refused(digits: Path, tmp_path: Path) -> None:
    images, labels = make_digit_jpegs()
    fewer = write_parquet(tmp_path / "a.parquet", images[:5], keys=keys_of(5), labels=[0] * 5, class_names=DIGITS[:9])
    with pytest.raises(MismatchError, match=r"the store has 10, .* has 9"):
        SoftLabelLoader(fewer, digits / "store")
    assert SoftLabelLoader(fewer, digits / "store", ignore_labels=True).num_samples == 5
    turned = write_parquet(
        tmp_path / "b.parquet", images[:5], keys=keys_of(5), labels=labels[:5], class_names=DIGITS[::-1]
    )
    with pytest.raises(MismatchError, match="in another order; class 0 is '0' in the store and '9'"):
        SoftLabelLoader(turned, digits / "store")


def test_labels_may_be_absent(digits: Path, tmp_path: Path) -> None:
    images, _ = make_digit_jpegs()
    source = write_parquet(tmp_path / "unlabelled.parquet", images[:ROWS], keys=keys_of(ROWS))
    batch = next(iter(SoftLabelLoader(source, digits / "store", batch_size=50)))
    assert (batch.labels == -100).all()
    assert batch.target.num_classes == 10
    hard = next(iter(SoftLabelLoader(digits / "data.parquet", batch_size=50)))
    assert hard.target is None
    assert (hard.labels >= 0).all()
    assert (hard.rows == -1).all()


# ---- the order ----


def test_batches_do_not_depend_on_workers_or_cache(digits: Path) -> None:
    def batches(**settings: Any) -> list[Batch]:
        loader = SoftLabelLoader(
            digits / "data.parquet", digits / "store", batch_size=16, seed=4, augment=CropFlip(), **settings
        )
        found = [batch for _ in range(2) for batch in loader]
        loader.close()
        return found

    reference = batches()
    assert not torch.equal(reference[0].inputs, reference[6].inputs)
    for settings in (*READERS, {"workers": 2, "cache_mb": 0}, {"cache_mb": 0}):
        assert all(same(one, other) for one, other in zip(reference, batches(**settings), strict=True))


@by_each_reader
def test_any_step_of_any_epoch_can_be_reached(digits: Path, reader: dict[str, Any]) -> None:
    def loader() -> SoftLabelLoader:
        return SoftLabelLoader(digits / "data.parquet", digits / "store", batch_size=16, augment=CropFlip(), **reader)

    whole = loader()
    epochs = [list(whole) for _ in range(3)]
    assert len(epochs[0]) == len(whole) == 6
    assert epochs[0][0].keys != epochs[1][0].keys
    jumper = loader()
    for epoch, step in [(2, 3), (0, 5), (1, 0), (1, 6)]:
        jumper.set_epoch(epoch, step)
        assert [batch.keys for batch in jumper] == [batch.keys for batch in epochs[epoch][step:]]
    resumed, stopped = loader(), loader()
    stopped.set_epoch(1)
    for step, batch in enumerate(stopped):
        assert same(batch, epochs[1][step])
        if step == 2:
            break
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed)
    assert len(rest) == 3
    assert all(same(one, other) for one, other in zip(rest, epochs[1][3:], strict=True))
    assert resumed.epoch == 2
    # The iteration after one that was left is of the next epoch.
    assert next(iter(stopped)).keys == epochs[2][0].keys
    for one in (whole, jumper, resumed, stopped):
        one.close()


def test_a_state_resumes_with_another_batch_size_and_only_where_it_belongs(digits: Path, tmp_path: Path) -> None:
    def loader(**settings: int) -> SoftLabelLoader:
        return SoftLabelLoader(digits / "data.parquet", digits / "store", **{"batch_size": 30, **settings})

    def keys(batches: SoftLabelLoader) -> list[str]:
        return [key for batch in batches for key in batch.keys]

    first, expected = loader(), keys(loader())
    next(iter(first))
    state = first.state_dict()
    finer = loader(batch_size=10)
    finer.load_state_dict(state)
    assert keys(finer) == expected[30:]
    other = loader(batch_size=40)
    other.load_state_dict(state)
    assert [len(batch) for batch in other] == [40, 20]
    other.load_state_dict(state)
    assert keys(other) == expected[30:]
    with pytest.raises(MismatchError, match="seed: 0 in the state, 1 here"):
        loader(seed=1).load_state_dict(state)
    with pytest.raises(MismatchError, match=r"store: '.*' in the state, '' here"):
        SoftLabelLoader(digits / "data.parquet", batch_size=30).load_state_dict(state)
    with pytest.raises(MismatchError, match="samples: 90 in the state, 80 here"):
        SoftLabelLoader(f"{digits / 'data.parquet'}?rows=0:80", digits / "store").load_state_dict(state)
    with pytest.raises(MismatchError, match="order: 'shuffled' in the state, 'in order' here"):
        loader(shuffle=False).load_state_dict(state)
    with pytest.raises(MismatchError, match="expected sample 0 to 90"):
        loader().load_state_dict({**state, "sample": 91})


@pytest.mark.parametrize(
    ("tail", "sizes"), [("keep", [40, 40, 10]), ("drop", [40, 40]), ("pad", [40, 40, 40])], ids=lambda value: str(value)
)
def test_the_tail_is_kept_dropped_or_padded(digits: Path, tail: str, sizes: list[int]) -> None:
    loader = SoftLabelLoader(digits / "data.parquet", digits / "store", batch_size=40, tail=tail)
    batches = list(loader)
    assert [len(batch) for batch in batches] == sizes
    assert len(loader) == len(sizes)
    assert batches[0].weight is None
    if tail == "pad":
        assert batches[-1].weight.tolist() == [1.0] * 10 + [0.0] * 30
        assert set(batches[-1].keys[10:]) <= set(batches[-1].keys[:10])
    else:
        assert batches[-1].weight is None


def test_the_source_s_own_order_without_shuffle(digits: Path) -> None:
    loader = SoftLabelLoader(digits / "data.parquet", digits / "store", batch_size=32, shuffle=False)
    assert [key for batch in loader for key in batch.keys] == keys_of(ROWS)


def test_global_randomness_is_left_alone(digits: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    loader = SoftLabelLoader(digits / "data.parquet", digits / "store", workers=1)
    list(loader)
    loader.close()
    assert torch.equal(torch.rand(1), expected)


@by_each_reader
def test_an_image_that_cannot_be_read_is_named(digits: Path, tmp_path: Path, reader: dict[str, Any]) -> None:
    images, labels = make_digit_jpegs()
    broken = [*images[:9], images[9][:100]]
    source = write_parquet(tmp_path / "a.parquet", broken, keys=keys_of(10), labels=labels[:10], class_names=DIGITS)
    with pytest.raises(DataError, match=r"sample 'digits/0009.jpg': "):
        list(SoftLabelLoader(source, batch_size=4, **reader))


class Recorded(CropFlip):
    """Records which thread makes a batch."""

    threads: ClassVar[list[str]] = []

    def __call__(self, *given: Any, **named: Any) -> torch.Tensor:
        self.threads.append(threading.current_thread().name)
        return super().__call__(*given, **named)


def test_the_next_batch_is_made_while_one_is_used_but_not_by_the_user_s_dataset() -> None:
    class Owned(Arrays):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            assert threading.current_thread() is threading.main_thread()
            return super().__getitem__(index)

    loader = SoftLabelLoader(Owned(20), batch_size=4, pin_memory=True, augment=Recorded())
    list(loader)  # reads and caches every image
    assert Recorded.threads == ["MainThread"] * 5
    Recorded.threads.clear()
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 60
    while len(Recorded.threads) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(Recorded.threads) == 2
    assert all(name.startswith("softlabel-batch") for name in Recorded.threads)
    assert len(list(batches)) == 4


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    import os
    import signal

    class Deadly(Arrays):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            if index == 11 and os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    parent = os.getpid()
    with pytest.raises(DataError, match="a loader process died"):
        list(SoftLabelLoader(Deadly(20), batch_size=4, workers=1))


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [
        ("batch_size", "100", r"'100' \(str\)"),
        ("batch_size", 2.0, "2.0"),
        ("batch_size", True, "True"),
        ("workers", "1", "'1'"),
        ("world_size", None, "nothing|None"),
    ],
)
def test_what_is_no_whole_number_is_refused_in_one_line(option: str, value: object, found: str) -> None:
    with pytest.raises(UsageError, match=rf"^{option}: expected a whole number, found {found}"):
        SoftLabelLoader(Arrays(4), **{option: value})  # type: ignore[arg-type]


def test_whole_numbers_are_looked_up_as_their_digits(tmp_path: Path) -> None:
    store = write_logits(tmp_path / "store", ["5", "17", "x"], draw_logits(3, 3))
    for keys in ([17, 5], np.array([17, 5]), ["17", 5], np.array([17, 5], dtype=object)):
        assert store.lookup(keys).tolist() == [1, 0]
    with pytest.raises(UsageError, match=r"expected a list of keys, found the string '17'; pass \['17'\]"):
        store.lookup("17")
    for wrong in ([17.0], [True], [None]):
        with pytest.raises(DataError, match="key"):
            store.lookup(wrong)


def test_a_batch_reads_like_a_dict_and_its_keys_like_a_tuple() -> None:
    loader = SoftLabelLoader(Arrays(3), batch_size=3, shuffle=False)
    (batch,) = loader
    assert batch["inputs"] is batch.inputs
    assert ("labels" in batch, "target" in batch, "nothing" in batch) == (True, False, False)
    with pytest.raises(KeyError, match="nothing"):
        batch["nothing"]
    keys = ("0", "1", "2")
    assert (batch.keys, repr(batch.keys), hash(batch.keys)) == (keys, repr(keys), hash(keys))
    assert batch.keys + batch.keys == keys * 2
    assert batch.keys[1:] == keys[1:]
    alone = loader.dataset[2]
    assert (alone.keys, alone.labels.tolist()) == (("2",), [2])
    assert torch.equal(alone.inputs, batch.inputs[2:])
