"""One contract for every kind of source: the same images in any container give the same keys, labels and pixels."""

import csv
import io
import multiprocessing
import pickle
import tarfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from PIL import Image
from torch.utils.data import DataLoader

from softlabel.dataset import Source, open_source
from softlabel.errors import DataError
from softlabel.inputs.base import IGNORE
from softlabel.inputs.content import content_hash
from softlabel.inputs.image_decode import decode_hashed, decode_image
from tests.support.datasets import add_tar_member
from tests.support.s3 import serve_s3

N = 23
# Class folders in the order of their names, and names that are not ASCII.
NAMES = [f"klasse-{3 * i // N}-ä/bild {i:03d} ß.png" for i in range(N)]
LABELS = [3 * i // N for i in range(N)]
PIXELS = np.random.default_rng(5).integers(0, 256, (N, 6, 5, 3), dtype=np.uint8)


def png(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


BYTES = [png(one) for one in PIXELS]


@dataclass(frozen=True)
class Case:
    """How a container is written (into a folder, giving the SOURCE), and what its keys are."""

    write: Callable[[Path], Any]
    stem: bool = False
    numbered: bool = False
    has_bytes: bool = True

    @property
    def keys(self) -> list[str]:
        if self.numbered:
            return [str(i) for i in range(N)]
        return [name.removesuffix(".png") for name in NAMES] if self.stem else NAMES


def parquet_bytes(rows: Sequence[int]) -> bytes:
    images = [{"bytes": BYTES[i], "path": NAMES[i]} for i in rows]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": images, "label": [LABELS[i] for i in rows]}), buffer, row_group_size=5)
    return buffer.getvalue()


def tar_bytes(rows: Sequence[int]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i in rows:
            stem = NAMES[i].removesuffix(".png")
            add_tar_member(archive, f"{stem}.png", BYTES[i])
            add_tar_member(archive, f"{stem}.cls", str(LABELS[i]).encode())
    return buffer.getvalue()


def three(make: Callable[[Sequence[int]], bytes]) -> list[bytes]:
    return [make(range(9)), make(range(9, 10)), make(range(10, N))]


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def folder(root: Path) -> Path:
    for name, data in zip(NAMES, BYTES, strict=True):
        put(root / "images" / name, data)
    return root / "images"


def listed(root: Path) -> Path:
    folder(root)
    with open(root / "images" / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *zip(NAMES, LABELS, strict=True)])
    return root / "images" / "train.csv"


def listed_elsewhere(root: Path) -> str:
    images = folder(root)
    lines = [f"{name},{label}\n\n" for name, label in zip(NAMES, LABELS, strict=True)]
    return f"{put(root / 'train.txt', ''.join(lines).encode())}?root={images}"


def shards(root: Path, make: Callable[[Sequence[int]], bytes], suffix: str) -> Path:
    for number, data in enumerate(three(make)):
        put(root / "shards" / f"data-{number:02d}{suffix}", data)
    return root / "shards"


def h5(root: Path, pixels: np.ndarray, **options: Any) -> Path:
    with h5py.File(root / "images.h5", "w") as file:
        file.create_dataset("images", data=pixels, **options)
        file["labels"] = np.array(LABELS, dtype=np.uint8)
        file["names/keys"] = np.array(NAMES, dtype=h5py.string_dtype())
    return root / "images.h5"


def npy(root: Path, pixels: np.ndarray) -> str:
    for name, array in (("images", pixels), ("labels", np.array(LABELS)), ("keys", np.array(NAMES))):
        np.save(root / f"{name}.npy", array)
    return f"{root / 'images.npy'}?labels={root / 'labels.npy'}"


def npz(root: Path, save: Callable[..., None]) -> Path:
    save(root / "all.npz", x=PIXELS, images=PIXELS, labels=np.array(LABELS, dtype=">i4"), keys=np.array(NAMES))
    return root / "all.npz"


class Mapped:
    classes = ("a", "b", "c")

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return PIXELS[index], LABELS[index]


def name_of(index: int) -> str:
    return NAMES[index]


def first_channels(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


ARRAY = {"numbered": True, "has_bytes": False}
LOCAL = {
    "parquet": Case(lambda root: put(root / "a.parquet", parquet_bytes(range(N)))),
    "parquet-folder": Case(lambda root: shards(root, parquet_bytes, ".parquet")),
    "parquet-braces": Case(lambda root: f"{shards(root, parquet_bytes, '.parquet')}/data-{{00..02}}.parquet"),
    "file-url": Case(lambda root: f"file://{put(root / 'a.parquet', parquet_bytes(range(N)))}"),
    "folder": Case(folder),
    "list": Case(listed),
    "list-elsewhere": Case(listed_elsewhere),
    "tar": Case(lambda root: put(root / "a.tar", tar_bytes(range(N))), stem=True),
    "tar-folder": Case(lambda root: shards(root, tar_bytes, ".tar"), stem=True),
    "tar-braces": Case(lambda root: f"{shards(root, tar_bytes, '.tar')}/data-{{00..02}}.tar", stem=True),
    "tar-glob": Case(lambda root: f"{shards(root, tar_bytes, '.tar')}/data-*.tar", stem=True),
    "tar-index": Case(lambda root: f"{shards(root, tar_bytes, '.tar')}?key=index", numbered=True),
    "h5": Case(lambda root: h5(root, PIXELS), **ARRAY),
    "h5-channels-first": Case(
        lambda root: h5(root, first_channels(PIXELS), chunks=(4, 3, 6, 5), compression=1), **ARRAY
    ),
    "h5-keys": Case(lambda root: f"{h5(root, PIXELS)}?keys=names/keys", has_bytes=False),
    "npy": Case(lambda root: npy(root, PIXELS), **ARRAY),
    "npy-channels-first": Case(lambda root: npy(root, first_channels(PIXELS)), **ARRAY),
    "npy-keys": Case(lambda root: f"{npy(root, np.asfortranarray(PIXELS))}&keys={root / 'keys.npy'}", has_bytes=False),
    "npz": Case(lambda root: npz(root, np.savez), **ARRAY),
    "npz-packed": Case(lambda root: f"{npz(root, np.savez_compressed)}?images=x&keys=keys", has_bytes=False),
}
REMOTE = {
    "parquet": Case(lambda root: f"{remote(root, [parquet_bytes(range(N))], 'a{}.parquet')}/a0.parquet"),
    "parquet-folder": Case(lambda root: remote(root, three(parquet_bytes), "x/data-{}.parquet")),
    "tar": Case(lambda root: f"{remote(root, [tar_bytes(range(N))], 'a{}.tar')}/a0.tar", stem=True),
    "tar-folder": Case(lambda root: remote(root, three(tar_bytes), "x/data-{}.tar"), stem=True),
    "tar-braces": Case(lambda root: remote(root, three(tar_bytes), "x/data-{}.tar") + "/x/data-{0..2}.tar", stem=True),
    "tar-glob": Case(lambda root: remote(root, three(tar_bytes), "x/data-{}.tar") + "/x/*.tar", stem=True),
}


def remote(bucket: Any, files: list[bytes], name: str) -> str:
    """Put files at a URL: `bucket` is what the fixture gave."""
    for number, data in enumerate(files):
        fsspec.open(f"{bucket}/{name.format(number)}", "wb").fs.pipe_file(
            f"{bucket}/{name.format(number)}".partition("://")[2], data
        )
    return str(bucket)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    yield from serve_s3()


PLACES = [
    *(pytest.param(case, "local", id=name) for name, case in LOCAL.items()),
    *(pytest.param(case, "memory", id=f"memory-{name}") for name, case in REMOTE.items()),
    *(pytest.param(case, "s3", id=f"s3-{name}") for name, case in REMOTE.items()),
    pytest.param(Case(lambda root: Mapped(), has_bytes=False), "dataset", id="dataset"),
]


def written(case: Case, place: str, request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    if place == "memory":
        return case.write(f"memory://{uuid.uuid4().hex}/ö"), {}  # type: ignore[arg-type]
    if place == "s3":
        return case.write(f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}/ö"), {}  # type: ignore[arg-type]
    where = case.write(request.getfixturevalue("tmp_path"))
    return where, {"key_fn": name_of} if place == "dataset" else {}


def fingerprint(keys: list[str]) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(len(k.encode()).to_bytes(4, "little") + k.encode() for k in keys))


class Reading:
    """A map-style dataset over a source, for worker processes."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, int, torch.Tensor]:
        (sample,) = self.source.read([index])
        return sample.key, sample.label, decode_image(sample.image)


@pytest.mark.parametrize(("case", "place"), PLACES)
def test_every_source_keeps_the_contract(case: Case, place: str, request: pytest.FixtureRequest) -> None:
    where, options = written(case, place, request)
    source = open_source(where, **options)
    keys = case.keys
    assert (len(source), source.has_labels, source.keys()) == (N, True, keys)
    assert source.labels().dtype == np.int64
    assert source.labels().tolist() == LABELS
    assert source.fingerprint() == fingerprint(keys)
    assert source.key_table().to_list() == keys
    for start, stop in [(0, 0), (0, 5), (4, 11), (8, 10), (9, 10), (22, 23), (20, 99), (N, None), (7, None)]:
        assert source.keys(start, stop) == source.key_table(start, stop).to_list() == keys[start:stop]
        assert source.labels(start, stop).tolist() == LABELS[start:stop]

    def check(source: Source, indices: list[int], *, labelled: bool = True, shift: int = 0) -> None:
        samples = source.read(indices)
        assert len(samples) == len(indices)
        for sample, index in zip(samples, [index + shift for index in indices], strict=True):
            assert (sample.key, sample.label) == (keys[index], LABELS[index] if labelled else IGNORE)
            np.testing.assert_array_equal(decode_image(sample.image).permute(1, 2, 0).numpy(), PIXELS[index])
            if case.has_bytes:
                expected = xxhash.xxh3_64_intdigest(BYTES[index])
            else:
                shape = "x".join(map(str, PIXELS[index].shape))
                expected = xxhash.xxh3_64_intdigest(
                    PIXELS[index].tobytes(), xxhash.xxh3_64_intdigest(f"|u1 {shape}".encode())
                )
                expected = expected >> 16 << 16 | 0x7870
            assert content_hash(sample.image) == expected
            assert decode_hashed(sample.image)[1] == expected

    for indices in ([], [3], list(range(N)), [22, 0, 9, 8, 10, 9, 9, 1], list(range(7, 12))):
        check(source, indices)
    check(pickle.loads(pickle.dumps(source)), [21, 2, 9])
    part = open_source(f"{where}{'&' if '?' in str(where) else '?'}rows=8:11") if place != "dataset" else None
    if part is not None:
        assert (len(part), part.keys(), part.labels().tolist()) == (3, keys[8:11], LABELS[8:11])
        assert part.fingerprint() == fingerprint(keys[8:11])
        check(part, [2, 0, 1], shift=8)
        assert [start for start, _ in part.blocks()][:1] == [0]
        assert part.blocks()[-1][1] == 3
    plain = open_source(where, ignore_labels=True, **options)
    assert not plain.has_labels
    assert plain.class_names is None
    assert plain.labels().tolist() == [IGNORE] * N
    check(plain, [0, 20], labelled=False)


@pytest.mark.parametrize(("case", "place"), PLACES)
@pytest.mark.parametrize("workers", [0, 2])
def test_read_in_worker_processes(case: Case, place: str, workers: int, request: pytest.FixtureRequest) -> None:
    where, options = written(case, place, request)
    source = open_source(where, **options)
    source.read([0, 13])  # what is open now must not be used by the children
    found = list(DataLoader(Reading(source), batch_size=None, num_workers=workers, multiprocessing_context=None))  # type: ignore[arg-type]
    assert [key for key, _, _ in found] == case.keys
    assert [label for _, label, _ in found] == LABELS
    for (_, _, image_CHW), pixels_HWC in zip(found, PIXELS, strict=True):
        np.testing.assert_array_equal(image_CHW.permute(1, 2, 0).numpy(), pixels_HWC)
    source.read([22])


def keys_and_sums(source: Source) -> list[tuple[str, int]]:
    return [(sample.key, int(decode_image(sample.image).sum())) for sample in source.read(range(N))]


def test_read_in_a_process_that_inherits_nothing(tmp_path: Path) -> None:
    sources = []
    for name, case in LOCAL.items():
        (tmp_path / name).mkdir()
        source = open_source(case.write(tmp_path / name))
        source.read([1])
        sources.append(source)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(keys_and_sums, sources)
    for name, one in zip(LOCAL, found, strict=True):
        assert one == list(zip(LOCAL[name].keys, PIXELS.sum(axis=(1, 2, 3)).tolist(), strict=True)), name


def test_blocks_are_what_the_container_has(tmp_path: Path) -> None:
    groups = [(0, 5), (5, 9), (9, 10), (10, 15), (15, 20), (20, 23)]
    assert open_source(LOCAL["parquet-folder"].write(tmp_path / "1")).blocks() == groups
    assert open_source(LOCAL["tar-folder"].write(tmp_path / "2")).blocks() == [(0, 9), (9, 10), (10, 23)]
    (tmp_path / "3").mkdir()
    assert open_source(LOCAL["h5-channels-first"].write(tmp_path / "3")).blocks() == [(0, 23)]
    assert open_source(f"{tmp_path / '1' / 'shards'}?rows=7:16").blocks() == [(0, 2), (2, 3), (3, 8), (8, 9)]
    for name, case in LOCAL.items():
        (tmp_path / name).mkdir()
        blocks = open_source(case.write(tmp_path / name)).blocks()
        assert [index for start, stop in blocks for index in range(start, stop)] == list(range(N)), name
        assert all(start < stop for start, stop in blocks)
    large = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint8, (10_000, 1, 1, 3))
    assert open_source(tmp_path / "large.npy").blocks() == [(0, 4096), (4096, 8192), (8192, 10_000)]
    del large


def twice_parquet(root: Path) -> Path:
    return put(root / "a.parquet", parquet_bytes([0, 1, 0]))


def twice_tar(root: Path) -> Path:
    return put(root / "a.tar", tar_bytes([0, 1, 0]))


def twice_tars(root: Path) -> Path:
    put(root / "t" / "a.tar", tar_bytes([0, 1]))
    return put(root / "t" / "b.tar", tar_bytes([0])).parent


def twice_list(root: Path) -> Path:
    return put(root / "a.txt", f"{NAMES[0]}\nx.png\n{NAMES[0]}\n".encode())


def twice_npy(root: Path) -> str:
    np.save(root / "i.npy", PIXELS[:3])
    np.save(root / "k.npy", np.array(["a", "b", "a"]))
    return f"{root / 'i.npy'}?keys={root / 'k.npy'}"


@pytest.mark.parametrize("write", [twice_parquet, twice_tar, twice_tars, twice_list, twice_npy])
def test_two_samples_of_one_key_are_refused(write: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found more than once: .* \(samples 0 and 2\)"):
        open_source(write(tmp_path))


@pytest.mark.parametrize("write", [twice_parquet, twice_tar, twice_tars, twice_list, twice_npy])
def test_trusted_keys_are_read_for_a_part_alone(write: Callable[[Path], Any], tmp_path: Path) -> None:
    source = open_source(write(tmp_path), check_keys=False)
    assert source.digest(1, 3) == fingerprint(source.keys(1, 3))
    assert source.digest(1, 3) != source.digest(0, 2)
    with pytest.raises(DataError, match="found more than once"):
        source.fingerprint()


def empty_parquet(root: Path) -> Path:
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    pq.write_table(schema.empty_table(), root / "a.parquet")
    return root / "a.parquet"


def empty_npy(root: Path) -> Path:
    np.save(root / "i.npy", PIXELS[:0])
    return root / "i.npy"


@pytest.mark.parametrize(
    "write",
    [empty_parquet, empty_npy, lambda root: put(root / "a.tar", tar_bytes([])), lambda root: put(root / "a.txt", b"")],
    ids=["parquet", "npy", "tar", "list"],
)
def test_a_source_without_samples(write: Callable[[Path], Any], tmp_path: Path) -> None:
    source = open_source(write(tmp_path))
    assert (len(source), source.keys(), source.read([]), source.has_labels) == (0, [], [], False)
    assert source.blocks() == []
    assert source.fingerprint() == fingerprint([])
