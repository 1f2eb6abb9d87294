"""Folders of images against the file system and torchvision's ImageFolder."""

import contextlib
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from softlabel.dataset import open_source, report_source
from softlabel.errors import BadImageError, DataError, SpecError
from softlabel.inputs.base import IGNORE
from softlabel.inputs.image_decode import decode_image
from softlabel.inputs.image_transform import Preprocessing


def paint(path: Path, colour: int, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 255 - colour, 7)).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for number, name in enumerate(["zebra/b.png", "ant/10.png", "ant/9.PNG", "Bee/x.jpeg", "ant/a b&c?.png"]):
        paint(tmp_path / name, 10 * number)
    (tmp_path / "cat").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "ant" / "._10.png").write_bytes(b"what a Mac leaves behind")
    (tmp_path / ".cache").mkdir()
    paint(tmp_path / ".cache" / "thumbnail.png", 1)
    return tmp_path


def test_class_folders_are_those_of_torchvision(classes: Path) -> None:
    source = open_source(classes)
    (classes / "cat").rmdir()  # torchvision refuses a folder without an image
    reference = ImageFolder(str(classes))
    # torchvision takes hidden files and folders as well.
    wanted = [(path, label) for path, label in reference.samples if "/." not in path]
    names = [Path(path).relative_to(classes).as_posix() for path, _ in wanted]
    assert sorted(names) == source.keys() == ["Bee/x.jpeg", "ant/10.png", "ant/9.PNG", "ant/a b&c?.png", "zebra/b.png"]
    assert source.class_names == tuple(name for name in reference.classes if name != ".cache")
    assert source.class_names == ("Bee", "ant", "zebra")
    by_name = {name: reference.classes[label] for name, (_, label) in zip(names, wanted, strict=True)}
    for sample in source.read(range(len(source))):
        assert source.class_names[sample.label] == by_name[sample.key]
        assert sample.raw == (classes / sample.key).read_bytes()
    assert source.labels(1, 4).tolist() == [1, 1, 1]
    assert source.kind == "folder"


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in (2, 10, 1):
        paint(tmp_path / f"{i}.png", i)
    source = open_source(tmp_path)
    assert source.keys() == ["1.png", "10.png", "2.png"]
    assert (source.has_labels, source.class_names) == (False, None)
    assert source.labels().tolist() == [IGNORE] * 3
    with pytest.raises(SpecError, match=r"'1\.png' lies in no sub-folder"):
        open_source(f"{tmp_path}?labels=folders")


