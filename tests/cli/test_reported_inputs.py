"""Inputs that users of such tools have reported in public, and the result that each must have: one entry a report.

A new report is one more `Case` in the table of its kind. `make` writes the files into an empty folder, which is also
the working folder, and returns the command line; the command runs in this process, as `softlabel` would.
"""

import gzip
import json
import re
import shlex
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import softlabel
from softlabel import generate, open_store
from softlabel.cli.main import main
from softlabel.common.places import absolute_source, absolute_spec
from softlabel.common.spec import parse_spec
from softlabel.dataset import open_source
from softlabel.models import build_model
from tests.support.commands import make_environment
from tests.support.datasets import add_tar_member, make_jpeg, write_dataset


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input, the command that meets it, and what has to come of it.

    Attributes:
        name: of the test.
        make: writes the input into a folder; returns the arguments of the command.
        code: the exit code.
        says: regular expressions, each found in what the command prints, on either stream.
        never: regular expressions, none of which is found there.
        check: looks at what the command left in the folder.
    """

    name: str
    make: Callable[[Path], Sequence[object]]
    code: int = 0
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    check: Callable[[Path], None] | None = None

    def __str__(self) -> str:
        return self.name


# ---- datasets ----


def empty_folder(folder: Path) -> list[object]:
    (folder / "images").mkdir()
    return ["generate", "--data", "images", "--teacher", "zoo:resnet8@w.pt", "--out", "labels"]


def several_labels_each(folder: Path) -> list[object]:
    images = [make_jpeg(number) for number in range(4)]
    columns = {"image": pa.array([{"bytes": image} for image in images]), "label": pa.array([[0], [1], [0, 1], [1]])}
    pq.write_table(pa.table(columns), folder / "d.parquet")
    return label_all(folder, "d.parquet")


def tar_with_class_folders(folder: Path) -> list[object]:
    with tarfile.open(folder / "d.tar", "w") as archive:
        for number in range(4):
            add_tar_member(archive, f"{'cat' if number % 2 else 'dog'}/{number}.jpg", make_jpeg(number))
    return label_all(folder, "d.tar")


def paint(path: Path, colour: int = 9) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 255 - colour, 7)).save(path)


def label_all(folder: Path, data: str, classes: int = 10) -> list[object]:
    """A command that labels `data` with a network of random weights."""
    torch.save(build_model("zoo:resnet8", num_classes=classes).state_dict(), folder / "w.pt")
    teacher = f"zoo:resnet8@w.pt?num_classes={classes}&resize=8"
    return ["generate", "--data", data, "--teacher", teacher, "--out", "labels", "--batch-size", 4, "--no-preflight"]


def stored(labels: dict[str, int | None]) -> Callable[[Path], None]:
    """Checks the keys and hard labels of the store that was made."""

    def check(folder: Path) -> None:
        taken = open_store(folder / "labels").take(range(len(labels)))
        found = dict(zip(taken.keys, taken.labels.tolist(), strict=True))
        assert found == {key: -100 if label is None else label for key, label in labels.items()}

    return check


def technical_folders(folder: Path) -> list[object]:
    for name in ("ant/1.png", "bee/2.png", "__MACOSX/ant/1.png", "lost+found/3.png", "Trash/"):
        (folder / "d" / name).mkdir(parents=True) if name.endswith("/") else paint(folder / "d" / name)
    return label_all(folder, "d", classes=2)


def misplaced_images(folder: Path) -> list[object]:
    for name in ("ant/1.png", "bee/2.png", "bee/3.png", "bee/deep/4.png", "loose.png"):
        paint(folder / "d" / name)
    (folder / "d" / "bee" / "5.heic").write_bytes(b"")
    return label_all(folder, "d", classes=2)


def few_wide_images(folder: Path) -> list[object]:
    """One dark 16-bit PNG file among 29 ordinary ones, where no glance falls."""
    (folder / "d").mkdir()
    for number in range(30):
        grey_HW = np.full((8, 8), 200, np.uint16 if number == 5 else np.uint8)
        Image.fromarray(grey_HW).save(folder / "d" / f"{number:02}.png")
    return [*label_all(folder, "d"), "--on-bad-image", "error"]


def unequally_wide_images(folder: Path) -> Sequence[object]:
    command = wide_images(16)(folder)
    Image.fromarray(np.full((32, 32), 200, np.uint16)).save(folder / "d" / "dark.png")
    return command


def wide_images(bits: int, options: str = "", store: bool = False) -> Callable[[Path], Sequence[object]]:
    """16-bit PNG files that use so many bits; with `store`, labelled already, and the command trains."""

    def make(folder: Path) -> list[object]:
        (folder / "d").mkdir()
        for name, grey_HW in WIDE.items():
            Image.fromarray(grey_HW >> (16 - bits)).save(folder / "d" / name)
        command = [*label_all(folder, "d" + options), "--device", "cpu"]
        command.remove("--no-preflight")
        if not store:
            return command
        assert main([str(one) for one in command]) == 0
        return ["train", "--data", "d?bits=8", "--labels", "labels", "--student", "zoo:resnet8", "--out", "r"]

    return make


WIDE = {f"{i:02}.png": np.random.default_rng(i).integers(0, 1 << 16, (8, 8), dtype=np.uint16) for i in range(12)}


def labelled_as(pixels: dict[str, NDArray[np.uint8]], decoding: dict[str, object]) -> Callable[[Path], None]:
    """Checks every row against the network of `label_all`, run here on these (H, W, 3)."""

    def check(folder: Path) -> None:
        network = build_model("zoo:resnet8", num_classes=10).eval()
        network.load_state_dict(torch.load(folder / "w.pt"))
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        opened = open_store(folder / "labels")
        taken = opened.take(range(len(pixels)))
        images = torch.from_numpy(np.stack([pixels[key] for key in taken.keys])).float() / 255
        with torch.inference_mode():
            logits = network(((images - mean) / std).permute(0, 3, 1, 2)).numpy() / 4
        assert np.abs(taken.scaled_logits - (logits - logits.max(axis=1, keepdims=True))).max() < 2e-3
        assert opened.manifest.recorded.get("decoding", {}) == decoding

    return check


def as_rgb(grey_HW: NDArray[np.uint16]) -> NDArray[np.uint8]:
    return np.repeat((grey_HW >> 8).astype(np.uint8)[:, :, None], 3, axis=2)


def turned_by_exif(folder: Path) -> list[object]:
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "d").mkdir()
    for name, grey_HW in WIDE.items():
        Image.fromarray(as_rgb(grey_HW)).save(folder / "d" / name, exif=exif)
    return [*label_all(folder, "d?exif=ignore"), "--device", "cpu"]


def listed(text: str, file: str = "list.txt", options: str = "") -> Callable[[Path], Sequence[object]]:
    """Three images, and a list of them that is the data."""

    def make(folder: Path) -> list[object]:
        for colour, name in enumerate(("a.png", "b.png", "c d.png")):
            paint(folder / name, colour)
        (folder / file).write_text(text)
        (folder / "names").write_text("cat\nred fox\n")

        return label_all(folder, file + options, classes=2)

    return make


def metadata_beside_images(folder: Path) -> list[object]:
    for name in ("train/a.png", "train/b.png"):
        paint(folder / "d" / name)
    (folder / "d" / "train" / "metadata.csv").write_text("file_name,text,target\na.png,one,1\n")
    (folder / "d" / "captions.jsonl").write_text('{"file_name": "train/a.png", "text": "one"}\n')
    return label_all(folder, "d")


def packed(name: str, pack: Callable[[bytes], bytes]) -> Callable[[Path], Sequence[object]]:
    """Bytes of a tar file, packed, under this name."""

    def make(folder: Path) -> list[object]:
        (folder / name).write_bytes(pack(b"\0" * 10240))
        return label_all(folder, name)

    return make


LISTS = [
    *(
        Case(name=f"a list with {what}", make=listed(text, *more), says=("3 samples, ",), check=stored(labels))
        for labels in ({"a.png": 0, "b.png": 1, "c d.png": None},)
        for what, text, *more in (
            ("tabs and names of classes", "a.png\tcat\nb.png\tred fox\nc d.png\n", "list.tsv", "?classes=names"),
            ("spaces", "a.png 0\nb.png   1\nc d.png\n"),
            ("quoted paths and spaces", '"a.png" 0\nb.png 1\n"c d.png"'),
            ("./ and a comment", "# all\n./a.png,0\n./b.png, 1\n.//c d.png,-1\n"),
            ("numbers as texts and floats", 'a.png,0.0\nb.png,"1"\nc d.png,'),
            ("a heading and semicolons", "Filename;id;Class\na.png;7;0\nb.png;8;1\nc d.png;9;\n", "list.csv"),
            ("an index that pandas writes", ",path,label\n0,a.png,0\n1,b.png,1\n2,c d.png,\n", "list.csv"),
            ("the columns of pandas", ",label,image_id\n0,0,a.png\n1,1,b.png\n2,,c d.png\n", "list.csv"),
            ("a heading with other words", "id,kind\na.png,0\nb.png,1\nc d.png,", "l.csv", "?image=id&label=kind"),
            (
                "JSON in lines",
                '{"file_name": "a.png", "label": "0"}\n{"file_name": "b.png", "label": 1.0}\n{"file_name": "c d.png"}',
                "metadata.jsonl",
            ),
        )
    ),
    *(
        Case(name=f"a list with {what}", make=listed(text), code=1, says=(says,))
        for what, text, says in (
            ("names of classes", "a.png,cat\n", r"line 1: expected a class number, found 'cat'; .*\?classes=FILE"),
            ("two labels for a file", "a.png,1\n./a.png,2\n", "one label for each file, found 1 and 2 for 'a.png'"),
            ("three columns", "a.png,1,2\n", r"line 1: expected PATH or PATH,LABEL, found 'a.png,1,2'"),
            ("two words that are no file", "one two\n", "found 'one two', and neither 'one two' nor 'one' is a file"),
            (
                "the label first",
                "1,a.png\n",
                "a class number after the path, found '1,a.png'; .* path before its label",
            ),
            (
                "a number before each path",
                "1 a.png\n2 b.png\n",
                "found '1 a.png', of which 'a.png' is a file; remove '1'",
            ),
            ("a heading without paths", "x,y,label\n", r"a column of paths, found x, y, label; .*\?image=COLUMN"),
        )
    ),
    Case(
        name="a list with other columns alone",
        make=listed("file_name,text\na.png,one\n"),
        says=("1 sample, none with a hard label", r"'\?label=COLUMN' takes one of text"),
    ),
    Case(
        name="metadata.csv beside images",
        make=metadata_beside_images,
        says=(
            "'train/metadata.csv' lists images with labels, .* --data d/train/metadata.csv uses them",
            r"'captions.jsonl' lists images with columns file_name, text, .*'d/captions.jsonl\?label=COLUMN' uses it",
        ),
    ),
]


def no_samples(data: str, *command: str) -> Callable[[Path], Sequence[object]]:
    def make(folder: Path) -> list[object]:
        label_all(folder, data)
        (folder / "list.txt").write_text("# nothing\n")
        return [*command, "--data", data]

    return make


def zipped(data: str) -> Callable[[Path], Sequence[object]]:
    """A Parquet file at the root and in a folder of a zip archive."""

    def make(folder: Path) -> list[object]:
        write_dataset(folder / "a.parquet", 4)
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            for name in ("a.parquet", "in/a.parquet"):
                archive.write(folder / "a.parquet", name)
        return label_all(folder, data.replace("HERE", str(folder)), classes=4)

    return make


DATA = [
    *LISTS,
    *(
        Case(
            name=f"data at {data}",
            make=zipped(data),
            says=(r"4 samples, 4 with a hard label",),
            check=stored({f"image-{number:05d}.jpg": number for number in range(4)}),
        )
        for data in (
            "zip://in/a.parquet::a.zip",
            "zip://a.parquet::a.zip",
            "zip://in::a.zip",
            "zip://in/*.parquet::file://HERE/a.zip",
            "zip://in/{a}.parquet::a.zip",
            "simplecache::file://HERE/a.parquet",
        )
    ),
    Case(
        name="a pattern of archives",
        make=zipped("zip://a.parquet::*.zip"),
        code=2,
        says=("expected a pattern only in the first path of a chain",),
    ),
    *(
        Case(
            name=f"{command[0]} with {data}",
            make=no_samples(data, *command),
            code=code,
            says=(re.escape(f"{data}: {says}"),),
        )
        for data, code, says in (
            ("digits?rows=0:0", 2, "expected at least one sample, found none: rows= selects none of 1,797;"),
            ("list.txt", 1, "expected at least one sample, found none; check"),
        )
        for command in (
            ("generate", "--teacher", "zoo:resnet8@w.pt", "--out", "labels"),
            ("train", "--student", "zoo:cnn2", "--out", "run"),
            ("evaluate", "--model", "zoo:resnet8@w.pt"),
        )
    ),
    *(
        Case(name=f"data that is {name}", make=packed(name, pack), code=code, says=(says,))
        for name, pack, code, says in (
            ("images.zip", bytes, 2, "found a .zip file; unpack 'images.zip' into a folder and give that"),
            ("a.tar", gzip.compress, 1, "a.tar: expected a tar file, found a file compressed by gzip; unpack it"),
            ("a.parquet", gzip.compress, 1, "expected a Parquet file, found a file compressed by gzip; unpack it"),
        )
    ),
    *(
        Case(
            name=f"16-bit images that use {bits} bits",
            make=wide_images(bits),
            says=(rf"16-bit images with a largest value of \d+ \(12 of 12 sampled\): assumed to use {bits} bits",),
            check=labelled_as({key: as_rgb(grey_HW) for key, grey_HW in WIDE.items()}, {"bits": bits}),
        )
        for bits in (8, 12, 16)
    ),
    Case(
        name="a 16-bit image where none was looked for",
        make=few_wide_images,
        code=1,
        says=(r"16-bit pixels of at most 200: the number of bits in use is unknown.*bits=N",),
    ),
    Case(
        name="16-bit images of which one uses 8 bits",
        make=unequally_wide_images,
        says=("assumed to use 16 bits; 1 of the samples use at most 8 and become nearly black",),
    ),
    Case(
        name="images that are all black once decoded",
        make=wide_images(8, "?bits=16"),
        code=1,
        says=(r"d\?bits=16: expected samples that differ, found 8 of 8 ",),
    ),
    Case(
        name="a student whose images are decoded otherwise",
        make=wide_images(12, store=True),
        code=2,
        says=(r"decoding '\?exif=upright&bits=12' as when the store was labelled, found '\?exif=upright&bits=8'",),
    ),
    Case(
        name="EXIF data that shall not count",
        make=turned_by_exif,
        check=labelled_as({key: as_rgb(grey_HW) for key, grey_HW in WIDE.items()}, {"exif": "ignore"}),
    ),
    Case(
        name="EXIF data of pixels",
        make=lambda folder: label_all(folder, "digits?exif=ignore"),
        code=2,
        says=("exif= and bits= are for encoded images",),
    ),
    Case(
        name="technical folders among class folders",
        make=technical_folders,
        says=(
            "d: 2 samples, 2 with a hard label, from the class folders; 2 classes: 0 ant, 1 bee",
            "hidden and system files, never read: '__MACOSX/', 'lost\\+found/'",
            "sub-folders without images are not classes: 'Trash'; '\\?classes=FILE'",
        ),
        check=stored({"ant/1.png": 0, "bee/2.png": 1}),
    ),
    Case(
        name="images beside and below class folders, one of them HEIC",
        make=misplaced_images,
        says=(
            "d: 5 samples, 4 with a hard label",
            "'loose.png'; move them into one",
            "the label of the first folder of the path: 'bee/deep/4.png'",
            r"1 image of formats that are not read left out \(1 \.heic\)",
        ),
        check=stored({"ant/1.png": 0, "bee/2.png": 1, "bee/3.png": 1, "bee/deep/4.png": 1, "loose.png": None}),
    ),
    Case(
        name="a Parquet column of several labels each",
        make=several_labels_each,
        says=(r"none with a hard label \(column 'label' holds more than one class per row\)",),
        never=("no column is called label", r"\?label=label"),
    ),
    Case(
        name="tar shards with class folders",
        make=tar_with_class_folders,
        says=(r"none with a hard label \(no sample has \.cls members\)", "folders such as 'cat', 'dog' may be classes"),
    ),
    Case(name="an empty folder", make=empty_folder, code=2, says=("images: expected images, .* found 0 other files",)),
]

# ---- teachers ----


def beside_images(checkpoint: object) -> Callable[[Path], Sequence[object]]:
    """`generate` over 8 images with a resnet8 whose file holds this: bytes, or what torch saves."""

    def make(folder: Path) -> list[object]:
        write_dataset(folder / "data.parquet", 8)
        if isinstance(checkpoint, bytes):
            (folder / "w.pt").write_bytes(checkpoint)
        else:
            torch.save(checkpoint, folder / "w.pt")
        return ["generate", "--data", "data.parquet", "--teacher", "zoo:resnet8@w.pt", "--out", "labels"]

    return make


def weights(shift: float = 0.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = build_model("zoo:resnet8", num_classes=4).state_dict()
    return {name: value + shift if name == "linear.bias" else value for name, value in state.items()}


def the_average_labelled(folder: Path) -> None:
    assert open_store(folder / "labels").manifest.recorded["teachers"] == [
        "zoo:resnet8@w.pt?weights_key=state_dict_ema"
    ]


def answering(formula: str, *more: object) -> Callable[[Path], Sequence[object]]:
    """`generate` over 24 images with a network whose answer is this, of logits `z` (B, 4)."""

    def make(folder: Path) -> list[object]:
        write_dataset(folder / "data.parquet", 24)
        name = f"network_{abs(hash((formula, more)))}"  # Python keeps modules by their name
        (folder / f"{name}.py").write_text(
            "import torch\nfrom torch import nn\n"
            "class Network(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.linear = nn.Linear(192, 4)\n"
            "    def forward(self, x):\n"
            "        z = 20 * self.linear(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))\n"
            f"        return {formula}\n"
        )
        teacher = f"python:{name}:Network?resize=32&crop=32"
        return ["generate", "--data", "data.parquet", "--teacher", teacher, "--out", "labels", *more]

    return make


def recomputed(formula: str) -> Callable[[Path], Sequence[object]]:
    """`verify --recompute` of labels of such a network that were made without a look at it."""

    def make(folder: Path) -> list[object]:
        assert (
            main(
                [
                    str(one)
                    for one in answering(formula, "--no-preflight", "--shard-rows", 3, "--batch-size", 12)(folder)
                ]
            )
            == 0
        )
        return ["verify", "labels", "--recompute", 16]

    return make


TEACHERS = [
    Case(name="a network", make=answering("z"), never=("expected", "depends")),
    Case(name="labels recomputed", make=recomputed("z"), never=("DIFFERENT",)),
    Case(
        name="labels recomputed that are others now",
        make=recomputed("(z - z.mean(dim=0)) / 5"),
        code=3,
        says=(r"DIFFERENT: the teachers give other labels.*\d nats apart",),
    ),
    Case(
        name="one output",
        make=answering("z[:, :1]"),
        code=2,
        says=("network_.*: expected logits of at least 2 classes, found a network with one output",),
    ),
    Case(
        name="active dropout",
        make=answering("nn.functional.dropout(z, 0.5, True)"),
        code=1,
        says=(r"network_.*: expected the same logits for the same batch, found differences up to \d.*random",),
    ),
    Case(
        name="a network that normalises over its batch",
        make=answering("(z - z.mean(dim=0)) / 5", "--batch-size", 12),
        code=1,
        says=(r"network_.*depend on the others in the batch.*differ by up to \d.*--batch-size 1",),
    ),
    Case(name="the same alone", make=answering("z - z.mean(dim=0) + z", "--batch-size", 1)),
    Case(
        name="a network that looks at its batch a little",
        make=answering("z + 0.01 * z.mean(dim=0)"),
        says=(r"warning: python:network_.*depend on the others in the batch.*differ by up to 0\.",),
    ),
    Case(name="a sigmoid", make=answering("z.sigmoid()"), code=1, says=("found values from .* as of a sigmoid",)),
    Case(
        name="percentages",
        make=answering("100 * z.softmax(dim=1)"),
        code=1,
        says=("found probabilities .*every row sums to 100",),
    ),
    Case(name="a last ReLU", make=answering("z.relu()"), says=("warning: .*found values from .*, none below 0",)),
    Case(
        name="a teacher that says the same of every image",
        make=beside_images({name: value * (name != "linear.weight") for name, value in weights().items()}),
        code=1,
        says=("expected labels that differ, found 8 of 8",),
    ),
    Case(
        name="a checkpoint with an average of the weights",
        make=beside_images({"state_dict": weights(), "state_dict_ema": weights(1.0)}),
        says=("several sets of weights: took state_dict_ema, left out state_dict; .*weights_key=.* chooses",),
        check=the_average_labelled,
    ),
    Case(
        name="an average of the weights without names",
        make=beside_images({"model": weights(), "ema": {"decay": 0.9, "shadow_params": list(weights().values())}}),
        says=(r"holds an average of the weights without their names \(ema\.shadow_params\), which cannot be taken",),
    ),
    Case(
        name="a checkpoint of Lightning",
        make=beside_images({"state_dict": {f"model.{k}": v for k, v in weights().items()}}),
    ),
    Case(
        name="a pointer of git-lfs",
        make=beside_images(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        code=1,
        says=(r"w\.pt: expected .*, found a pointer of git-lfs .*'git lfs pull'",),
    ),
]

# ---- stores ----

STORES: list[Case] = []

# ---- command lines ----


def options_in_a_file(text: str, *more: object) -> Callable[[Path], Sequence[object]]:
    """Training with some options in a YAML file, into a folder that holds a finished run."""

    def make(folder: Path) -> list[object]:
        write_dataset(folder / "data.parquet", 8)
        (folder / "run").mkdir()
        for name in ("model.json", "model.safetensors", "run.json"):
            (folder / "run" / name).write_text("{}")
        (folder / "options.yaml").write_text(text)
        command = ["train", "--data", "data.parquet", "--student", "zoo:cnn2", "--out", "run", "--epochs", "1"]
        return [*command, "--device", "cpu", "--tensorboard=no", "--config", "options.yaml", *more]

    return make


def the_old_run_is_there(folder: Path) -> None:
    assert (folder / "run" / "run.json").read_text() == "{}"


HOLDS_ANOTHER = "run: holds another run"


def one_row_at_one_pixel(folder: Path) -> list[object]:
    (folder / "d/a").mkdir(parents=True)
    (folder / "d/b").mkdir()
    for number in range(2):
        Image.new("RGB", (4, 4), (number * 90, 0, 0)).save(folder / "d" / "ab"[number] / "image.png")
    return ["train", "--data", "d", "--student", "zoo:resnet8?resize=4&crop=4", "--batch-size", 1, "--out", "r"]


COMMANDS: list[Case] = [
    Case(
        name="batch norm of one row at one pixel",
        make=one_row_at_one_pixel,
        code=2,
        says=("its batch norm needs at least 2 values of a channel, found 1 .*; use a larger --batch-size",),
    ),
    *(
        Case(
            name=f"a file with {text}",
            make=options_in_a_file(text, *more),
            code=2,
            says=(says,),
            check=the_old_run_is_there,
        )
        for text, says, *more in (
            ('overwrite: "false"', HOLDS_ANOTHER),
            ('overwrite: "No"', HOLDS_ANOTHER),
            ("overwrite: 1", "--overwrite: expected true or false, found '1'"),
            ("overwrite: null", "overwrite: expected true or false, found nothing"),
            ("overwrite: true", HOLDS_ANOTHER, "--overwrite=false"),
            ("epochs: true", "--epochs: expected a whole number, found 'True'"),
            ("lr: [0.1, fast]", "--lr: expected a number, found 'fast'"),
            ("accumulate: null", "accumulate: expected a whole number, found nothing"),
            ("ignore_labels: 'off'\nselect: first", "--select: expected last or best, found 'first'"),
        )
    ),
    Case(
        name="shards of one image",
        make=lambda folder: [*beside_images(weights())(folder), "--shard-rows", "1", "--batch-size", "16"],
        says=("warning: --shard-rows 1: .* padded to 16, so that 128 pass through the teachers for 8;",),
    ),
    Case(
        name="shards of a batch",
        make=lambda folder: [*beside_images(weights())(folder), "--shard-rows", "4", "--batch-size", "4"],
        never=("padded",),
    ),
    Case(
        name="a flag before a path",
        make=lambda folder: ["inspect", "--json", "nothing"],
        code=2,
        says=("nothing: no store here",),
    ),
    Case(
        name="a flag with a value",
        make=lambda folder: ["inspect", "--json=maybe", "nothing"],
        code=2,
        says=("--json: expected true or false, found 'maybe'",),
    ),
    Case(
        name="the help of train",
        make=lambda folder: ["train", "--help"],
        says=(
            "rises for 30% of",
            r"\(default: 10\)",
            r"\{crop-flip,crop,none\}",
            "\n  softlabel train .* --out runs/kd\n",
        ),
        never=("%%", "Literal", "Optional", "type:", "null"),
    ),
    Case(name="the version", make=lambda folder: ["--version"], says=(f"softlabel {softlabel.__version__}\n",)),
]


def test_paths_with_a_question_mark_or_a_tilde_and_the_command_that_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data, checkpoint, store and run below `what? & %3F`, in the home folder."""
    here = tmp_path / "what? & %3F"
    here.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_dataset(here / "data.parquet", 8)
    torch.save(weights(), here / "w.pt")
    written = "what%3F & %253F"
    small = ["--device", "cpu", "--batch-size", "8"]
    teacher = f"zoo:resnet8@~/{written}/w.pt"
    data = ["--data", f"~/{written}/data.parquet?rows=0:8"]
    assert main(["generate", *data, "--teacher", teacher, f"--out=~/{here.name}/labels", *small]) == 0
    assert (here / "labels" / "manifest.json").is_file()
    assert len(open_store(f"~/{here.name}/labels")) == 8
    run = ["--labels", here / "labels", "--student", "zoo:cnn2", "--epochs", "1", "--tensorboard=no", *small]
    capsys.readouterr()
    assert main(["train", "--data", str(here / "data.parquet"), f"--out=~/{here.name}/run", *map(str, run)]) == 0
    (printed,) = re.findall(r"measure it with: softlabel (.*)", capsys.readouterr().out)
    assert main(shlex.split(printed)) == 0
    assert "accuracy" in capsys.readouterr().out
    again = ["generate", *data, "--teacher", f"run:~/{written}/run", "--out", "of-the-student", *small]
    assert main(again) == 0
    # What a store has recorded can be read again.
    (tmp_path / "of-the-student" / "shards").rename(tmp_path / "gone")
    assert main(["repair", "of-the-student", "--device", "cpu"]) == 0
    # The workers of a cluster have other working folders.
    monkeypatch.chdir(here)
    assert (
        open_source(absolute_source("data.parquet?rows=0:8")).fingerprint() == open_source("data.parquet").fingerprint()
    )
    assert parse_spec(absolute_spec("zoo:resnet8@w.pt")).checkpoint == str(here / "w.pt")


