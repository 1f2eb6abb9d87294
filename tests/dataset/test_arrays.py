"""Arrays and lists of files: what shapes, labels and keys they take, and what they refuse."""

import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xxhash
from torch.utils.data import IterableDataset

from softlabel.dataset import open_source
from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import IGNORE
from softlabel.inputs.image_decode import decode_image
from tests.support.datasets import make_jpeg

PIXELS = np.random.default_rng(1).integers(0, 256, (6, 7, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("stored", "expected"),
    {
        "grey": (PIXELS[..., 0], PIXELS[..., :1].repeat(3, 3)),
        "grey-last": (PIXELS[..., :1], PIXELS[..., :1].repeat(3, 3)),
        "grey-first": (PIXELS[..., 0][:, None], PIXELS[..., :1].repeat(3, 3)),
        "alpha": (np.concatenate([PIXELS, PIXELS[..., :1]], 3), PIXELS),
        "first": (PIXELS.transpose(0, 3, 1, 2), PIXELS),
        # Where both axes could be channels, the last one is.
        "both": (PIXELS[:, :3], PIXELS[:, :3]),
    }.values(),
)
def test_shapes(stored: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", stored)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = stored
    for name in ("a.npy", "a.h5"):
        images = [decode_image(one.raw).permute(1, 2, 0).numpy() for one in open_source(tmp_path / name).read(range(6))]
        np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (PIXELS.astype(np.float32), r"found float32; take the numbers as they are with '\?inputs=NAME', .*layout="),
        (PIXELS.astype(np.uint16), "found uint16; take the numbers as they are"),
        (PIXELS[0, 0], r"found \(5, 3\)"),
        (PIXELS[..., :2], r"found \(6, 7, 5, 2\)"),
        (np.array(["a"], dtype=object), "Object arrays|object"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, reason: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", images=array, allow_pickle=True)
    for name in ("a.npy", "a.npz"):
        with pytest.raises((DataError, SpecError), match=reason):
            open_source(tmp_path / name)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i1", ">i2", "<f4", ">f8", "<f2"])
def test_bands_of_every_type_and_byte_order(dtype: str, tmp_path: Path) -> None:
    whole = np.random.default_rng(2).integers(0, 120, (3, 5, 4, 6))
    bands = (whole * (500 if dtype[1:] == "u2" else 1)).astype(dtype)
    np.savez(tmp_path / "a.npz", x=bands)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = bands
    expected = bands.astype(np.float64) / (65535 if dtype[1:] == "u2" else 1)
    for name in ("a.npz", "a.h5"):
        source = open_source(f"{tmp_path / name}?inputs=x&layout=channels-first")
        found = [source.inputs.decode(sample) for sample in source.read(range(3))]
        np.testing.assert_array_equal(np.stack([item.numpy() for item, _ in found]), expected.astype(np.float32))
        assert found[0][0].dtype == (torch.uint8 if dtype == "u1" else torch.float32)
        # The hash is of the little-endian bytes, as FORMAT.md says.
        plain = np.ascontiguousarray(bands[0].astype(bands.dtype.newbyteorder("<")))
        seed = xxhash.xxh3_64_intdigest(f"{plain.dtype.str} 5x4x6".encode())
        assert found[0][1] == xxhash.xxh3_64_intdigest(plain.tobytes(), seed) & ~0xFFFF | 0x7870


COMPOUND = np.array([(1, 2.0)] * 6, dtype=[("day", "<i4"), ("rain", "<f4")])


@pytest.mark.parametrize("suffix", ["npz", "h5"])
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("inputs=label", "label: expected an array of numbers .* found a compound type of day, rain of shape"),
        ("images=label", "label: expected uint8 pixels"),
        (
            "inputs=wide&layout=channels-first",
            "wide: expected images of uint8, uint16, int8, int16 or floats, found int",
        ),
        ("inputs=x", None),
    ],
)
def test_types_that_are_no_samples(suffix: str, words: str, reason: str | None, tmp_path: Path) -> None:
    arrays = {"label": COMPOUND, "x": np.ones((6, 2), np.float32), "wide": np.ones((6, 2, 2, 2), np.int32)}
    if suffix == "npz":
        np.savez(tmp_path / "a.npz", **arrays)
    else:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.update(arrays)
    if reason is None:  # an array of another type beside the samples is no label
        assert not open_source(f"{tmp_path}/a.{suffix}?{words}").has_labels
        return
    with pytest.raises(SpecError, match=reason):
        open_source(f"{tmp_path}/a.{suffix}?{words}")


def test_a_compressed_array_is_not_unpacked_to_open_it(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1 << 18, 16), np.float32), y=np.arange(1 << 18) % 3)
    tracemalloc.start()
    try:
        source = open_source(f"{tmp_path}/a.npz?inputs=x&labels=none")
        assert len(source) == 1 << 18
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert source.read([5])[0].raw.tolist() == [0.0] * 16  # type: ignore[union-attr]


