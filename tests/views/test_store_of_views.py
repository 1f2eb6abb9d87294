"""Stores whose rows are views: against plain Pillow and torchvision, over their life, and what must be noticed."""

import dataclasses
import io
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as plain

import softlabel
from softlabel.errors import MismatchError, StoreCorruptError, UsageError
from softlabel.maintain.extend import extend
from softlabel.maintain.repair import repair
from softlabel.models import build_model
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import Run
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer, write_shard
from softlabel.training import TrainConfig, train
from softlabel.views import parse_policy
from tests.support import format_reader
from tests.support.commands import run_softlabel
from tests.support.datasets import CLASSES, make_jpeg, write_parquet
from tests.support.processes import start_softlabel
from tests.support.stores import read_files
from tests.support.teachers import make_pixel_teacher_spec, read_pixels, write_teacher

KEYS = [f"image-{number:05d}.jpg" for number in range(45)]


def sized_jpeg(number: int) -> bytes:
    """Images of different sizes."""
    image = Image.open(io.BytesIO(make_jpeg(number, 64))).resize((40 + number % 7, 36 + number % 5))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_of(tmp_path_factory.mktemp("views"), 45)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "t.safetensors")


def data_of(folder: Path, count: int) -> Path:
    labels = [number % len(CLASSES) for number in range(count)]
    return write_parquet(folder / "d.parquet", [make_jpeg(number) for number in range(count)], labels=labels)


def generate(data: Path, out: Path, teacher: str, augment: str, views: int, **options: object) -> Store:
    settings: dict[str, object] = {"shard_rows": 20, "batch_size": 16, "progress": False, **options}
    softlabel.generate(data, teachers=[teacher], out=out, augment=augment, views=views, **settings)  # type: ignore[arg-type]
    return open_store(out, verify="full")


def decoded(raw: bytes) -> Image.Image:
    return Image.open(io.BytesIO(raw)).convert("RGB")


def all_rows(store: Store) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    rows = store.take(range(len(store)))
    names = [column.name for column in store.run.columns]
    return {
        (key, view): {name: rows.columns[name][place] for name in names}
        for place, (key, view) in enumerate(zip(rows.keys, rows.views.tolist(), strict=True))
    }


def test_stored_boxes_give_the_teachers_pixels_in_pillow_and_torchvision(tmp_path: Path) -> None:
    images = [sized_jpeg(number) for number in range(12)]
    source = write_parquet(tmp_path / "d.parquet", images)
    store = generate(
        source, tmp_path / "s", make_pixel_teacher_spec(24), "inception?size=24", 3, encoding="float32", temperature=1.0
    )
    rows = store.take(range(len(store)))
    seen = read_pixels(rows.scaled_logits, 24)
    for place, (key, box, flip) in enumerate(
        zip(rows.keys, rows.columns["view_box"].tolist(), rows.columns["view_flip"][:, 0].tolist(), strict=True)
    ):
        image, (top, left, height, width) = decoded(images[KEYS.index(key)]), box
        cut = image.crop((left, top, left + width, top + height)).resize((24, 24), Image.Resampling.BILINEAR)
        expected = np.asarray(ImageOps.mirror(cut) if flip else cut).transpose(2, 0, 1)
        np.testing.assert_array_equal(seen[place], expected)
        theirs = plain.resized_crop(image, top, left, height, width, [24, 24], InterpolationMode.BILINEAR)
        np.testing.assert_array_equal(
            seen[place], np.asarray(plain.hflip(theirs) if flip else theirs).transpose(2, 0, 1)
        )
        assert 0.08 * 0.9 < height * width / (image.width * image.height) <= 1
        assert 0.7 < width / height < 1.4
    assert 0.2 < rows.columns["view_flip"].mean() < 0.8


