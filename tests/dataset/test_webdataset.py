"""Tar shards against raw tarfile and the webdataset package; what is damaged or ambiguous is refused."""

import gzip
import io
import json
import logging
import tarfile
from pathlib import Path

import pytest

import softlabel.dataset.webdataset as tar
from softlabel.dataset import open_source, report_source
from softlabel.errors import DataError, SoftLabelError, SpecError
from softlabel.inputs.base import IGNORE
from softlabel.inputs.image_decode import decode_image
from tests.support.datasets import add_tar_member, make_jpeg


def write(path: Path, members: list[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            add_tar_member(archive, name, data)
    return path


def samples(numbers: range, folder: str = "") -> list[tuple[str, bytes]]:
    return [
        (f"{folder}{i:04d}.{extension}", data)
        for i in numbers
        for extension, data in (
            ("jpg", make_jpeg(i)),
            ("cls", b"%d" % (i % 5)),
            ("json", json.dumps({"id": i}).encode()),
        )
    ]


def test_what_the_webdataset_package_writes_and_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"train-{shard:03d}.tar"), encoder=False) as sink:
            for i in range(shard * 7, shard * 7 + 7):
                members = {
                    "JPG" if i % 2 else "jpeg": make_jpeg(i),
                    "cls": b"%d\n" % (i % 5),
                    "seg.png": b"not an image",
                }
                sink.write({"__key__": f"class {i % 5}/ünicode-{i:03d}", **members})
    shards = str(tmp_path / "train-{000..002}.tar")
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len(theirs) == 21
    source = open_source(shards)
    assert source.keys() == [one["__key__"] for one in theirs]
    for sample, one in zip(source.read(range(21)), theirs, strict=True):
        assert sample.raw == one.get("jpg", one.get("jpeg"))
        assert sample.label == int(one["cls"])
    picked = open_source(f"{shards}?image=seg.png&label=none")
    assert [sample.raw for sample in picked.read([3, 20])] == [b"not an image"] * 2
    assert not picked.has_labels


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_tar_format(tmp_path: Path, format: int) -> None:
    deep = "/".join(["folder-of-twenty-chars"] * 4)
    members = [(f"{deep}/{i:02d}-日本.PNG" if i % 2 else f"./{i:02d}.jpg", b"%d" % i * 700) for i in range(9)]
    path = write(tmp_path / "a.tar", members, format=format)
    source = open_source(path)
    assert source.keys() == [name.removeprefix("./").rpartition(".")[0] for name, _ in members]
    with tarfile.open(path) as raw:
        assert [one.raw for one in source.read(range(9))] == [raw.extractfile(one).read() for one in raw]  # type: ignore[union-attr]


def test_labels_from_cls_from_json_and_none_at_all(tmp_path: Path) -> None:
    members = [
        *(("a.jpg", b"A"), ("a.json", b'{"y": 3, "z": "cat"}'), ("a.cls", b" 1\n")),
        *(("b.json", b'{"y": null}'), ("b.jpg", b"B")),
        *(("c.jpg", b"C"), ("c.cls", b"-1")),
    ]
    path = write(tmp_path / "a.tar", members)
    assert open_source(path).labels().tolist() == [1, IGNORE, IGNORE]
    assert open_source(f"{path}?label=y").labels().tolist() == [3, IGNORE, IGNORE]
    assert not open_source(f"{path}?label=none").has_labels
    (tmp_path / "names.txt").write_text("zero\none\nzwei und mehr\ndrei\n")
    assert open_source(f"{path}?label=y&classes={tmp_path / 'names.txt'}").class_names == (
        *("zero", "one", "zwei und mehr", "drei"),
    )
    (tmp_path / "names.txt").write_text("zero\n")
    with pytest.raises(SpecError, match="labels below 1, the number of class names, found 1"):
        open_source(f"{path}?classes={tmp_path / 'names.txt'}")
    with pytest.raises(DataError, match=r"a.json: z: expected a class number, found 'cat'; class names need"):
        open_source(f"{path}?label=z")
    with pytest.raises(SpecError, match=r"no sample has a label in field 'nothing' of \.json"):
        open_source(f"{path}?label=nothing")
    for text in (b"cat", b"", b"1.5", b"9" * 30):
        with pytest.raises(DataError, match=r"a.cls: expected a class number"):
            open_source(write(tmp_path / "b.tar", [("a.jpg", b"A"), ("a.cls", text)]))
    with pytest.raises(DataError, match="expected a label of at least 0"):
        open_source(write(tmp_path / "b.tar", [("a.jpg", b"A"), ("a.cls", b"-7")]))