def test_chinese_class_names_where_the_locale_is_ascii(tmp_path: Path) -> None:
    """What Python is where its UTF-8 mode is switched off; it switches it on by itself under a bare LC_ALL=C."""
    paint(tmp_path / "d" / "\u732b" / "1.png")
    paint(tmp_path / "d" / "\u72d7" / "2.png")
    torch.save(build_model("zoo:resnet8", num_classes=2).state_dict(), tmp_path / "w.pt")
    generate(
        tmp_path / "d",
        teachers=[f"zoo:resnet8@{tmp_path / 'w.pt'}?num_classes=2&resize=8"],
        out=tmp_path / "labels",
        preflight=False,
        device="cpu",
    )
    (tmp_path / "list.csv").write_text("d/\u732b/1.png,0\n", encoding="utf-8")
    code = (
        "from softlabel.cli.main import main; print(main(['inspect', 'labels']));"
        "print([main(['generate', '--data', data, '--teacher', 'zoo:resnet8@w.pt?num_classes=2&resize=8', '--out', 'x',"
        "'--no-preflight', '--device', 'cpu']) for data in ('d', 'list.csv')])"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={**make_environment(), **ascii_only}, capture_output=True, check=False
    )
    stdout, stderr = done.stdout.decode(), done.stderr.decode()
    assert "classes    2: \\u72d7, \\u732b" in stdout, stderr
    assert stdout.splitlines()[-1] == "[1, 2]", stderr
    assert re.search(
        "d: a file name is not valid Unicode: .*; the locale reads names as ascii: start with PYTHONU", stderr
    )
    assert re.search("expected names in the encoding of the locale, ascii, found: .* start with PYTHONUTF8=1", stderr)
    assert "Traceback" not in stderr