def test_crop_flip_boxes_are_a_plain_pad_crop_and_mirror(data: Path, tmp_path: Path) -> None:
    store = generate(
        data,
        tmp_path / "s",
        make_pixel_teacher_spec(32),
        "crop-flip",
        2,
        encoding="float32",
        temperature=1.0,
        ignore_labels=True,
    )
    rows = store.take(range(len(store)))
    seen = read_pixels(rows.scaled_logits, 32)
    for place, key in enumerate(rows.keys):
        padded = ImageOps.expand(decoded(make_jpeg(KEYS.index(key))), 4)
        top, left, height, width = (rows.columns["view_box"][place] + [4, 4, 0, 0]).tolist()
        cut = padded.crop((left, top, left + width, top + height))
        cut = ImageOps.mirror(cut) if rows.columns["view_flip"][place, 0] else cut
        np.testing.assert_array_equal(seen[place], np.asarray(cut).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_mixed_label_is_the_teachers_answer_to_the_mixed_image(
    kind: str, data: Path, teacher: str, tmp_path: Path
) -> None:
    store = generate(data, tmp_path / "s", teacher, f"crop-flip+{kind}?alpha=1.0", 2)
    rows = store.take(range(len(store)))
    said = rows.columns
    by_hash = {xxhash.xxh3_128_intdigest(key.encode()): number for number, key in enumerate(KEYS)}

    def view(number: int, box: np.ndarray, flip: int) -> np.ndarray:
        top, left, height, width = (box + np.array([4, 4, 0, 0])).tolist()
        cut = ImageOps.expand(decoded(make_jpeg(number)), 4).crop((left, top, left + width, top + height))
        return np.asarray(ImageOps.mirror(cut) if flip else cut).astype(np.float64)

    mixed, partners = [], set()
    for place, key in enumerate(rows.keys):
        low, high = said["view_partner"][place].tolist()
        partner = by_hash[low + (high << 64)]
        partners.add((KEYS.index(key), partner))
        mine = view(KEYS.index(key), said["view_box"][place], said["view_flip"][place, 0])
        other = view(partner, said["view_partner_box"][place], said["view_partner_flip"][place, 0])
        weight = float(said["view_weight"][place, 0])
        if kind == "mixup":
            one = np.floor(weight * mine + (1 - weight) * other + 0.5)
        else:
            top, left, height, width = said["view_paste"][place].tolist()
            one = mine.copy()
            one[top : top + height, left : left + width] = other[top : top + height, left : left + width]
            assert weight == pytest.approx(1 - height * width / 1024)
        mixed.append(one.astype(np.uint8))
        assert xxhash.xxh3_64_intdigest(mixed[-1].tobytes()) == said["view_xxh3"][place, 0]
    assert len(partners) > 60
    model = build_model(teacher).eval()
    mean, std = (torch.tensor(store.run.members[0].preprocessing[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        logits = model((torch.from_numpy(np.stack(mixed)).permute(0, 3, 1, 2) / 255 - mean) / std) / 4
    expected = (logits - logits.amax(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(rows.scaled_logits, expected, rtol=2e-3, atol=2e-3)
    # The hard label of one image is not that of a mix of two.
    loader = softlabel.SoftLabelLoader(data, store, batch_size=45, check_views=1)
    assert all((batch.labels == -100).all() for batch in loader)


def test_views_are_added_and_samples_too(data: Path, teacher: str, tmp_path: Path) -> None:
    whole = all_rows(generate(data, tmp_path / "whole", teacher, "crop-flip+mixup", 8))
    generate(data, tmp_path / "s", teacher, "crop-flip+mixup", 4)
    before = {name: raw for name, raw in read_files(tmp_path / "s").items() if name.startswith("shards/")}
    summary = softlabel.generate(
        data,
        teachers=[teacher],
        out=tmp_path / "s",
        augment="crop-flip+mixup",
        views=8,
        shard_rows=20,
        batch_size=16,
        progress=False,
    )
    assert (summary.images, summary.total_rows) == (4 * 45, 8 * 45)
    after = read_files(tmp_path / "s")
    assert before.items() <= after.items()
    assert verify_store(tmp_path / "s").ok
    grown = open_store(tmp_path / "s")
    found = all_rows(grown)
    assert found.keys() == whole.keys()
    for key, columns in found.items():
        for name, array in columns.items():
            np.testing.assert_array_equal(array, whole[key][name])
    alone = format_reader.read_store(str(tmp_path / "s"))
    assert set(zip(alone["key"], alone["view"].tolist(), strict=True)) == whole.keys()
    # Fewer views than there are, and other ones, are refused.
    with pytest.raises(MismatchError, match="has 8 views"):
        generate(data, tmp_path / "s", teacher, "crop-flip+mixup", 4)
    with pytest.raises(MismatchError, match="view policy"):
        generate(data, tmp_path / "s", teacher, "crop-flip", 9)
    # More samples, then more of both at once; old views stay what they were.
    table = pq.read_table(data_of(tmp_path, 50))
    for rows, views in ((45, 8), (48, 8), (50, 10)):
        pq.write_table(table.slice(0, rows), tmp_path / f"{rows}.parquet")
        out = tmp_path / "grown"
        store = generate(tmp_path / f"{rows}.parquet", out, teacher, "crop-flip+mixup", views, grow=True)
        assert len(store) == rows * views
    for (key, view), columns in all_rows(store).items():
        if (key, view) in whole:
            assert columns["view_xxh3"] == whole[key, view]["view_xxh3"]


def test_a_kill_while_views_are_added_costs_a_shard(data: Path, teacher: str, tmp_path: Path) -> None:
    whole = all_rows(generate(data, tmp_path / "whole", teacher, "crop-flip", 8, shard_rows=9))
    generate(data, tmp_path / "s", teacher, "crop-flip", 2, shard_rows=9)
    arguments = ["--data", data, "--teacher", teacher, "--out", tmp_path / "s", "--views", 8, "--augment", "crop-flip"]
    process = start_softlabel("generate", *arguments, "--shard-rows", 9, "--batch-size", 16)
    while process.poll() is None and len(list((tmp_path / "s" / "shards").glob("[0-9]*"))) < 14:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not open_store(tmp_path / "s", allow_incomplete=True).manifest.complete
    with pytest.raises(MismatchError, match="has 8 views"):
        generate(data, tmp_path / "s", teacher, "crop-flip", 9, shard_rows=9)
    store = generate(data, tmp_path / "s", teacher, "crop-flip", 8, shard_rows=9)
    found = all_rows(store)
    assert found.keys() == whole.keys()
    assert all(np.array_equal(found[key]["view_xxh3"], whole[key]["view_xxh3"]) for key in whole)


def forged(
    store: Store,
    out: Path,
    change: Callable[[Run], Run],
    edit: Callable[[dict[str, np.ndarray]], None],
    **notes: object,
) -> Store:
    """A whole, well-formed store that says other things of its rows than are true."""
    run = change(store.run)
    with Committer.open(out, run, {**store.manifest.recorded, **notes}) as committer:
        start = 0
        for plan, record in zip(run.plan(), store.shards, strict=True):
            rows = store.take(range(start, start + record.rows))
            columns = {name: np.array(array) for name, array in rows.columns.items()}
            edit(columns)
            kept = Rows(keys=rows.keys, labels=rows.labels, content=rows.content, columns=columns)
            committer.commit(write_shard(out, run, plan, kept))
            start += record.rows
        committer.finish()
    return open_store(out, verify="full")


def same(run: Run) -> Run:
    return run


def nothing(columns: dict[str, np.ndarray]) -> None:
    pass


def with_views(**changes: object) -> Callable[[Run], Run]:
    return lambda run: dataclasses.replace(run, views=dataclasses.replace(run.views, **changes))  # type: ignore[arg-type]


def flip_one(columns: dict[str, np.ndarray]) -> None:
    columns["view_flip"][3] ^= 1


def move_one(columns: dict[str, np.ndarray]) -> None:
    box = columns["view_box"][3]
    box[0] += 1 if box[0] < 4 else -1


def lie(columns: dict[str, np.ndarray]) -> None:
    columns["view_xxh3"][3] ^= 1


def test_whatever_changes_a_view_is_noticed(data: Path, teacher: str, tmp_path: Path) -> None:
    listed = tmp_path / "list.yaml"
    listed.write_text("- RandomRotation: {degrees: 40}\n- RandomHorizontalFlip\n- RandomPosterize: {bits: 3, p: 0.8}\n")
    boxes = generate(data, tmp_path / "boxes", teacher, "crop-flip", 2)
    drawn = generate(data, tmp_path / "drawn", teacher, str(listed), 2)
    reordered = dict(drawn.run.views.policy)
    reordered["steps"] = [drawn.run.views.policy["steps"][number] for number in (2, 1, 0)]
    cases: dict[str, tuple[Store, Callable[[Run], Run], Callable[[dict[str, np.ndarray]], None]]] = {
        "flip": (boxes, same, flip_one),
        "box": (boxes, same, move_one),
        "digest": (boxes, same, lie),
        "seed": (drawn, with_views(seed=1), nothing),
        "order": (drawn, with_views(policy=reordered), nothing),
    }
    for name, (store, change, edit) in cases.items():
        other = forged(store, tmp_path / name, change, edit, libraries={"Pillow": "1.2.3", "torchvision": "9"})
        loader = softlabel.SoftLabelLoader(data, other, batch_size=16, check_views=1)
        with pytest.raises(
            MismatchError, match=r"has other pixels than the teacher saw.*Pillow is .* now, 1\.2\.3 when"
        ):
            list(loader)
        # Not asked for, not compared; and the first row of every process always is, where it is asked for at all.
        assert list(softlabel.SoftLabelLoader(data, other, batch_size=16, check_views=0))
    # What is changed in none is noticed in none.
    assert (
        len(list(softlabel.SoftLabelLoader(data, forged(boxes, tmp_path / "true", same, nothing), check_views=1))) == 1
    )


def test_a_run_goes_on_only_with_libraries_that_give_the_same_pixels(data: Path, teacher: str, tmp_path: Path) -> None:
    store = generate(data, tmp_path / "s", teacher, "crop-flip", 2)

    def lie_everywhere(columns: dict[str, np.ndarray]) -> None:
        columns["view_xxh3"] ^= 1

    forged(store, tmp_path / "f", same, lie_everywhere, libraries={"Pillow": "1.2.3"})
    with pytest.raises(MismatchError, match=r"cannot be reproduced.*Pillow is .* now, 1\.2\.3 when"):
        generate(data, tmp_path / "f", teacher, "crop-flip", 3)


def test_members_get_the_whole_view(tmp_path: Path) -> None:
    """Where views have one size, a member with another crop sees the view resized, not cut once more."""
    images = [sized_jpeg(number) for number in range(8)]
    source = write_parquet(tmp_path / "d.parquet", images)
    options = {"encoding": "float32", "temperature": 1.0}
    teacher = make_pixel_teacher_spec(16, "&resize=20&crop=16")
    store = generate(source, tmp_path / "s", teacher, "inception?size=24", 1, **options)
    rows = store.take(range(len(store)))
    seen = read_pixels(rows.scaled_logits, 16)
    for place, key in enumerate(rows.keys):
        top, left, height, width = rows.columns["view_box"][place].tolist()
        image = decoded(images[KEYS.index(key)]).crop((left, top, left + width, top + height))
        image = image.resize((24, 24), Image.Resampling.BILINEAR)
        image = ImageOps.mirror(image) if rows.columns["view_flip"][place, 0] else image
        view = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        expected = plain.resize(view, [16, 16], InterpolationMode.BILINEAR, antialias=True)
        assert np.abs(seen[place].astype(int) - expected.numpy().astype(int)).max() <= 1
    # A policy that leaves sizes alone is followed by the member's own resize and crop.
    store = generate(source, tmp_path / "t", teacher, "RandomHorizontalFlip?p=1.0", 1, **options)
    rows = store.take(range(len(store)))
    for place, (key, pixels) in enumerate(zip(rows.keys, read_pixels(rows.scaled_logits, 16), strict=True)):
        image = torch.from_numpy(np.asarray(ImageOps.mirror(decoded(images[KEYS.index(key)]))).copy()).permute(2, 0, 1)
        expected = plain.center_crop(plain.resize(image, [20], antialias=True), [16, 16])
        assert np.abs(pixels.astype(int) - expected.numpy().astype(int)).max() <= 1, place


def test_stores_out_of_stores_keep_what_views_are(data: Path, teacher: str, tmp_path: Path) -> None:
    from softlabel.convert import combine_store, convert_store, export_store, merge_stores

    other = write_teacher(tmp_path / "o.safetensors", seed=1)
    softlabel.generate(
        data,
        teachers=[teacher],
        out=tmp_path / "kept",
        augment="crop-flip+cutmix",
        views=2,
        combine="keep",
        progress=False,
    )
    said = all_rows(open_store(tmp_path / "kept"))
    extend(tmp_path / "kept", teacher=other, progress=False)
    combine_store(tmp_path / "kept", tmp_path / "mixed", weights=[1, 3], temperature=2.0, progress=False)
    convert_store(tmp_path / "mixed", tmp_path / "int8", encoding="int8", format="hdf5", progress=False)
    second = tmp_path / "e.parquet"
    write_parquet(second, [make_jpeg(number) for number in range(100, 110)], keys=list("abcdefghij"), labels=[0] * 10)
    for name, source in (("one", data), ("two", second)):
        generate(source, tmp_path / name, teacher, "crop-flip+cutmix", 2)
    merge_stores([tmp_path / "one", tmp_path / "two"], tmp_path / "merged", progress=False)
    for name in ("kept", "mixed", "int8", "merged"):
        assert verify_store(tmp_path / name).ok
        store = open_store(tmp_path / name)
        assert store.manifest.format_version == (2 if name == "int8" else 6)
        found = all_rows(store)
        for key, columns in said.items():
            for column in store.run.view_columns:
                np.testing.assert_array_equal(found[key][column.name], columns[column.name])
        if name != "merged":
            assert len(list(softlabel.SoftLabelLoader(data, store, batch_size=45, check_views=1))) == 1
    export_store(tmp_path / "mixed", tmp_path / "hf", to="hf", progress=False)
    export_store(tmp_path / "mixed", tmp_path / "mixed.npz", to="npz", progress=False)
    table = pq.read_table(tmp_path / "hf" / "data")
    with np.load(tmp_path / "mixed.npz") as arrays:
        for place, (key, view) in enumerate(zip(table["key"].to_pylist(), table["view"].to_pylist(), strict=True)):
            assert table["view_xxh3"][place].as_py() == said[key, view]["view_xxh3"][0]
            assert table["view_box"][place].as_py() == said[key, view]["view_box"].tolist()
            assert arrays["view_partner"][place].tolist() == said[key, view]["view_partner"].tolist()


def test_repair_draws_the_same_views(data: Path, teacher: str, tmp_path: Path) -> None:
    store = generate(data, tmp_path / "s", teacher, "trivial+mixup", 2)
    before = all_rows(store)
    victim = tmp_path / "s" / store.shards[3].file
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    repair(tmp_path / "s", progress=False)
    after = all_rows(open_store(tmp_path / "s", verify="full"))
    for key, columns in before.items():
        for name, array in columns.items():
            np.testing.assert_array_equal(after[key][name], array)


def test_values_that_no_view_has_are_damage(data: Path, teacher: str, tmp_path: Path) -> None:
    store = generate(data, tmp_path / "s", teacher, "crop-flip+mixup", 1)

    def impossible(columns: dict[str, np.ndarray]) -> None:
        columns["view_flip"][0] = 7

    with pytest.raises(StoreCorruptError, match="`view_flip` is out of range"):
        forged(store, tmp_path / "f", same, impossible)


def test_an_image_without_a_row_is_a_view_too(data: Path, teacher: str, tmp_path: Path) -> None:
    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(data).slice(0, 30), few)
    store = generate(few, tmp_path / "s", teacher, "crop-flip", 2)
    loader = softlabel.SoftLabelLoader(
        data, store, batch_size=45, missing="hard-only", check_views=1, view_order="random"
    )
    (batch,) = loader
    assert batch.has_target is not None
    assert int(batch.has_target.sum()) == 30
    assert (batch.labels >= 0).all()
    mixed = generate(few, tmp_path / "m", teacher, "mixup", 1)
    pq.write_table(pq.read_table(data).slice(0, 10), tmp_path / "fewer.parquet")
    with pytest.raises(MismatchError, match="was mixed with one that is not among these"):
        list(softlabel.SoftLabelLoader(tmp_path / "fewer.parquet", mixed))


@pytest.mark.parametrize("steps", ["- crop-flip\n- RandomCrop: {size: 20}\n", "- RandomCrop: {size: 20}\n"])
def test_an_image_of_which_there_is_no_view_leaves_the_others_theirs(teacher: str, tmp_path: Path, steps: str) -> None:
    (tmp_path / "steps.yaml").write_text(steps)
    images = [make_jpeg(number) for number in range(12)]
    whole = write_parquet(tmp_path / "whole.parquet", images)
    small = write_parquet(tmp_path / "small.parquet", [*images[:5], make_jpeg(5, size=12), *images[6:]])
    expected = all_rows(generate(whole, tmp_path / "a", teacher, str(tmp_path / "steps.yaml"), 2))
    store = generate(small, tmp_path / "b", teacher, str(tmp_path / "steps.yaml"), 2)
    ((key, reason),) = store.bad.items()
    assert key == "image-00005.jpg"
    assert "RandomCrop" in reason
    found = all_rows(store)
    assert found.keys() == {row for row in expected if row[0] != key}
    for row, columns in found.items():
        for name, values in columns.items():
            np.testing.assert_allclose(values, expected[row][name], atol=2e-3 if name == "logits" else 0, err_msg=name)


def test_training_replays_and_refuses_another_augmentation(data: Path, teacher: str, tmp_path: Path) -> None:
    generate(data, tmp_path / "s", teacher, "crop-flip", 2)
    settings: dict[str, object] = {
        "data": str(data),
        "labels": str(tmp_path / "s"),
        "student": "zoo:resnet8",
        "epochs": 2,
        "batch_size": 16,
        "tensorboard": False,
        "progress": False,
    }
    train(TrainConfig(out=str(tmp_path / "r"), check_views=1, **settings))  # type: ignore[arg-type]
    generate(data, tmp_path / "m", teacher, "mixup", 2)
    with pytest.raises(UsageError, match="mixed images"):
        train(TrainConfig(out=str(tmp_path / "p"), soft_weight=0.0, **{**settings, "labels": str(tmp_path / "m")}))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="another augmentation on top"):
        train(TrainConfig(out=str(tmp_path / "q"), augment="crop-flip", **settings))  # type: ignore[arg-type]
    found = softlabel.evaluate(f"run:{tmp_path / 'r'}", data, tmp_path / "s", progress=False)
    as_it_is = softlabel.evaluate(f"run:{tmp_path / 'r'}", data, progress=False)
    assert found.accuracy == as_it_is.accuracy
    assert found.with_teacher == 45


def test_views_that_are_added_while_a_run_is_interrupted_change_nothing_in_it(
    data: Path, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "s"
    generate(data, out, teacher, "crop-flip", 2)
    state = softlabel.SoftLabelLoader(data, out, batch_size=15).state_dict()
    settings: dict[str, object] = {"data": str(data), "labels": str(out), "student": "zoo:resnet8", "epochs": 3}
    settings |= {"batch_size": 15, "tensorboard": False, "progress": False}
    train(TrainConfig(out=str(tmp_path / "straight"), **settings))  # type: ignore[arg-type]
    original = softlabel.SoftLabelLoader.__iter__

    def interrupted(loader: softlabel.SoftLabelLoader):  # type: ignore[no-untyped-def]
        for step, batch in enumerate(original(loader)):
            if loader.epoch == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(softlabel.SoftLabelLoader, "__iter__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(out=str(tmp_path / "stopped"), **settings))  # type: ignore[arg-type]
    monkeypatch.undo()
    generate(data, out, teacher, "crop-flip", 3)
    with caplog.at_level(logging.INFO, "softlabel"):
        assert train(TrainConfig(out=str(tmp_path / "stopped"), **settings)).students[0].resumed_from == 1  # type: ignore[arg-type]
    assert "the store has 3 views now; this run keeps to the first 2" in caplog.text
    assert (tmp_path / "stopped/model.safetensors").read_bytes() == (
        tmp_path / "straight/model.safetensors"
    ).read_bytes()
    assert train(TrainConfig(out=str(tmp_path / "straight"), **settings)).students[0].already_done  # type: ignore[arg-type]
    # A loop of one's own: the loader refuses, and says how to go on.
    with pytest.raises(MismatchError, match=r"used 2 views .* SoftLabelLoader\(..., views=2\)"):
        softlabel.SoftLabelLoader(data, out, batch_size=15).load_state_dict(state)
    loader = softlabel.SoftLabelLoader(data, out, batch_size=45, views=2)
    loader.load_state_dict(state)
    used = open_store(out).views
    assert [int(used[next(iter(loader)).rows].max()) for _ in range(4)] == [0, 1, 0, 1]
    with pytest.raises(UsageError, match="views: expected 1 to 3"):
        softlabel.SoftLabelLoader(data, out, views=4)


def test_a_size_that_is_not_the_images_own_needs_no_other_data(data: Path, tmp_path: Path) -> None:
    """Images of different sizes, some of them broken: what has no view has no row, in any view."""
    images = [sized_jpeg(number) for number in range(20)]
    images[3] = images[3][: len(images[3]) // 2]
    images[7] = b"not an image"
    source = write_parquet(tmp_path / "d.parquet", images)
    store = generate(
        source,
        tmp_path / "s",
        make_pixel_teacher_spec(24),
        "inception?size=24+cutmix",
        2,
        encoding="float32",
        temperature=1.0,
    )
    assert len(store) == 36
    assert list(store.bad) == [KEYS[3], KEYS[7]]
    loader = softlabel.SoftLabelLoader(source, store, batch_size=18, check_views=1)
    for _ in range(2):
        (batch,) = loader
        rows = store.take(batch.rows.numpy())
        np.testing.assert_array_equal(batch.inputs.numpy(), read_pixels(rows.scaled_logits, 24))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nothing", "the name of a transform in torchvision.transforms.v2, found 'nothing'"),
        ("crop-flip?pading=3", "crop-flip has no option 'pading'; it has padding, flip"),
        ("crop-flip?padding=-1", "0 pixels or more"),
        ("crop-flip?padding=many", "padding cannot be 'many'"),
        ("inception?size=0", "size of 1 to"),
        ("inception?scale=[0.5]", "two numbers for scale"),
        ("trivial+crop-flip", "as the first step"),
        ("crop-flip+inception", "as the first step"),
        ("mixup+trivial", "as the last step"),
        ("mixup?alpha=0", "alpha above 0"),
        ("center+trivial", "center alone"),
        ("Lambda", "takes a function"),
        ("Normalize", "belongs to each teacher"),
        ("RandomRotation", "does not take"),
        ("RandomRotation?degree=3", "RandomRotation has no argument 'degree'; it has"),
        ("functional", "found 'functional'"),
        ("__class__", "found '__class__'"),
        ("missing.yaml", "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_policy(text)
    assert problem in str(caught.value)


@pytest.mark.parametrize("content", ["inception", "[1]", "- {a: 1, b: 2}", "- [: :", "- RandomApply: {transforms: 3}"])
def test_a_file_that_is_no_list_of_steps_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(UsageError):
        parse_policy(str(tmp_path / "p.yaml"))


def test_several_views_of_the_image_as_it_is_make_no_sense(data: Path, teacher: str, tmp_path: Path) -> None:
    done = run_softlabel(
        "generate", "--data", data, "--teacher", teacher, "--out", tmp_path / "s", "--views", 4, code=2
    )
    assert "the same label 4 times" in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_store_without_views_stays_what_it_was(data: Path, teacher: str, tmp_path: Path) -> None:
    store = generate(data, tmp_path / "s", teacher, "center", 1)
    assert [column.name for column in store.run.columns] == ["logits"]