@pytest.mark.parametrize("first", ["jpg", "cls"])
def test_labels_in_files_apart_from_the_images(tmp_path: Path, first: str) -> None:
    """As `tar cf a.tar *.jpg *.cls` writes them."""
    members = [member for member in samples(range(9)) if not member[0].endswith("json")]
    apart = sorted(members, key=lambda member: not member[0].endswith(first))
    together = open_source(write(tmp_path / "a.tar", members))
    source = open_source(write(tmp_path / "b.tar", apart))
    assert (source.keys(), source.labels().tolist()) == (together.keys(), [i % 5 for i in range(9)])
    assert open_source(f"{tmp_path / 'b.tar'}?key=shard").labels().tolist() == [i % 5 for i in range(9)]
    with pytest.raises(DataError, match="0003 has two labels, 3 and 4; keep one"):
        open_source(write(tmp_path / "c.tar", [*members, ("x.jpg", b""), ("0003.cls", b"4")]))


def test_labels_that_could_be_meant_are_offered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        (f"{i}.{extension}", data)
        for i in range(4)
        for extension, data in (
            *(("jpg", make_jpeg(i)), ("txt", b"%d" % (i % 3)), ("caption.txt", b"a cat")),
            ("json", json.dumps({"label": str(i), "weight": float(i), "name": "abcd"[i], "boxes": []}).encode()),
        )
    ]
    path = write(tmp_path / "a.tar", members)
    report_source(open_source(path))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{path}: labels may have been left out: '?label=.txt' uses the 4 .txt members; the first holds '0'",
        f"{path}: labels may have been left out: '?label=label' uses a field of the 4 .json members, which have "
        "label, weight, name",
    ]
    (tmp_path / "names.txt").write_text("d\nc\nb\na\n")
    for option, labels in {
        ".txt": [0, 1, 2, 0],
        "label": [0, 1, 2, 3],
        "weight": [0, 1, 2, 3],
        f"name&classes={tmp_path / 'names.txt'}": [3, 2, 1, 0],
    }.items():
        assert open_source(f"{path}?label={option}").labels().tolist() == labels
    with pytest.raises(DataError, match="class names need"):
        open_source(f"{path}?label=.caption.txt")
    with pytest.raises(SpecError, match=r"label=id: no sample has a label in field 'id' .*'\?label=\.txt' uses"):
        open_source(f"{path}?label=id")


def test_shards_that_number_their_samples_alike(tmp_path: Path) -> None:
    write(tmp_path / "d" / "x" / "a.tar", samples(range(3)))
    write(tmp_path / "d" / "b.tar", samples(range(3)))
    with pytest.raises(DataError, match=r"'0000' \(samples 0 and 3\).*key=shard"):
        open_source(tmp_path / "d")
    source = open_source(f"{tmp_path / 'd'}?key=shard")
    assert source.keys() == ["b/0000", "b/0001", "b/0002", "x/a/0000", "x/a/0001", "x/a/0002"]
    assert open_source(f"{tmp_path / 'd'}?key=index").keys() == list("012345")
    assert open_source(f"{tmp_path / 'd'}?files=x/*.tar").keys() == ["0000", "0001", "0002"]
    with pytest.raises(SpecError, match="key: expected 'shard'"):
        open_source(f"{tmp_path / 'd'}?key=name")


def test_members_that_are_no_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        *(("__index__/a.jpg", b"meta"), ("README", b"text"), (".hidden.jpg", b"no"), ("notes.txt", b"no image")),
        *samples(range(2)),
        ("tail.json", b"{}"),
    ]
    path = write(tmp_path / "a.tar", members)
    with caplog.at_level(logging.WARNING, "softlabel"):
        assert open_source(path).keys() == ["0000", "0001"]
    assert "2 samples without an image are left out, the first" in caplog.text
    assert "notes with txt" in caplog.text
    with pytest.raises(DataError, match=r"none of the 2 samples has an image.*frame with 0001\.jpg.*first dot"):
        open_source(write(tmp_path / "b.tar", [("frame.0001.jpg", b"1"), ("frame.0002.jpg", b"2"), ("x.txt", b"")]))
    with pytest.raises(DataError, match=r"a has several images: jpg, png; choose with '\?image=EXTENSION'"):
        open_source(write(tmp_path / "c.tar", [("a.jpg", b"1"), ("a.png", b"2")]))
    assert open_source(f"{tmp_path / 'c.tar'}?image=.PNG").read([0])[0].raw == b"2"
    with pytest.raises(DataError, match=r"a.jpg occurs twice"):
        open_source(write(tmp_path / "d.tar", [("a.jpg", b"1"), ("a.JPG", b"2")]))


