"""What generate says before hours are spent: the plan, the disk, and what looks wrong about a teacher."""

import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import softlabel
from softlabel.errors import DataError
from softlabel.generation.preflight.sample import sample_indices
from softlabel.models import build_model
from tests.support.commands import drop_source_lines, run_softlabel
from tests.support.datasets import CLASSES, make_jpeg, write_parquet
from tests.support.teachers import write_teacher

ROWS = 160


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 images whose labels are what the teacher sees in them, but for a few."""
    import io

    from PIL import Image

    folder = tmp_path_factory.mktemp("preflight")
    images = [make_jpeg(number) for number in range(ROWS)]
    teacher = build_model(write_teacher(folder / "teacher.safetensors")).eval()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image)), np.float32) for image in images])
    inputs = (torch.from_numpy(pixels) / 255 - 0.5) / 0.25
    with torch.inference_mode():
        logits_NC = teacher(inputs.permute(0, 3, 1, 2))
    # The classes in equal shares: what the teacher answers is what its bias makes of it.
    bias = -logits_NC.mean(dim=0)
    state = load_file(folder / "teacher.safetensors")
    save_file({**state, "linear.bias": state["linear.bias"] + bias}, folder / "teacher.safetensors")
    labels = (logits_NC + bias).argmax(dim=1).tolist()
    assert min(labels.count(one) for one in range(len(CLASSES))) > ROWS // 20
    labels[:8] = [(label + 1) % len(CLASSES) for label in labels[:8]]
    write_parquet(folder / "data.parquet", images, labels=labels)
    renamed = [[2, 3, 0, 1][label] for label in labels]
    write_parquet(folder / "renamed.parquet", images, labels=renamed)
    rng = np.random.default_rng(0)
    write_parquet(folder / "random.parquet", images, labels=rng.integers(0, len(CLASSES), ROWS).tolist())
    return folder


def spec(ready: Path, options: str = "mean=0.5&std=0.25") -> str:
    return f"zoo:resnet8@{ready / 'teacher.safetensors'}?{options}"


def command(ready: Path, out: Path, data: str = "data", teacher: str | None = None) -> list[object]:
    given = spec(ready) if teacher is None else teacher
    base = ["generate", "--data", ready / f"{data}.parquet", "--teacher", given, "--out", out, "--batch-size", 64]
    return [*base, "--shard-rows", 50]


def test_the_plan_comes_before_and_the_summary_after(ready: Path, tmp_path: Path) -> None:
    done = run_softlabel(*command(ready, tmp_path / "store"))
    plan, summary = done.stdout.split(": complete, ")
    assert "160 images, 1 teacher(s), 4 classes" in plan
    assert "in 4 shards" in plan
    assert "encoding float16: 8 bytes a row" in plan
    accuracy = float(re.search(r"on [0-9]+ of the sampled images: ([0-9.]+)", plan)[1])  # type: ignore[index]
    assert 0.9 <= accuracy <= 1
    assert drop_source_lines(done.stderr) == []
    totals = softlabel.open_store(tmp_path / "store").manifest.totals
    planned = re.search(r"about ([0-9.]+) kB in", plan)
    assert planned is not None
    assert float(planned[1]) * 1000 == pytest.approx(ROWS * (8 + 24 + len("image-00000.jpg")), rel=0.01)
    # The files have footers too, and compress keys and labels.
    assert totals.bytes == pytest.approx(float(planned[1]) * 1000, rel=0.2)
    assert "160 images labelled" in summary
    assert "of the teachers alone" in summary
    assert "accuracy of these labels where a hard label exists: 0.95" in summary
    assert f"softlabel train --data {ready / 'data.parquet'} --labels {tmp_path / 'store'}" in summary
    again = run_softlabel(*command(ready, tmp_path / "store")).stdout
    assert again.count("\n") == 1
    assert "nothing to do" in again


def test_a_resumed_run_plans_what_is_left(ready: Path, tmp_path: Path) -> None:
    run_softlabel(*command(ready, tmp_path / "store"))
    assert run_softlabel("verify", tmp_path / "store").returncode == 0
    next((tmp_path / "store" / "shards").glob("00003-*")).unlink()
    (tmp_path / "store" / "manifest.json").unlink()
    output = run_softlabel(*command(ready, tmp_path / "store")).stdout
    assert ": 10 images, 1 teacher(s)" in output
    assert "in 1 shards" in output


def test_without_preflight_nothing_is_planned(ready: Path, tmp_path: Path) -> None:
    done = run_softlabel(*command(ready, tmp_path / "store", data="random"), "--no-preflight")
    assert done.stdout.startswith(f"{tmp_path / 'store'}: complete")
    assert drop_source_lines(done.stderr) == []


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (
            "renamed",
            "mean=0.5&std=0.25",
            r"classes seem to be in another order.*it answers 0 where the label is 2",
        ),
        ("random", "mean=0.5&std=0.25", r"no better than chance.*preprocessing"),
        ("data", "mean=0.5&std=0.25", None),
    ],
    ids=["order", "chance", "right"],
)
def test_findings_are_reported(
    ready: Path, tmp_path: Path, data: str, options: str, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    softlabel.generate(
        ready / f"{data}.parquet", teachers=[spec(ready, options)], out=tmp_path / "s", batch_size=64, progress=False
    )
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (said is not None)
    if said is not None:
        assert re.search(said, warned[0]), warned


@pytest.mark.parametrize(
    ("options", "named"),
    [("mean=0&std=1", "ImageNet's|CIFAR's"), ("", None)],
    ids=["wrong", "right"],
)
def test_a_real_teacher_under_another_normalisation(
    shared_data: Path, tmp_path: Path, options: str, named: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = f"zoo:resnet20@{shared_data / 'cifar10-resnets/resnet20-12fca82f.th'}{'?' * bool(options)}{options}"
    data = f"{shared_data / 'cifar10-jpeg/test.parquet'}?rows=0:256"
    softlabel.generate(data, teachers=[teacher], out=tmp_path / "store", batch_size=128, progress=False)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (named is not None), warned
    if named is not None:
        assert re.search(named, warned[0])
        assert "mean=" in warned[0]


class Changing(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Eight images that are others with every call, as a random transform makes them."""

    calls = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        self.calls += 1
        return torch.full((3, 32, 32), self.calls % 251, dtype=torch.uint8)