def test_labels_and_keys(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["fine"], file["ids"] = PIXELS, np.array([[0], [1], [-1], [2], [1], [0]]), np.arange(6) * 11
        file["few"], file["soft"] = np.arange(5), np.full((6, 10), 0.5)
    where = f"{tmp_path / 'a.h5'}?images=x"
    assert not open_source(where).has_labels
    source = open_source(f"{where}&labels=fine&keys=ids")
    assert source.labels().tolist() == [0, 1, IGNORE, 2, 1, 0]
    assert source.keys() == ["0", "11", "22", "33", "44", "55"]
    for option, reason in {
        "labels=few": r"expected 6 integers, found int64 of shape \(5,\)",
        "labels=soft": r"expected 1, 0 or -1 \(not known\) for each class, found 0.5 for class 0 of row 0",
        "keys=few": "expected 6 strings or integers",
        "keys=fine": "expected 6 strings or integers",
        "labels=nothing": "no dataset 'nothing'; the file has few, fine, ids, soft, x",
    }.items():
        with pytest.raises(DataError if option == "labels=soft" else SpecError, match=reason):
            open_source(f"{where}&{option}")
    with pytest.raises(SpecError, match="no dataset 'images'"):
        open_source(tmp_path / "a.h5")
    with pytest.raises(SpecError, match=r"unknown option key; a \.h5 file takes inputs, .*, keys, classes, rows"):
        open_source(f"{where}&key=index")
    np.save(tmp_path / "a.npy", PIXELS)
    with pytest.raises(SpecError, match="no such file"):
        open_source(f"{tmp_path / 'a.npy'}?labels=nothing.npy")
    np.savez(tmp_path / "a.npz", images=PIXELS, y=np.arange(6))
    assert open_source(f"{tmp_path / 'a.npz'}?labels=y").labels().tolist() == list(range(6))
    with pytest.raises(SpecError, match="no array 'z'; the archive has images, y"):
        open_source(f"{tmp_path / 'a.npz'}?labels=z")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    np.save(tmp_path / "a.npy", PIXELS)
    np.savez(tmp_path / "a.npz", images=PIXELS)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = PIXELS
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"a\.{name[2:]}"):
            open_source(path)


def test_lists(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i},x.jpg").write_bytes(make_jpeg(i))

    def write(text: str) -> str:
        (tmp_path / "list.csv").write_text(text, encoding="utf-8-sig")
        return str(tmp_path / "list.csv")

    source = open_source(write('path,label\n"2,x.jpg",7\n\n"0,x.jpg",\r\n"gone.jpg",-1\n'))
    assert (source.keys(), source.labels().tolist()) == (["2,x.jpg", "0,x.jpg", "gone.jpg"], [7, IGNORE, IGNORE])
    found = source.read([1, 0, 2])
    assert [one.raw for one in found[:2]] == [make_jpeg(0), make_jpeg(2)]
    assert isinstance(found[2].raw, BadImageError)
    assert not open_source(f"{write('1.jpg,2')}?labels=none").has_labels
    assert not open_source(write("1.jpg\n2.jpg")).has_labels
    absolute = tmp_path / "3,x.jpg"
    assert open_source(write(f'"{absolute}"')).read([0])[0].raw == make_jpeg(3)
    for text, reason in {
        "a.jpg,1\n2,x.jpg": r"line 2: expected a class number after the path, found '2,x.jpg'; put a path",
        "a.jpg,cat": "line 1: expected a class number",
        "a.jpg,1,2": "line 1: expected PATH or PATH,LABEL, found 'a.jpg,1,2'",
        ",1": "line 1: expected PATH",
        '"a.jpg': "expected a list of paths in UTF-8, found",
        "a.jpg,-5": "expected a label of at least 0",
        "a.jpg\nb.jpg\na.jpg": r"found repeated: 'a.jpg' \(samples 0 and 2\); name each file once",
    }.items():
        with pytest.raises(DataError, match=reason):
            open_source(write(text))
    with pytest.raises(SpecError, match="root=/nowhere: no such folder"):
        open_source(f"{write('a.jpg')}?root=/nowhere")
    with pytest.raises(SpecError, match="labels: expected none"):
        open_source(f"{write('a.jpg')}?labels=folders")


def test_classes_are_checked(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    np.save(tmp_path / "y.npy", np.arange(6) % 3)
    where = f"{tmp_path / 'a.npy'}?labels={tmp_path / 'y.npy'}&classes={tmp_path / 'c.txt'}"
    (tmp_path / "c.txt").write_text("cat\ndog\nowl\n")
    assert open_source(where).class_names == ("cat", "dog", "owl")
    assert open_source(where, ignore_labels=True).class_names is None
    for text, reason in {
        "cat\ndog\ncat": "'cat' on line 3",
        "cat\n\ndog": "'' on line 2",
        "": "none on line 1",
    }.items():
        (tmp_path / "c.txt").write_text(text)
        with pytest.raises(SpecError, match=reason):
            open_source(where)
    (tmp_path / "c.txt").unlink()
    with pytest.raises(SpecError, match=r"c\.txt: cannot be read"):
        open_source(where)


class Stream(IterableDataset[torch.Tensor]):
    def __len__(self) -> int:
        return 3

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([torch.zeros(3, 4, 4, dtype=torch.uint8)] * 3)


def test_a_stream_promises_no_order() -> None:
    with pytest.raises(DataError, match=r"a stream, which has no order .* to tar shards or files"):
        open_source(Stream())