def test_links_have_no_bytes(tmp_path: Path) -> None:
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            add_tar_member(archive, "a.jpg", b"1")
            member = tarfile.TarInfo("b.jpg")
            member.type, member.linkname = kind, "a.jpg"
            archive.addfile(member)
        with pytest.raises(DataError, match=r"b.jpg: expected a file, found a link to a.jpg.*--hard-dereference"):
            open_source(tmp_path / "a.tar")


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.tar", samples(range(3))).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as raw:
        raw.getmembers()
        end = raw.offset
    cut = tmp_path / "cut.tar"
    for length in [0, 1, 100, *range(511, end, 512), *range(512, end, 512), end - 1, end]:
        cut.write_bytes(whole[:length])
        with pytest.raises(
            DataError, match=r"cut\.tar: expected a tar file, found (a damaged or truncated one|an empty file)"
        ):
            open_source(cut)
    cut.write_bytes(whole[: end + 512])  # one block of zeros is a mark; others pad to 10 KiB
    assert len(open_source(cut)) == 3


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", samples(range(3)))
    with tarfile.open(path) as raw:
        headers = [member.offset for member in raw]
    for header in headers:
        for place, value in ((0, 0xFF), (124, ord("z")), (148, ord("7"))):
            data = bytearray(path.read_bytes())
            data[header + place] ^= value
            (tmp_path / "b.tar").write_bytes(data)
            with pytest.raises(SoftLabelError, match=r"b\.tar"):
                open_source(tmp_path / "b.tar")
    (tmp_path / "c.tar").write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match="another archive follows"):
        open_source(tmp_path / "c.tar")


def test_a_file_replaced_while_in_use(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", samples(range(9)))
    source = open_source(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.tar: expected \d+ bytes at offset \d+, found 0; the file is truncated"):
        source.read([8])


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", samples(range(2)))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    for where in (tmp_path / "b.tar.gz", tmp_path, f"{tmp_path}/b.tar.*"):
        with pytest.raises(SpecError, match=r"plain tar files, found b\.tar\.gz, .*decompress it once"):
            open_source(where)
    (tmp_path / "b.tar.gz").rename(tmp_path / "c.tar")
    with pytest.raises(DataError, match=r"c\.tar: expected a tar file, found a file compressed by gzip; unpack it"):
        open_source(tmp_path / "c.tar")


def test_patterns(tmp_path: Path) -> None:
    for number in (0, 1, 2, 10):
        write(tmp_path / f"{'val' if number == 10 else 'train'}-{number:02d}.tar", samples(range(number, number + 1)))

    def keys(pattern: str) -> list[str]:
        return open_source(f"{tmp_path}/{pattern}").keys()

    assert keys("train-{02..00}.tar") == ["0002", "0001", "0000"]
    assert keys("{val-10,train-01}.tar") == ["0010", "0001"]
    assert keys("train-0[12].tar") == ["0001", "0002"]
    assert keys("*.tar") == ["0000", "0001", "0002", "0010"]
    assert keys("{val,train}-*.tar?rows=1:") == ["0000", "0001", "0002"]
    for pattern, reason in {
        "train-{00..05}.tar": r"3 of the 6 files do not exist: train-03\.tar",
        "train-{0..2}.tar": r"3 of the 3 files do not exist: train-0\.tar",
        "x-*.tar": r"no file matches x-\*\.tar",
        "train-{00..02.tar": "unbalanced or nested braces",
        "{0..9999999}.tar": "at most 1,000,000 names",
        "train-*.tar?files=*.tar": "a pattern or files=, not both",
        "*.tar?files=a": "a pattern or files=, not both",
    }.items():
        with pytest.raises(SpecError, match=reason):
            keys(pattern)
    (tmp_path / "{a}[0].tar").write_bytes((tmp_path / "train-00.tar").read_bytes())
    assert keys("{a}[0].tar") == ["0000"]


def test_blocks_of_a_large_tar_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", [(f"{i}.jpg", bytes(1000)) for i in range(10)])
    monkeypatch.setattr(tar, "BLOCK_BYTES", 3 * 1536)
    assert open_source(path).blocks() == [(0, 3), (3, 6), (6, 9), (9, 10)]
    monkeypatch.setattr(tar, "BLOCK_BYTES", 10)
    assert open_source(path).blocks() == [(i, i + 1) for i in range(10)]


def test_many_files_in_few_descriptors(tmp_path: Path) -> None:
    for number in range(150):
        write(tmp_path / f"{number:03d}.tar", samples(range(number, number + 1)))
    source = open_source(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for sample, number in zip(source.read([*range(150), 0, 149]), [*range(150), 0, 149], strict=True):
        assert sample.raw == make_jpeg(number)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 128


def test_pixels_of_a_jpeg_equal_those_from_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", samples(range(4), "x/"))
    for i in range(4):
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / f"{i:04d}.jpg").write_bytes(make_jpeg(i))
    for left, right in zip(
        open_source(tmp_path / "a.tar").read(range(4)), open_source(tmp_path / "f").read(range(4)), strict=True
    ):
        assert isinstance(left.raw, bytes)
        assert decode_image(left.raw).equal(decode_image(right.raw))


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        add_tar_member(archive, "bad\udcff.jpg", b"1")
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="not valid Unicode"):
        open_source(tmp_path / "a.tar")
