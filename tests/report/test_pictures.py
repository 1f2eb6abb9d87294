"""Thumbnails of samples by key: each kind of sample, and what stands in for one that cannot be read."""

import base64
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from softlabel import open_source
from softlabel.report.pictures import Picture, make_pictures
from tests.support.datasets import make_jpeg, write_parquet


def read_image(picture: Picture) -> Image.Image:
    kind, _, data = picture.data.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == f"data:image/{'jpeg' if picture.kind == 'image' else 'png'}"
    assert image.size == (picture.width, picture.height)
    return image


def test_images_are_small_in_the_asked_order_and_the_same_again(tmp_path: Path) -> None:
    files = [make_jpeg(1, 32), make_jpeg(2, 400), b"not an image"]
    source = open_source(str(write_parquet(tmp_path / "x.parquet", files, keys=["a", "b", "c"])))
    found = make_pictures(source, ["b", "nowhere", "a", "c", "a"])
    assert list(found) == ["b", "nowhere", "a", "c"]
    assert found == make_pictures(open_source(source.name), ["b", "nowhere", "a", "c"])
    assert (found["a"].width, found["b"].width) == (32, 96)
    expected = np.asarray(Image.open(io.BytesIO(files[0])), np.float64)
    assert np.abs(np.asarray(read_image(found["a"]), np.float64) - expected).mean() < 6
    assert (found["nowhere"].kind, found["nowhere"].data) == ("none", f"not in {source.name}")
    assert found["c"].kind == "none"
    assert "not an image" in found["c"].data


def test_many_images_share_a_budget(tmp_path: Path) -> None:
    keys = [f"{number:03d}" for number in range(60)]
    rng = np.random.default_rng(0)
    images = []
    for _ in keys:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (120, 160, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    source = open_source(str(write_parquet(tmp_path / "x.parquet", images, keys=keys)))
    found = make_pictures(source, keys, budget=150_000)
    assert sum(len(one.data) for one in found.values()) <= 150_000
    sizes = {read_image(one).size for one in found.values()}
    assert len(sizes) == 1
    assert max(sizes.pop()) < 96


def test_texts_are_shortened(tmp_path: Path) -> None:
    table = pa.table({"id": ["short", "long"], "text": ["a <b> c", "word " * 100]})
    pq.write_table(table, tmp_path / "t.parquet")
    found = make_pictures(open_source(f"{tmp_path}/t.parquet?text=text&key=id"), ["short", "long"])
    assert found["short"] == Picture(kind="text", data="a <b> c")
    assert len(found["long"].data) == 300
    assert found["long"].data.endswith("…")
    assert found["long"].note == "the first 299 of 500 characters"


def test_numbers_are_heat_maps_from_dark_to_light(tmp_path: Path) -> None:
    arrays = np.zeros((3, 4, 6), np.float32)
    arrays[0, 3, 5], arrays[1, 0, 0] = 2.0, -1.0
    np.savez(tmp_path / "x.npz", x=arrays, keys=np.array(["a", "b", "c"]))
    source = open_source(f"{tmp_path}/x.npz?inputs=x&keys=keys")
    found = make_pictures(source, ["a", "b", "c"])
    grey = {key: np.asarray(read_image(one).convert("L"), int) for key, one in found.items()}
    assert grey["a"].shape == (4, 6)
    assert np.unravel_index(grey["a"].argmax(), (4, 6)) == (3, 5)
    assert np.unravel_index(grey["b"].argmin(), (4, 6)) == (0, 0)
    assert len(set(grey["c"].ravel())) == 1
    assert found["a"].note == "4x6"
    vectors = np.arange(40, dtype=np.float32).reshape(1, 40)
    np.savez(tmp_path / "v.npz", x=vectors, keys=np.array(["v"]))
    vector = make_pictures(open_source(f"{tmp_path}/v.npz?inputs=x&keys=keys"), ["v"])["v"]
    pixels = np.asarray(read_image(vector).convert("RGBA"), int)
    assert (pixels[..., 3] > 0).sum() == 40  # the cells that no number fills are transparent


def test_bands_are_the_first_three_or_their_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for bands, note in ((6, "channels 1, 2, 3 of 6"), (2, "mean of 2 channels"), (1, "")):
        coarse = rng.integers(0, 65536, (2, bands, 2, 2)).astype(np.uint16)
        images = coarse.repeat(8, axis=2).repeat(8, axis=3)
        path = tmp_path / f"{bands}.npz"
        np.savez(path, x=images, keys=np.array(["a", "b"]))
        found = make_pictures(open_source(f"{path}?inputs=x&keys=keys&layout=channels-first"), ["b"])["b"]
        assert (found.kind, found.note, found.width) == ("image", note, 16)
        shown = (
            images[1, :3].astype(np.float64) if bands >= 3 else images[1].mean(axis=0, keepdims=True).repeat(3, axis=0)
        )
        expected = (shown - shown.min()) / (shown.max() - shown.min()) * 255
        assert np.abs(np.asarray(read_image(found), np.float64).transpose(2, 0, 1) - expected).mean() < 30
