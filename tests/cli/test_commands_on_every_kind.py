"""Every command on samples that are no pictures: a table, images of 13 bands, and texts with several labels at once."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import save_file

import softlabel
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
from tests.support.texts import SENTENCES, save_classifier

BANDS = f"{','.join(['0'] * 13)}&std={','.join(['1'] * 13)}"
ARRAYS = {"table": ("samples", "sample", build_mlp, TABLE, ""), "bands": ("images", "img", build_bands, TILES, BANDS)}
TEXTS = np.array([f"{SENTENCES[row % 8]} {row}" for row in range(47)] + ["long " * 100], dtype=object)
SEVERAL = [[1, 0, None, 0, 1][row % 5 :] + [1, 0, None, 0, 1][: row % 5] for row in range(48)]


class Set:
    """A data set of one kind in a folder, and its teacher."""

    activation: tuple[str, ...] = ()
    measured = "accuracy"
    change: object = 1  # added to a sample, makes another one of it

    def __init__(self, name: str, folder: Path) -> None:
        self.noun, self.unit, build, self.samples, mean = ARRAYS[name]
        self.folder = folder
        self.layout = "&layout=channels-first" if name == "bands" else ""
        model = write_weights(build, folder / "1.safetensors")
        save_file({name: tensor * 2 for name, tensor in model.state_dict().items()}, folder / "2.safetensors")
        options = f"?mean={mean}" if mean else ""
        self.student = f"python:{MODULE}:{build.__name__}{options}"
        self.teachers = [
            f"python:{MODULE}:{build.__name__}@{folder}/{number}.safetensors{options}" for number in (1, 2)
        ]
        self.data = self.write("data", self.samples)

    def write(self, name: str, samples: np.ndarray) -> str:  # type: ignore[type-arg]
        np.savez(self.folder / f"{name}.npz", x=samples, y=LABELS[np.arange(len(samples)) % len(LABELS)])
        return f"{self.folder}/{name}.npz?inputs=x&labels=y{self.layout}"

    def run(self, *words: object, code: int = 0) -> str:
        done = run_softlabel(*words, cwd=self.folder, code=code)
        return done.stdout + done.stderr


class Texts(Set):
    """Texts that may have several of five classes at once."""

    activation = ("--activation", "sigmoid")
    measured = r"mAP \(5 of 5 classes\)"
    change = " !"

    def __init__(self, folder: Path) -> None:
        self.folder, self.noun, self.unit, self.samples = folder, "texts", "text", TEXTS
        self.teachers = [f"text:{save_classifier(folder / str(seed), classes=5, seed=seed)}" for seed in (0, 1)]
        self.student = f"{self.teachers[0]}?layers=1"
        self.data = self.write("data", TEXTS)

    def write(self, name: str, samples: np.ndarray) -> str:  # type: ignore[type-arg]
        flags = {f"c{place}": [SEVERAL[row % 48][place] for row in range(len(samples))] for place in range(5)}
        pq.write_table(pa.table({"text": samples.tolist(), **flags}), self.folder / f"{name}.parquet")
        return f"{self.folder}/{name}.parquet?text=text&labels={','.join(flags)}"


@pytest.fixture(params=[*ARRAYS, "texts"])
def one(request: pytest.FixtureRequest, tmp_path: Path) -> Set:
    return Texts(tmp_path) if request.param == "texts" else Set(request.param, tmp_path)


GENERATE = ("--device", "cpu", "--batch-size", 16)


def test_a_store_is_planned_made_looked_at_and_kept(one: Set) -> None:
    labelling = ("--teacher", one.teachers[0], *one.activation, *GENERATE)
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
    changed = one.samples.copy()
    changed[20] = changed[20] + one.change
    other = one.write("changed", changed)
    assert "1 samples differ from the labelled ones: 20" in one.run("verify", "labels", "--data", other, code=3)
    sorted((one.folder / "labels/shards").iterdir())[1].unlink()
    others = one.write("others", one.samples + one.change)
    assert "differs from what was labelled" in one.run("repair", "labels", "--data", others, "--device", "cpu", code=2)
    grown = one.write("grown", np.concatenate([one.samples, one.samples[:8] + one.change]))
    one.run("repair", "labels", "--device", "cpu")
    printed = one.run("generate", "--data", grown, *labelling, "--out", "labels", *placed, "--grow")
    assert "complete, 56 rows" in printed


def test_members_are_added_and_calibrated(one: Set) -> None:
    first, second = one.teachers
    labelling = ("--data", one.data, *one.activation, *GENERATE)
    printed = one.run("calibrate", *labelling, "--teacher", first, "--out", "cal.json")
    assert "48 labelled samples" in printed
    kept = ("--combine", "keep", "--encoding", "float32")
    one.run("generate", *labelling, "--teacher", first, *kept, "--out", "kept")
    assert ".extending" not in one.run("extend", "kept", "--teacher", second, "--device", "cpu")
    assert "teacher 2" in one.run("inspect", "kept")
    assert "beyond" not in one.run("verify", "kept", "--recompute", 16, "--device", "cpu")
    one.run("combine", "kept", "mixed", "--combine", "probs", "--weights", 1, 3)
    one.run("generate", *labelling, "--teacher", first, "--teacher", second, "--combine", "probs", "--weights", 1, 3,
            *kept[2:], "--out", "direct")  # fmt: skip
    mixed, direct = (softlabel.open_store(one.folder / name).take(range(48)) for name in ("mixed", "direct"))
    np.testing.assert_allclose(mixed.scaled_logits, direct.scaled_logits, atol=1e-6)
    np.testing.assert_array_equal(mixed.hard_labels, direct.hard_labels)
    one.run("convert", "mixed", "int8", "--encoding", "int8", "--format", "hdf5")
    one.run("export", "int8", "plain.npz", "--to", "npz")
    with np.load(one.folder / "plain.npz") as plain:
        np.testing.assert_allclose(plain["scaled_logits"], direct.scaled_logits, atol=0.05)


def test_training_and_evaluation_count_in_the_kinds_unit(one: Set) -> None:
    one.run("generate", "--data", one.data, "--teacher", one.teachers[0], *one.activation, *GENERATE, "--out", "labels")
    training = ("--student", one.student, "--epochs", 1, "--batch-size", 8, "--out", "run", "--device", "cpu")
    printed = one.run("train", "--data", one.data, "--labels", "labels", *training, "--crop-padding", 1)
    assert re.search(rf"[0-9] {one.unit}/s ", printed)
    assert ("augmentation crop-flip" in printed) == (one.unit == "img")
    assert re.search(
        rf"{one.measured} +0\.", one.run("evaluate", "--data", one.data, "--model", "run", "--device", "cpu")
    )


@pytest.mark.slow
def test_workers_of_a_cluster_label_arrays(one: Set) -> None:
    labelling = ("--data", one.data, "--teacher", one.teachers[0], *one.activation, *GENERATE, "--shard-rows", 24)
    printed = one.run("generate", *labelling, "--out", "labels", "--cluster", "local", "--cluster-workers", 2)
    assert "complete, 48 rows" in printed
    one.run("generate", *labelling, "--out", "alone")
    found = [
        sorted(path.read_bytes() for path in (one.folder / name / "shards").iterdir()) for name in ("labels", "alone")
    ]
    assert found[0] == found[1]