@pytest.mark.parametrize("case", [*DATA, *TEACHERS, *STORES, *COMMANDS], ids=str)
def test_input(
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(argument) for argument in case.make(tmp_path)]
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    # pytest takes the log lines, which a user sees on standard error.
    printed = "\n".join([*capsys.readouterr(), caplog.text])
    assert code == case.code, printed
    for pattern in case.says:
        assert re.search(pattern, printed), f"expected {pattern!r} in\n{printed}"
    for pattern in case.never:
        assert not re.search(pattern, printed), f"unexpected {pattern!r} in\n{printed}"
    if case.check is not None:
        case.check(tmp_path)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Make a folder read-only for the user who runs the tests, also for root."""
    mounted: list[Path] = []

    def protect(folder: Path) -> None:
        for command in (["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder]):
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode:
                pytest.skip(f"cannot mount a folder read-only here: {done.stderr.decode().strip()}")
            mounted.append(folder)
        with pytest.raises(OSError, match="Read-only"):
            (folder / "probe").touch()

    yield protect
    for folder in dict.fromkeys(mounted):
        subprocess.run(["umount", folder], capture_output=True, check=True)


def test_what_is_finished_needs_nothing_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read_only: Callable[[Path], None],
) -> None:
    """The same commands again over a store, a mixture, an export and a run on a disk that takes no writes."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data.parquet", 8)
    torch.save(weights(), tmp_path / "w.pt")
    given = ["generate", "--data", "data.parquet", "--teacher", "zoo:resnet8@w.pt", "--batch-size", "8"]
    generate = [*given, "--device", "cpu", "--out", "made/labels"]
    student = ["--student", "zoo:cnn2", "--epochs", "1", "--batch-size", "8", "--tensorboard=no", "--device", "cpu"]
    commands = [
        generate,
        ["combine", "made/labels", "made/mixed", "--temperature", "2"],
        ["export", "made/labels", "made/exported", "--to", "hf"],
        ["train", "--data", "data.parquet", "--labels", "made/labels", "--out", "made/run", *student],
        ["verify", "made/labels"],
        ["repair", "made/labels", "--device", "cpu"],
    ]
    for command in commands:
        assert main(command) == 0
    read_only(tmp_path / "made")
    capsys.readouterr()
    for command in commands:
        assert main(command) == 0, (command, capsys.readouterr())
    said = capsys.readouterr().out
    assert said.count("nothing to do") == 3
    assert "already trained" in said
    assert "nothing to repair" in said
    write_dataset(tmp_path / "grown.parquet", 12)
    for other in ([*generate, "--grow", "--data", "grown.parquet"], [*given, "--out", "made/new"]):
        assert main(other) == 1
        error = capsys.readouterr().err
        assert "Read-only file system; finished shards are kept: get write permission" in error


