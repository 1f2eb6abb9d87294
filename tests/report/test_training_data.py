"""What a report says about which samples students and teachers were trained on.

A run on the first 80 of 120 images, with the labels of a store ("kd") and without ("hard"), and copies of it whose data
or store is gone.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

import softlabel
from softlabel import generate, open_source, open_store, train
from softlabel.inputs.base import Sample
from softlabel.report.measure import measure_store
from softlabel.report.student_figures import Comparison
from softlabel.report.students import compare_students
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.training_runs import ROWS, make_config, make_keys, write_digits

TRAINED, SAME = 80, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """other.parquet has other images under the keys of data.parquet, mixed.parquet some of its images under others."""
    folder = write_digits(tmp_path_factory.mktemp("seen"))
    images, labels = make_digit_jpegs()
    others, other_labels = images[ROWS : 2 * ROWS], labels[ROWS : 2 * ROWS]
    write_parquet(folder / "other.parquet", others, keys=make_keys(ROWS), labels=other_labels, class_names=DIGITS)
    mixed = [*images[:SAME], *others[:30]]
    hard = [*labels[:SAME], *other_labels[:30]]
    keys = [f"new/{number}" for number in range(len(mixed))]
    write_parquet(folder / "mixed.parquet", mixed, keys=keys, labels=hard, class_names=DIGITS)
    for name, labelled in (("kd", folder / "store"), ("hard", None)):
        soft = {} if labelled else {"soft_weight": 0.0, "hard_weight": 1.0}
        data = f"{folder}/data.parquet?rows=0:{TRAINED}"
        train(make_config(folder, folder / name, data=data, labels=labelled, epochs=1, **soft))
        copies = {"moved": ("data",), "lost": ("data", "labels")} if labelled else {"hard-moved": ("data",)}
        for copy, gone in copies.items():
            settings = folder / copy / "config.yaml"
            shutil.copytree(folder / name, folder / copy)
            settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | dict.fromkeys(gone, "gone")))
    return folder


CASES = {
    # run, evaluation data -> held_out, trained_on, by_keys, what the page says of the samples
    ("kd", "data.parquet?rows=40:120"): (False, 40, 0, "80 samples (40 of 80 were in its training data)"),
    ("kd", "data.parquet?rows=80:120"): (True, 0, 0, "40 held-out samples"),
    ("kd", "data.parquet?rows=0:80"): (False, 80, 0, "80 samples that it was trained on"),
    ("kd", "other.parquet"): (True, 0, 0, "120 held-out samples"),
    ("kd", "mixed.parquet"): (False, SAME, 0, "40 samples (10 of 40 were in its training data)"),
    ("hard", "data.parquet?rows=40:120"): (False, 40, 0, "80 samples (40 of 80 were in its training data)"),
    ("hard", "other.parquet"): (True, 0, 0, "120 held-out samples"),
    # Its store says no more than that it was trained on some of the rows.
    ("moved", "data.parquet?rows=40:120"): (None, None, 0, "80 samples (whether it was trained on them is not known)"),
    ("moved", "mixed.parquet?rows=10:40"): (True, 0, 0, "30 held-out samples"),
    ("lost", "data.parquet?rows=40:120"): (None, None, 0, "80 samples (whether it was trained on them is not known)"),
    ("lost", "other.parquet?rows=0:80"): (False, 80, 80, "80 samples with the same keys as its training data"),
    ("hard-moved", "other.parquet"): (None, None, 0, "120 samples (whether it was trained on them is not known)"),
}


@pytest.mark.parametrize(("run", "data"), CASES)
def test_samples_are_held_out_only_where_none_was_in_the_training_data(folder: Path, run: str, data: str) -> None:
    held_out, trained, by_keys, said = CASES[run, data]
    found = softlabel.write_report(
        folder / run, eval_data=f"{folder}/{data}", out=folder / "page.html", device="cpu", progress=False
    )
    (one,) = found.report.students.comparisons  # type: ignore[union-attr]
    assert (one.held_out, one.trained_on, one.by_keys) == (held_out, trained, by_keys)
    assert said in found.report.summary[-1].text
    assert said in (folder / "page.html").read_text()


def test_a_student_of_a_part_of_the_store(folder: Path) -> None:
    found = compare_students([folder / "kd", folder / "moved"], folder / "store", folder / "data.parquet", device="cpu")
    one, moved = found.comparisons
    assert (one.held_out, one.trained_on, one.samples) == (False, TRAINED, ROWS)
    # The data as it was given to the report, at another place.
    given = compare_students(
        [folder / "moved"], folder / "store", f"{folder}/data.parquet?rows=0:{TRAINED}", device="cpu"
    )
    assert (moved.trained_on, given.comparisons[0].trained_on) == (None, TRAINED)


def test_a_student_that_went_on_from_another_one_was_trained_on_its_data_too(folder: Path, tmp_path: Path) -> None:
    data = f"{folder}/mixed.parquet?rows=20:40"
    given = {"labels": None, "soft_weight": 0.0, "hard_weight": 1.0, "epochs": 1, "student": f"run:{folder}/kd"}
    train(make_config(folder, tmp_path / "more", data=data, **given))
    for rows, trained in (("0:20", SAME), ("20:40", 20), ("10:20", 0)):
        (one,) = compare_students(
            [tmp_path / "more"], eval_data=f"{folder}/mixed.parquet?rows={rows}", device="cpu"
        ).comparisons
        assert isinstance(one, Comparison)
        assert one.trained_on == trained


@pytest.mark.parametrize(
    ("teacher", "data", "seen", "count", "said"),
    [
        ("kd", "data.parquet", "in-sample", TRAINED, "kd was trained on 80 of these 120 images"),
        ("hard", "data.parquet?rows=0:40", "in-sample", 40, "hard was trained on these very images"),
        ("kd", "other.parquet", "out-of-sample", 0, "no teacher was trained on one of these images"),
        ("hard", "other.parquet?rows=0:80", "out-of-sample", 0, "no teacher was trained on one of these images"),
        ("lost", "other.parquet?rows=0:80", "unknown", None, "was trained on data with the same keys"),
        ("lost", "data.parquet", "unknown", None, "Nothing says whether"),
    ],
)
def test_what_teachers_have_seen(
    folder: Path, tmp_path: Path, teacher: str, data: str, seen: str, count: int | None, said: str
) -> None:
    spec = f"run:{folder}/{teacher}"
    generate(
        f"{folder}/{data}", teachers=[spec], out=tmp_path / "labels", preflight=False, device="cpu", progress=False
    )
    with open_store(tmp_path / "labels") as store:
        about = measure_store(store, progress=False).about
    assert (about.seen, about.seen_samples) == (seen, count)
    assert said in about.seen_note


def test_evaluation_data_is_hashed_once_for_all_students(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        shutil.copytree(folder / "kd", tmp_path / name)
    source = open_source(str(folder / "other.parquet"))
    read, counts = source.read, Counter[int]()

    def count(indices: Sequence[int]) -> list[Sample]:
        counts.update(map(int, indices))
        return read(indices)

    source.read = count  # type: ignore[method-assign]
    found = compare_students([tmp_path], eval_data=source, device="cpu", progress=False)
    assert [one.trained_on for one in found.comparisons] == [0, 0, 0]
    assert set(counts) == set(range(ROWS))
    assert max(counts.values()) <= 3  # a look at the first sample, the pass of the students, and the hashes
