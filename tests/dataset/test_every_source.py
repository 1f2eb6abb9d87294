"""One contract for every kind of source: the same images in any container give the same keys, labels and pixels."""

import csv
import io
import tarfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

from softlabel.dataset import ReorderedSource, Source, open_source
from softlabel.errors import DataError, SpecError
from softlabel.inputs.base import IGNORE
from softlabel.testing import ExpectedSample, SourceTests
from softlabel.testing.source import check_samples, hash_keys
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


class NamedSourceTests(SourceTests):
    """The contract of a source that a SPEC names; a subclass says where, by its fixture `where`."""

    @pytest.fixture
    def expected(self, case: Case) -> list[ExpectedSample]:
        return expect(case)

    @pytest.fixture
    def make_source(self, where: Any) -> Callable[[], Source]:
        return lambda: open_source(where)

    def test_rows_of_it(self, where: Any, expected: list[ExpectedSample]) -> None:
        part = open_source(f"{where}{'&' if '?' in str(where) else '?'}rows=8:11")
        assert (len(part), part.keys()) == (3, [one.key for one in expected[8:11]])
        assert part.labels().tolist() == LABELS[8:11]
        assert part.fingerprint() == hash_keys(part.keys())
        check_samples(part.read([2, 0, 1]), [expected[10], expected[8], expected[9]])
        assert [start for start, _ in part.blocks()][:1] == [0]
        assert part.blocks()[-1][1] == 3

    def test_opened_without_labels(self, where: Any, expected: list[ExpectedSample]) -> None:
        plain = open_source(where, ignore_labels=True)
        assert (plain.has_labels, plain.class_names, plain.labels().tolist()) == (False, None, [IGNORE] * N)
        check_samples(plain.read([0, 20]), [replace(expected[index], label=IGNORE) for index in (0, 20)])


class TestLocalSources(NamedSourceTests):
    @pytest.fixture(params=LOCAL.values(), ids=LOCAL.keys())
    def case(self, request: pytest.FixtureRequest) -> Case:
        return request.param

    @pytest.fixture
    def where(self, case: Case, tmp_path: Path) -> Any:
        return case.write(tmp_path)


class TestRemoteSources(NamedSourceTests):
    # What another process has in memory, and the port of a server that starts after it, are out of its reach.
    test_a_process_that_inherits_nothing_reads_it = None

    @pytest.fixture(params=REMOTE.values(), ids=REMOTE.keys())
    def case(self, request: pytest.FixtureRequest) -> Case:
        return request.param

    @pytest.fixture(params=["memory", "s3"])
    def where(self, case: Case, request: pytest.FixtureRequest) -> Any:
        bucket = request.getfixturevalue("s3") if request.param == "s3" else "memory:/"
        return case.write(f"{bucket}/{uuid.uuid4().hex}/ö")  # type: ignore[arg-type]


class TestDatasetSource(SourceTests):
    @pytest.fixture
    def expected(self) -> list[ExpectedSample]:
        return expect(Case(folder, has_bytes=False))

    @pytest.fixture
    def make_source(self) -> Callable[[], Source]:
        return lambda: open_source(Mapped(), key_fn=name_of)


def open_parquet(root: Path, rows: Sequence[int], name: str) -> Source:
    return open_source(put(root / name, parquet_bytes(rows)))


# Sources made of the Parquet sources of a folder, and which of the samples they have.
DERIVED: dict[str, tuple[Callable[[Path], Source], list[int]]] = {
    "several": (
        lambda root: open_source(
            [open_parquet(root, range(9), "a.parquet"), open_parquet(root, range(9, N), "b.parquet")]
        ),
        list(range(N)),
    ),
    "part": (
        lambda root: open_source(f"{put(root / 'a.parquet', parquet_bytes(range(N)))}?rows=4:17"),
        [*range(4, 17)],
    ),
    "chosen": (
        lambda root: open_source(
            f"{put(root / 'a.parquet', parquet_bytes(range(N)))}?without_fold=1/3&fold_seed=2&labelled=only"
        ),
        [
            n
            for n, key in enumerate(LOCAL["parquet"].keys)
            if xxhash.xxh3_64_intdigest(key.encode(), 2) % 3 and LABELS[n] >= 0
        ],
    ),
    "other decoding": (
        lambda root: open_source(f"{put(root / 'a.parquet', parquet_bytes(range(N)))}?exif=ignore"),
        list(range(N)),
    ),
    "reordered": (
        lambda root: ReorderedSource(open_parquet(root, range(N), "a.parquet"), np.array([5, 6, 7, 22, 0, 1])),
        [5, 6, 7, 22, 0, 1],
    ),
}


class TestDerivedSources(SourceTests):
    @pytest.fixture(params=DERIVED)
    def name(self, request: pytest.FixtureRequest) -> str:
        return request.param

    @pytest.fixture
    def expected(self, name: str) -> list[ExpectedSample]:
        whole = expect(LOCAL["parquet"])
        return [whole[index] for index in DERIVED[name][1]]

    @pytest.fixture
    def make_source(self, name: str, tmp_path: Path) -> Callable[[], Source]:
        return lambda: DERIVED[name][0](tmp_path)


def expect(case: Case) -> list[ExpectedSample]:
    encoded = BYTES if case.has_bytes else [None] * N
    return [
        ExpectedSample(key=key, label=label, pixels=pixels, encoded=data)
        for key, label, pixels, data in zip(case.keys, LABELS, PIXELS, encoded, strict=True)
    ]


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
    error = SpecError if write is twice_npy else DataError  # whose keys are named by an option
    with pytest.raises(error, match=r"found repeated: .* \(samples 0 and 2\)"):
        open_source(write(tmp_path))


@pytest.mark.parametrize("write", [twice_parquet, twice_tar, twice_tars, twice_list, twice_npy])
def test_trusted_keys_are_read_for_a_part_alone(write: Callable[[Path], Any], tmp_path: Path) -> None:
    source = open_source(write(tmp_path), check_keys=False)
    assert source.digest(1, 3) == hash_keys(source.keys(1, 3))
    assert source.digest(1, 3) != source.digest(0, 2)
    with pytest.raises((DataError, SpecError), match="found repeated"):
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
    assert source.fingerprint() == hash_keys([])
