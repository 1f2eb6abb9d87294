"""Every command on samples that are no pictures: a table, and images of 13 bands."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from tests.inputs.test_tensor_samples import (
    LABELS,
    MODULE,
    TABLE,
    TILES,
    build_bands,
    build_mlp,
    write_weights,
)
from tests.support.commands import run_softlabel

BANDS = f"{','.join(['0'] * 13)}&std={','.join(['1'] * 13)}"
KINDS = {"table": ("samples", "sample", build_mlp, TABLE, ""), "bands": ("images", "img", build_bands, TILES, BANDS)}


class Set:
    """A data set of one kind in a folder, and its teacher."""

    def __init__(self, name: str, folder: Path) -> None:
        self.noun, self.unit, build, self.array, mean = KINDS[name]
        self.folder = folder
        self.layout = "&layout=channels-first" if name == "bands" else ""
        model = write_weights(build, folder / "1.safetensors")
        save_file({name: tensor * 2 for name, tensor in model.state_dict().items()}, folder / "2.safetensors")
        options = f"?mean={mean}" if mean else ""
        self.student = f"python:{MODULE}:{build.__name__}{options}"
        self.teacher = f"python:{MODULE}:{build.__name__}@{folder}/1.safetensors{options}"
        self.data = self.write("data", self.array)

    def write(self, name: str, array: np.ndarray) -> str:  # type: ignore[type-arg]
        np.savez(self.folder / f"{name}.npz", x=array, y=LABELS[np.arange(len(array)) % len(LABELS)])
        return f"{self.folder}/{name}.npz?inputs=x&labels=y{self.layout}"

    def run(self, *words: object, code: int = 0) -> str:
        done = run_softlabel(*words, cwd=self.folder, code=code)
        return done.stdout + done.stderr


@pytest.fixture(params=list(KINDS))
def one(request: pytest.FixtureRequest, tmp_path: Path) -> Set:
    return Set(request.param, tmp_path)


GENERATE = ("--device", "cpu", "--batch-size", 16)


def test_a_store_is_planned_made_looked_at_and_kept(one: Set) -> None:
    labelling = ("--teacher", one.teacher, *GENERATE)
    assert f"48 {one.noun}, 1 teacher(s), 5 classes" in one.run(
        "plan", "--data", one.data, *labelling, "--seconds", 0.01
    )
    placed = ("--shard-rows", 16, "--encoding", "float32")
    printed = one.run("generate", "--data", one.data, *labelling, "--out", "labels", *placed)
    assert re.search(rf"labels: 48 {one.noun}, 1 teacher.*[0-9] {one.noun}/s on a sample of ", printed, re.DOTALL)
    assert f"48 {one.noun} labelled in " in printed
    assert "48 of 48 samples x 1 view(s), 3 shards" in one.run("inspect", "labels")
    assert "48 of them compared by content" in one.run("verify", "labels", "--data", one.data)
    sorted((one.folder / "labels/shards").iterdir())[1].unlink()
    assert "missing" in one.run("verify", "labels", code=3)
    assert "1 shards relabelled, 48 rows" in one.run("repair", "labels", "--device", "cpu")
    changed = one.array.copy()
    changed[20] += 1
    other = one.write("changed", changed)
    assert "1 samples differ from the labelled ones: 20" in one.run("verify", "labels", "--data", other, code=3)
    sorted((one.folder / "labels/shards").iterdir())[1].unlink()
    others = one.write("others", one.array + 1)
    assert "differs from what was labelled" in one.run("repair", "labels", "--data", others, "--device", "cpu", code=2)
    grown = one.write("grown", np.concatenate([one.array, one.array[:8] + 1]))
    one.run("repair", "labels", "--device", "cpu")
    printed = one.run("generate", "--data", grown, *labelling, "--out", "labels", *placed, "--grow")
    assert "complete, 56 rows" in printed


def test_members_are_added_and_calibrated(one: Set) -> None:
    labelling = ("--data", one.data, *GENERATE)
    printed = one.run("calibrate", *labelling[:4], "--teacher", one.teacher, "--out", "cal.json")
    assert "48 labelled samples" in printed
    kept = ("--combine", "keep", "--encoding", "float32")
    one.run("generate", *labelling, "--teacher", one.teacher, *kept, "--out", "kept")
    second = one.teacher.replace("1.safetensors", "2.safetensors")
    one.run("extend", "kept", "--teacher", second, "--device", "cpu")
    assert "teacher 2" in one.run("inspect", "kept")


def test_training_and_evaluation_count_in_the_kinds_unit(one: Set) -> None:
    one.run("generate", "--data", one.data, "--teacher", one.teacher, *GENERATE, "--out", "labels")
    training = ("--student", one.student, "--epochs", 1, "--batch-size", 8, "--out", "run", "--device", "cpu")
    printed = one.run("train", "--data", one.data, "--labels", "labels", *training, "--crop-padding", 1)
    assert re.search(rf"[0-9] {one.unit}/s ", printed)
    assert ("augmentation crop-flip" in printed) == (one.unit == "img")
    assert re.search(r"accuracy +0\.", one.run("evaluate", "--data", one.data, "--model", "run", "--device", "cpu"))


@pytest.mark.slow
def test_workers_of_a_cluster_label_arrays(one: Set) -> None:
    labelling = ("--data", one.data, "--teacher", one.teacher, *GENERATE, "--shard-rows", 24, "--encoding", "float32")
    printed = one.run("generate", *labelling, "--out", "labels", "--cluster", "local", "--cluster-workers", 2)
    assert "complete, 48 rows" in printed
    one.run("generate", *labelling, "--out", "alone")
    found = [
        sorted(path.read_bytes() for path in (one.folder / name / "shards").iterdir()) for name in ("labels", "alone")
    ]
    assert found[0] == found[1]
