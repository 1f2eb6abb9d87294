"""What generate says before hours are spent: the plan, the disk, and what looks wrong about a teacher."""

import re
import subprocess
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
from tests.support.texts import SENTENCES, save_classifier

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
    accuracy = float(re.search(r"on [0-9]+ images of the sample: ([0-9.]+)", plan)[1])  # type: ignore[index]
    assert 0.9 <= accuracy <= 1
    assert drop_source_lines(done.stderr) == []
    totals = softlabel.open_store(tmp_path / "store").manifest.totals
    planned = re.search(r"about ([0-9.]+) kB in", plan)
    assert planned is not None
    assert float(planned[1]) * 1000 == pytest.approx(ROWS * (8 + 24 + len("image-00000.jpg")), rel=0.01)
    assert float(planned[1]) * 1000 < totals.bytes
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


def write_rows(path: Path, rows: "np.ndarray", labels: "np.ndarray") -> str:
    """A table with columns x0, x1, ... and l0, l1, ..., empty where a label is negative."""
    names = [f"x{place}" for place in range(rows.shape[1])], [f"l{place}" for place in range(labels.shape[1])]
    lines = [",".join([*names[0], *names[1]])]
    for row, known in zip(rows.tolist(), labels.tolist(), strict=True):
        lines.append(",".join([*map(repr, row), *("" if label < 0 else str(label) for label in known)]))
    path.write_text("\n".join(lines))
    asked = f"labels={','.join(names[1])}" if labels.shape[1] > 1 else f"label={names[1][0]}"
    return f"{path}?inputs={','.join(names[0])}&{asked}"


def run_table(folder: Path, rows: "np.ndarray", labels: "np.ndarray", activation: str, outputs: int) -> list[str]:
    """The warnings of a run with a linear teacher whose weights are 3 on the diagonal."""
    save_file({"weight": 3 * torch.eye(outputs, 6), "bias": torch.zeros(outputs)}, folder / "linear.safetensors")
    teacher = f"python:torch.nn:Linear@{folder}/linear.safetensors?in_features=6&out_features={outputs}"
    data = write_rows(folder / "t.csv", rows, labels)
    done = run_softlabel(
        "generate", "--data", data, "--teacher", teacher, "--activation", activation, "--out", folder / "labels",
        "--batch-size", 160,
    )  # fmt: skip
    return [line for line in drop_source_lines(done.stderr) if "warning" in line]


@pytest.mark.parametrize("outputs", [5, 1])
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("right", None),
        (
            "random",
            "over [15] class(es)? it is no better than chance .0.5.: untrained, wrong preprocessing .mean, std.",
        ),
        ("reverse", "its outputs rank the samples in reverse"),
        ("order", r"another order than the data's classes: output 0 fits class 1 \(l1\).*mean AUROC is 0.[89]"),
        ("weak", None),
    ],
)
def test_independent_outputs_are_examined_by_their_ranking(
    case: str, said: str | None, outputs: int, tmp_path: Path
) -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(5)
    rows = rng.standard_normal((320, 6))
    logits = 3 * rows[:, :outputs]
    likely = 1 / (1 + np.exp(-(logits / 3 if case == "weak" else logits)))
    labels = (rng.random(logits.shape) < likely).astype(int)
    if case == "random":
        labels = rng.permutation(labels)
    if case == "reverse":
        labels = 1 - labels
    if case == "order":
        if outputs == 1:
            return
        labels = np.roll(labels, 1, axis=1)
    labels[rng.random(labels.shape) < 0.2] = -1
    found = run_table(tmp_path, rows, labels, "sigmoid", outputs)
    assert len(found) == (said is not None), found
    if said is not None:
        assert re.search(said, found[0]), found
        assert "crop" not in found[0]
        assert ("another order" in found[0]) == (case != "reverse" and outputs > 1)
        known = [labels[:, place] >= 0 for place in range(outputs)]
        areas = [roc_auc_score(labels[one, at], logits[one, at]) for at, one in enumerate(known)]
        assert f"mean AUROC {np.mean(areas):.2f} on {int(np.any(known, axis=0).sum())} samples" in found[0]


def test_findings_name_what_the_kind_of_samples_has(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((320, 6))
    (found,) = run_table(tmp_path, rows, rng.integers(0, 4, (320, 1)), "softmax", 4)
    assert "it is sure of its answers and no better than chance: wrong preprocessing (mean, std), or classes" in found
    pytest.importorskip("transformers")
    lines = [f"{SENTENCES[number % 8]} {number}\t{rng.integers(3)}" for number in range(160)]
    (tmp_path / "t.tsv").write_text("\n".join(["text\tlabel", *lines]))
    done = run_softlabel(
        "generate", "--data", f"{tmp_path}/t.tsv?text=text", "--teacher", f"text:{save_classifier(tmp_path / 'net')}",
        "--out", tmp_path / "texts", "--batch-size", 80,
    )  # fmt: skip
    assert "no better than chance: untrained, wrong preprocessing (tokenizer, max_length), or classes" in done.stderr
    constant = np.tile(rows[:1], (320, 1))
    write_rows(tmp_path / "same.csv", constant, np.zeros((320, 1), int))
    with pytest.raises(DataError, match="nearly equal ones; check their values, or give --no-preflight"):
        softlabel.generate(
            f"{tmp_path}/same.csv?inputs=*&label=l0", out=tmp_path / "same",
            teachers=[f"python:torch.nn:Linear@{tmp_path}/linear.safetensors?in_features=6&out_features=4"],
        )  # fmt: skip