def test_folders_without_images_are_no_classes(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("__MACOSX/ant", "lost+found", "@eaDir"):
        paint(classes / name / "x.png", 3)
    source = open_source(classes)
    assert source.class_names == ("Bee", "ant", "zebra")
    assert source.labels().tolist() == [0, 1, 1, 1, 2]
    with caplog.at_level("INFO", "softlabel"):
        report_source(source)
    assert caplog.messages == [
        f"{classes}: 5 samples, 5 with a hard label, from the class folders; 3 classes: 0 Bee, 1 ant, 2 zebra",
        f"{classes}: other files, not read: 1 .txt",
        f"{classes}: hidden and system files, never read: '.cache/', '@eaDir/', '__MACOSX/', ...",
        f"{classes}: sub-folders without images are not classes: 'cat'; '?classes=FILE' names the class folders, one "
        "per line, with or without images",
    ]
    names = classes.parent / f"{classes.name}.txt"
    names.write_text("zebra\ncat\nant\nBee\n")
    named = open_source(f"{classes}?classes={names}")
    assert (named.class_names, named.labels().tolist()) == (("zebra", "cat", "ant", "Bee"), [3, 2, 2, 2, 0])
    names.write_text("zebra\nant\n")
    with pytest.raises(SpecError, match="a line for each of the 3 folders with images, found none for 'Bee'"):
        open_source(f"{classes}?classes={names}")
    with pytest.raises(SpecError, match="classes= names the class folders, labels=none"):
        open_source(f"{classes}?classes={names}&labels=none")


def test_a_misplaced_image_leaves_the_others_their_labels(classes: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One beside the class folders has no label; one below them has that of torchvision."""
    paint(classes / "loose.png", 3)
    paint(classes / "Bee" / "deep" / "y.png", 3)
    (classes / "ant" / "z.HEIC").write_bytes(b"")
    (classes / "ant" / "no-suffix").write_bytes(b"")
    source = open_source(classes)
    by_key = dict(zip(source.keys(), source.labels().tolist(), strict=True))
    assert by_key.pop("loose.png") == IGNORE
    reference = ImageFolder(str(classes), allow_empty=True)
    for path, label in reference.samples:
        key = Path(path).relative_to(classes).as_posix()
        if not any(part.startswith(".") for part in key.split("/")):
            assert source.class_names is not None
            assert source.class_names[by_key.pop(key)] == reference.classes[label]
    assert not by_key
    with caplog.at_level("WARNING", "softlabel"):
        report_source(source)
    for line in (
        r"1 image of formats that are not read left out \(1 \.heic\), the first: 'ant/z\.HEIC'; convert to JPEG or PNG",
        r"1 file without a suffix left out, the first: 'ant/no-suffix'; .* '--data LIST\.txt'",
        r"1 image lies in no class folder and gets no hard label: 'loose\.png'",
        r"1 image lies deeper than .* the label of the first folder of the path: 'Bee/deep/y\.png'",
    ):
        assert re.search(line, caplog.text)


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param(["a/1.png", "b/deep/2.png"], id="one of two deeper"),
        pytest.param(["images/1.png", "images/2.png"], id="one folder alone"),
        pytest.param(["train/a/1.png", "train/b/2.png", "val/a/3.png"], id="splits of class folders"),
    ],
)
def test_other_layouts_are_not_taken_for_classes(
    tmp_path: Path, paths: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for path in paths:
        paint(tmp_path / path, 3)
    source = open_source(tmp_path)
    assert source.keys() == sorted(paths)
    assert not source.has_labels
    report_source(source)
    assert "its sub-folders are not used as classes" in caplog.text


def test_labels_option_overrides_the_rule(tmp_path: Path, classes: Path) -> None:
    assert not open_source(f"{classes}?labels=none").has_labels
    assert not open_source(classes, ignore_labels=True).has_labels
    root = tmp_path / "deep"
    paint(root / "only" / "x" / "1.png", 3)
    source = open_source(f"{root}?labels=folders")
    assert (source.class_names, source.labels().tolist()) == (("only",), [0])
    with pytest.raises(SpecError, match="folders or none"):
        open_source(f"{root}?labels=yes")


def test_fingerprint_survives_a_move(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = open_source(classes).fingerprint()
    moved = tmp_path_factory.mktemp("elsewhere") / "renamed"
    classes.rename(moved)
    assert open_source(moved).fingerprint() == before
    (moved / "ant" / "10.png").rename(moved / "ant" / "11.png")
    assert open_source(moved).fingerprint() != before


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    paint(tmp_path / "real" / "1.png", 3)
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "b").symlink_to(tmp_path / "real")
    (root / "a" / "back").symlink_to(root)
    paint(root / "a" / "2.png", 4)
    assert open_source(root).keys() == ["a/2.png", "b/1.png"]


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    paint(tmp_path / "ok.png", 3)
    try:
        os.link(tmp_path / "ok.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system refuses names that are not Unicode")
    with pytest.raises(DataError, match="not valid Unicode"):
        open_source(tmp_path)


def test_unreadable_files_are_bad_images_with_their_labels(classes: Path) -> None:
    source = open_source(classes)
    (classes / "ant" / "10.png").unlink()
    (classes / "zebra" / "b.png").write_bytes(b"")
    gone, empty = source.read([1, 4])
    assert (gone.key, gone.label) == ("ant/10.png", 1)
    with pytest.raises(BadImageError, match="No such file"):
        decode_image(gone.raw)
    with pytest.raises(BadImageError, match="empty"):
        decode_image(empty.raw)


def test_a_vanished_disk_is_not_a_thousand_bad_images(classes: Path) -> None:
    source = open_source(classes)
    classes.rename(classes.with_name("gone"))
    with pytest.raises(DataError, match="cannot be read") as caught:
        source.read([0])
    assert not isinstance(caught.value, BadImageError)


def test_too_many_open_files_is_not_a_bad_image(classes: Path) -> None:
    """The real limit of the process, not a stand-in for it."""
    import resource

    source = open_source(classes)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(DataError, match="open files") as caught:
            source.read([0])
        assert not isinstance(caught.value, BadImageError)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file or folder"):
        open_source(tmp_path / "missing")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(SpecError, match=r"found a \.zip file"):
        open_source(tmp_path / "a.zip")
    with pytest.raises(SpecError, match="found 1 other files"):
        open_source(tmp_path)
    with pytest.raises(SpecError, match="download it first"):
        open_source("s3://bucket/images.npy")
    paint(tmp_path / "a.png", 3)
    with pytest.raises(SpecError, match="unknown option colour"):
        open_source(f"{tmp_path}?colour=red")
    with pytest.raises(SpecError, match="key_fn is only for a Dataset"):
        open_source(tmp_path, key_fn=str)


def test_images_beside_parquet_files_are_ambiguous(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 3)
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="1 Parquet and 1 image"):
        open_source(tmp_path)


def test_a_folder_whose_name_has_a_question_mark(tmp_path: Path) -> None:
    root = tmp_path / "what?=yes"
    paint(root / "1.png", 3)
    assert open_source(root).keys() == ["1.png"]


def test_pickling_and_memory(classes: Path) -> None:
    source = open_source(classes)
    again = pickle.loads(pickle.dumps(source))
    assert again.read([0, 2]) == source.read([0, 2])
    assert again.fingerprint() == source.fingerprint()
    assert again.labels().dtype == np.int64


def test_images_of_all_sizes_meet_in_one_batch(tmp_path: Path) -> None:
    """The ImageNet way: resize and crop belong to the teacher, so the folder may hold anything."""
    sizes = [(500, 375), (333, 500), (64, 64), (1, 1), (256, 224), (1000, 20)]
    for i, size in enumerate(sizes):
        paint(tmp_path / f"{i}.png", 20 * i, size)
    source = open_source(tmp_path)
    preprocessing = Preprocessing(resize=64, crop=56)
    shaped = [preprocessing.geometry(decode_image(sample.raw)) for sample in source.read(range(len(sizes)))]
    batch_BCHW = torch.stack(shaped)
    assert batch_BCHW.shape == (6, 3, 56, 56)
    assert batch_BCHW[:, 0].float().std(dim=(1, 2)).max() == 0
    assert batch_BCHW[:, 0, 0, 0].tolist() == [20 * i for i in range(6)]