def test_a_dataset_that_changes_between_two_calls_is_refused(ready: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sample '0': expected the same content.*random transforms"):
        softlabel.generate(Changing(), teachers=[spec(ready)], out=tmp_path / "store", progress=False)


def test_a_store_that_would_not_fit_is_refused_before_anything_is_labelled(ready: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        (disk / "filler").write_bytes(bytes(50 * 1024))
        options = command(ready, disk / "store")
        done = run_softlabel(*options, code=1)
        (line,) = drop_source_lines(done.stderr)
        need, free = (
            int(n.replace(",", ""))
            for n in re.search(r"expected ([0-9,]+) free bytes .*, found ([0-9,]+);", line).groups()
        )
        assert need == ROWS * (8 + 24 + len("image-00000.jpg"))
        assert free < 64 * 1024 - 50 * 1024
        assert "--encoding" in done.stderr
        assert not list((disk / "store").glob("shards/*"))
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        assert "complete, 160 rows" in run_softlabel(*options).stdout
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_sample_comes_from_everywhere_and_always_the_same() -> None:
    first, *others = sample_indices(100_000, 256, 7)
    assert len(first) == 256
    assert np.histogram(first, bins=4, range=(0, 100_000))[0].min() > 0
    np.testing.assert_array_equal(first, next(sample_indices(100_000, 256, 7)))
    assert not np.array_equal(first, next(sample_indices(100_000, 256, 8)))
    # Every sample once, when it goes on for long enough.
    everything = np.concatenate([first, *others])
    np.testing.assert_array_equal(np.sort(everything), np.arange(100_000))


def test_a_half_precision_that_is_slower_than_float32_on_this_cpu_is_reported(ready: Path, tmp_path: Path) -> None:
    model, images = build_model(spec(ready).partition("?")[0]).eval(), torch.randn(16, 3, 32, 32)
    seconds = {True: 1e9, False: 1e9}
    with torch.inference_mode():
        for enabled in (True, False) * 3:
            with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
                started = time.process_time()
                model(images)
                seconds[enabled] = min(seconds[enabled], time.process_time() - started)
    ratio = seconds[True] / seconds[False]
    said = {}
    for precision in ("fp32", "fp16"):
        options = ["--teacher", spec(ready), "--out", tmp_path / precision, "--precision", precision]
        data = f"{ready / 'data.parquet'}?rows=0:24"
        said[precision] = run_softlabel("generate", "--data", data, *options, "--batch-size", 8).stderr
    assert "times as long as fp32" not in said["fp32"]
    if ratio > 2:  # clearly slower here
        found = re.search(r"--precision fp16 takes ([0-9.]+) times as long as fp32 on this CPU", said["fp16"])
        assert found, said["fp16"]
        assert float(found[1]) > 1.1
    if ratio < 0.7:
        assert "times as long as fp32" not in said["fp16"]