def test_the_folder_of_an_export_is_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data.parquet", 8)
    torch.save(weights(), tmp_path / "w.pt")
    out = ["--out", "labels", "--device", "cpu", "--batch-size", "8", "--shard-rows", "4"]
    assert main(["generate", "--data", "data.parquet", "--teacher", "zoo:resnet8@w.pt", *out]) == 0
    assert main(["export", "labels", "exported", "--to", "hf"]) == 0
    frame = pandas.read_parquet("exported")
    with open_store("labels") as store:
        rows = store.take(range(8))
        assert frame["key"].tolist() == list(rows.keys)
        wanted = rows.scaled_logits - rows.scaled_logits.max(axis=1, keepdims=True)
        assert np.array_equal(np.stack(frame["scaled_logits"]), wanted)
    said = json.loads((tmp_path / "exported" / "_softlabel-export.json").read_text())
    assert said["options"] == {"store": "labels", "out": "exported", "to": "hf"}


def test_an_address_without_a_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dask = pytest.importorskip("dask")
    pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    # A dashboard waits for a request, and so sends nothing.
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.server_port}"
        with dask.config.set({"distributed.comm.timeouts.connect": "0.5s"}):
            given = ["--batch-size", "8", "--scheduler", address]
            assert main([*map(str, beside_images(weights())(tmp_path)), *given]) == 2
        server.shutdown()
    error = capsys.readouterr().err
    assert f"--scheduler {address}: expected a Dask scheduler, found no" in error
    assert "dashboard 8787" in error
