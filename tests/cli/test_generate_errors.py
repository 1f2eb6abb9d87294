"""What a user can get wrong, and what data and disks do: one clear line, the right exit code, nothing lost."""

import io
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import softlabel
from tests.support.commands import drop_source_lines, run_softlabel
from tests.support.datasets import CLASSES, make_jpeg, write_dataset, write_parquet
from tests.support.processes import start_interpreter, start_softlabel
from tests.support.teachers import write_teacher


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a teacher and the store of the two."""
    folder = tmp_path_factory.mktemp("ready")
    data = write_dataset(folder / "data.parquet", 60)
    teacher = write_teacher(folder / "teacher.safetensors")
    options = ["--data", data, "--teacher", teacher, "--out", folder / "store", "--temperature", 2, "--batch-size", 20]
    run_softlabel("generate", *options)
    return folder


def again(ready: Path, **changes: object) -> list[object]:
    options = {
        "data": ready / "data.parquet",
        "teacher": f"zoo:resnet8@{ready / 'teacher.safetensors'}",
        "batch_size": 20,
        "out": ready / "store",
        "temperature": 2,
        **changes,
    }
    return ["generate", *(part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value))]


def test_the_same_command_again_does_nothing(ready: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (ready / "store").rglob("*") if path.is_file()}
    assert "already complete, 60 rows" in run_softlabel(*again(ready)).stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_run_into_the_same_store_is_refused_by_name(ready: Path) -> None:
    before = softlabel.open_store(ready / "store", verify="full").take(np.arange(60)).scaled_logits
    other_teacher = write_teacher(ready / "other.safetensors", seed=1)
    shorter = write_dataset(ready / "shorter.parquet", 59)
    renamed = write_parquet(
        ready / "renamed.parquet", [make_jpeg(n) for n in range(60)], keys=[f"{n}" for n in range(60)]
    )
    good = [make_jpeg(n) for n in range(60)]
    labels = [n % len(CLASSES) for n in range(60)]
    repainted = write_parquet(ready / "repainted.parquet", [make_jpeg(n + 500) for n in range(60)], labels=labels)
    relabelled = write_parquet(ready / "relabelled.parquet", good, labels=labels[1:] + labels[:1])
    for changes, named in [
        ({"teacher": other_teacher}, "teacher"),
        ({"temperature": 4}, "temperature"),
        ({"format": "hdf5"}, "format"),
        ({"combine": "probs"}, "combine"),
        ({"data": shorter}, "dataset"),
        ({"data": renamed}, "dataset"),
        ({"shard_rows": 7}, "shard"),
        ({"data": repainted}, "content of"),
        ({"data": relabelled}, "hard label of"),
    ]:
        refused = run_softlabel(*again(ready, **changes), code=2)
        (line,) = drop_source_lines(refused.stderr)
        assert line.startswith("softlabel: ")
        assert named in line
        assert str(ready / "store") in line
    np.testing.assert_array_equal(
        softlabel.open_store(ready / "store", verify="full").take(np.arange(60)).scaled_logits, before
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "nowhere.parquet"}, "nowhere.parquet"),
        ({"teacher": "zoo:resnet8"}, "zoo:resnet8"),
        ({"teacher": "zoo:resnet9@x.safetensors"}, "resnet9"),
        ({"teacher": "zoo:resnet8@missing.safetensors"}, "missing.safetensors"),
        ({"teacher": "nonsense"}, "nonsense"),
        ({"weights": "0"}, "weights"),
        ({"temperature": 0}, "temperature"),
        ({"device": "tpu"}, "device"),
        ({"combine": "votes"}, "combine"),
        ({"batch_size": "many"}, "batch-size"),
        ({"workers": -1}, "workers"),
        ({"seed": -1}, "seed"),
        ({"device": "meta"}, "device"),
        ({"encoding": "topk", "top_k": 0}, "topk"),
        ({"top_k": 3}, "--top-k belongs to --encoding topk"),
        ({"teach": "zoo:resnet8"}, "--teach"),
    ],
    ids=str,
)
def test_mistakes_exit_with_2_and_one_line(ready: Path, changes: dict[str, object], said: str) -> None:
    done = run_softlabel(*again(ready, **{"out": ready / "unused", **changes}), code=2, cwd=ready)
    assert said in done.stderr
    assert not (ready / "unused" / "manifest.json").exists()


def test_a_request_that_lacks_something_names_the_options(ready: Path) -> None:
    for arguments, said in (
        (["generate", "--data", "digits"], "expected --teacher, --out, not given"),
        (["generate", "--data", "x", "--teacher", "y", "--out", "z", "--batch-size", "many"], "--batch-size"),
        (["inspect"], "expected store, not given"),
        (["plan", "--data", ready / "data.parquet", "--teacher", "y", "--seconds", 0], "--seconds"),
    ):
        output = run_softlabel(*arguments, code=2).stderr
        assert said in output
        assert len(output.strip().splitlines()) == 1, output


def test_a_teacher_that_gives_nan_is_named_with_the_image(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.parquet", 12)
    (tmp_path / "sick.py").write_text(
        "import torch\n"
        "class Sick(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(1, 4)\n"
        "    def forward(self, x):\n"
        "        z = x.flatten(1)[:, :4].clone()\n"
        "        z[5:6] = float('nan')\n"
        "        return z\n"
    )
    teacher = "python:sick:Sick?mean=0,0,0&std=1,1,1"
    done = run_softlabel("generate", "--data", data, "--teacher", teacher, "--out", "store", cwd=tmp_path, code=1)
    assert "image-00005.jpg" in done.stderr
    assert "sick:Sick" in done.stderr


def broken_images() -> dict[str, bytes]:
    good = make_jpeg(7, size=64)
    return {"cut.jpg": good[: len(good) // 2], "empty.jpg": b"", "text.jpg": b"this is no image at all"}


def test_bad_images_are_listed_skipped_and_counted(tmp_path: Path) -> None:
    keys, images = [], []
    for number in range(30):
        keys.append(f"good-{number}.jpg")
        images.append(make_jpeg(number))
    for position, (key, image) in zip((0, 11, 25), broken_images().items(), strict=True):
        keys.insert(position, key)
        images.insert(position, image)
    data = write_parquet(tmp_path / "data.parquet", images, keys=keys, labels=[n % 4 for n in range(33)])
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    options = ["generate", "--data", data, "--teacher", teacher, "--batch-size", 10]
    options += ["--out", tmp_path / "store", "--shard-rows", 10]
    done = run_softlabel(*options)
    assert "3 bad images" in done.stdout
    store = softlabel.open_store(tmp_path / "store", verify="full")
    assert len(store) == 30
    assert sorted(store.bad) == sorted(broken_images())
    assert all(store.bad.values())
    shown = run_softlabel("inspect", tmp_path / "store").stdout
    assert all(key in shown for key in broken_images())
    # The rows around them have the labels of their own image.
    alone = write_parquet(tmp_path / "alone.parquet", [make_jpeg(11)], keys=["good-11.jpg"])
    softlabel.generate(alone, teachers=[teacher], out=tmp_path / "one", progress=False)
    one = softlabel.open_store(tmp_path / "one").take([0]).scaled_logits
    there = store.take(store.lookup(["good-11.jpg"])).scaled_logits
    np.testing.assert_allclose(there, one, atol=2e-3, rtol=1e-3)

    refused = run_softlabel(*options[:-4], "--out", tmp_path / "strict", "--on-bad-image", "error", code=1)
    assert "cut.jpg" in refused.stderr


def test_images_of_every_mode_become_rgb(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    modes = {"L": (32, 32), "P": (32, 32), "CMYK": (32, 32, 4), "RGBA": (32, 32, 4), "LA": (32, 32, 2)}
    folder = tmp_path / "images"
    folder.mkdir()
    for mode, shape in modes.items():
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), None if mode == "P" else mode)
        if mode == "P":
            image = image.convert("P")
        image.save(folder / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    softlabel.generate(folder, teachers=[teacher], out=tmp_path / "store", progress=False)
    store = softlabel.open_store(tmp_path / "store")
    assert sorted(store.take(np.arange(5)).keys) == ["CMYK.jpg", "L.png", "LA.png", "P.png", "RGBA.png"]
    assert (store.labels == -100).all()


def test_a_first_shard_of_bad_images_alone_does_not_stop_the_others(tmp_path: Path) -> None:
    images = [b"", b"text", *(make_jpeg(n) for n in range(6))]
    data = write_parquet(tmp_path / "data.parquet", images)
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    run_softlabel("generate", "--data", data, "--teacher", teacher, "--out", tmp_path / "store", "--shard-rows", 2)
    assert len(softlabel.open_store(tmp_path / "store", verify="full")) == 6


def test_only_bad_images_make_no_store(tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "bad.parquet", [b"", b"text"], keys=["a.jpg", "b.jpg"])
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    done = run_softlabel("generate", "--data", data, "--teacher", teacher, "--out", tmp_path / "store", code=1)
    assert "a.jpg" in done.stderr
    with pytest.raises(softlabel.SoftLabelError, match="no store here"):
        softlabel.open_store(tmp_path / "store")


def test_equal_keys_of_other_images_are_not_trained_on(tmp_path: Path) -> None:
    fake = "torchvision:FakeData?size=60&image_size=[3,32,32]&num_classes=4"
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    run_softlabel("generate", "--data", fake, "--teacher", teacher, "--out", tmp_path / "store")
    data = write_parquet(
        tmp_path / "data.parquet",
        [make_jpeg(n) for n in range(60)],
        keys=[f"{n}" for n in range(60)],
        labels=[n % 4 for n in range(60)],
    )
    train = ["train", "--data", data, "--labels", tmp_path / "store", "--student", "zoo:resnet8", "--epochs", 1]
    done = run_softlabel(*train, "--out", tmp_path / "run", code=2)
    assert "another hard label" in done.stderr


def test_a_model_without_weights_or_of_other_classes_is_refused(ready: Path, tmp_path: Path) -> None:
    data = ready / "data.parquet"
    assert "random weights" in run_softlabel("evaluate", "--data", data, "--model", "zoo:resnet8", code=2).stderr
    seven = write_teacher(tmp_path / "seven.safetensors", num_classes=7)
    assert "7 classes" in run_softlabel("evaluate", "--data", data, "--model", seven, code=2).stderr
    into_store = ["train", "--data", data, "--student", "zoo:resnet8", "--epochs", 1, "--out", ready / "store"]
    assert "holds a store" in run_softlabel(*into_store, code=2).stderr


def test_a_refused_training_does_not_block_its_remedy(ready: Path, tmp_path: Path) -> None:
    more = write_dataset(tmp_path / "more.parquet", 63)
    train = ["train", "--data", more, "--labels", ready / "store", "--student", "zoo:resnet8", "--epochs", 1]
    train += ["--batch-size", 16, "--out", tmp_path / "run"]
    assert "image-00060.jpg" in run_softlabel(*train, code=1).stderr
    assert "trained for 1 epochs" in run_softlabel(*train, "--missing", "skip").stdout


def test_data_and_teachers_must_agree_on_classes(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.parquet", 8)
    seven = write_teacher(tmp_path / "seven.safetensors", num_classes=7)
    four = write_teacher(tmp_path / "four.safetensors")
    options = ["generate", "--data", data, "--out", tmp_path / "store"]
    done = run_softlabel(*options, "--teacher", seven, code=2)
    assert "7" in done.stderr
    assert "4" in done.stderr
    assert "7" in run_softlabel(*options, "--teacher", seven, "--teacher", four, code=2).stderr
    run_softlabel(*options, "--teacher", seven, "--ignore-labels")
    store = softlabel.open_store(tmp_path / "store")
    assert (store.labels == -100).all()
    assert store.run.num_classes == 7


def test_a_full_disk_is_one_line_and_the_store_can_be_resumed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        data = write_dataset(tmp_path / "data.parquet", 400)
        teacher = write_teacher(tmp_path / "teacher.safetensors")
        options = ["generate", "--data", data, "--teacher", teacher, "--shard-rows", 10, "--out", disk / "store"]
        options += ["--batch-size", 20]
        filler = disk / "filler"
        filler.write_bytes(bytes(80 * 1024))
        done = run_softlabel(*options, code=1)
        # One line, behind the warnings of random weights and of small shards.
        (output,) = [line for line in drop_source_lines(done.stderr) if not line.startswith("warning: ")]
        assert "disk is full" in output
        finished = len(list((disk / "store" / "shards").glob("[0-9]*.parquet")))
        assert finished > 0
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        filler.unlink()
        assert "complete, 400 rows" in run_softlabel(*options).stdout
        assert len(softlabel.open_store(disk / "store", verify="full")) == 400
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("number", "code", "word", "workers"),
    [
        (signal.SIGINT, 130, "interrupted", 0),
        pytest.param(signal.SIGTERM, 143, "terminated", 0, marks=pytest.mark.slow),
        (signal.SIGTERM, 143, "terminated", 2),
    ],
    ids=str,
)
def test_ctrl_c_and_sigterm_keep_what_is_finished(
    tmp_path: Path, number: signal.Signals, code: int, word: str, workers: int
) -> None:
    data = write_dataset(tmp_path / "data.parquet", 1500)
    teacher = write_teacher(tmp_path / "teacher.safetensors")
    store = tmp_path / "store"
    command = ["generate", "--data", data, "--teacher", teacher, "--out", store, "--shard-rows", 10, "--batch-size", 10]
    command += ["--workers", workers]
    process = (start_interpreter if workers else start_softlabel)(*command)
    while process.poll() is None and len(list(store.glob("shards/[0-9]*"))) < 5:
        time.sleep(0.002)
    process.send_signal(number)
    _, output = process.communicate()
    assert process.returncode == code
    assert output.splitlines()[-1].startswith(f"softlabel: {word};"), output
    assert "Traceback" not in output
    assert "resume" in output
    listed = json.loads((store / "manifest.json").read_text())["totals"]["shards"]
    assert listed >= 4
    assert "NOT COMPLETE" in run_softlabel("inspect", store).stdout
    assert "finished" in run_softlabel("verify", store, code=2).stderr
    with pytest.raises(softlabel.SoftLabelError, match="run the same"):
        softlabel.open_store(store)


def test_half_written_and_absent_stores(tmp_path: Path) -> None:
    for command in ("inspect", "verify"):
        assert "no store here" in run_softlabel(command, tmp_path / "nothing", code=2).stderr
    buffer = io.BytesIO(b"{")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "manifest.json").write_bytes(buffer.getvalue())
    assert "manifest.json" in run_softlabel("inspect", tmp_path / "half", code=1).stderr


def test_verify_names_a_damaged_file(ready: Path, tmp_path: Path) -> None:
    run_softlabel("generate", *again(ready)[1:-4], "--out", tmp_path / "store", "--temperature", 2)
    assert "whole" in run_softlabel("verify", tmp_path / "store").stdout
    shard = next((tmp_path / "store" / "shards").glob("*.parquet"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    assert shard.name in run_softlabel("verify", tmp_path / "store", code=3).stdout


def test_configuration_files(ready: Path, tmp_path: Path) -> None:
    printed = run_softlabel(*again(ready, out=tmp_path / "store"), "--print_config").stdout
    assert not (tmp_path / "store").exists()
    config = tmp_path / "config.yaml"
    # One teacher may stand there without a list around it.
    config.write_text(re.sub(r"teacher:\n *- (.*)\n", r"teacher: \1\n", printed))
    assert "teacher: zoo:" in config.read_text()
    run_softlabel("generate", "--config", config, "--temperature", 3)
    assert softlabel.open_store(tmp_path / "store").run.temperature == 3
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"manifest.json", "shards", "segments"}
    # The options lie in the manifest, which is hashed, and are a configuration again.
    config.write_text(run_softlabel("inspect", tmp_path / "store", "--options").stdout)
    assert "temperature: 3" in config.read_text()
    assert "already complete" in run_softlabel("generate", "--config", config).stdout
    assert run_softlabel("generate", "--config", tmp_path / "none.yaml", code=2).stderr
    assert len(CLASSES) == softlabel.open_store(tmp_path / "store").run.num_classes
