"""The sentences that sum a report up: their figures, their levels, and commands that can be pasted."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabel.cli.main import COMMANDS, main
from softlabel.report.figures import Absent
from softlabel.report.measure import StoreFigures, measure_store
from softlabel.report.report import Sentence
from softlabel.report.student_figures import Comparison, RunFacts, Students
from softlabel.report.summary import summarize
from softlabel.store.manifest import DatasetInfo
from softlabel.store.open import open_store
from softlabel.store.writer import Committer, write_shard
from tests.report.test_measure_store import N, draw, write
from tests.support.stores import Samples, make_run

NO_STUDENTS = Absent(reason="no run was given")
SECTIONS = ["agreement", "noise", "sharpness", "encoding", "coverage", "students"]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> StoreFigures:
    with write(tmp_path_factory.mktemp("a folder") / "store", *draw()) as store:
        return measure_store(store, progress=False)


def sentences(figures: StoreFigures | Absent, students: Students | Absent = NO_STUDENTS) -> dict[str, Sentence]:
    return {one.section: one for one in summarize(figures, students)}


def test_each_section_has_a_sentence_with_its_numbers(figures: StoreFigures) -> None:
    found = sentences(figures)
    assert list(found) == SECTIONS
    assert not isinstance(figures.agreement, Absent)
    assert not isinstance(figures.noise, Absent)
    assert f"{figures.agreement.accuracy:.1%}" in found["agreement"].text
    assert f"{figures.noise.share:.1%}" in found["noise"].text
    assert f"{figures.noise.candidates:,} of {figures.noise.judged:,} images" in found["noise"].text
    # These teachers are weak; of strong ones the same share has to be acted on.
    assert figures.agreement.accuracy < 0.8
    assert "most of them will be errors of teachers" in found["noise"].text
    strong = sentences(replace(figures, agreement=replace(figures.agreement, accuracy=0.9)))["noise"]
    assert (found["noise"].level, strong.level) == ("look", "act")
    assert "may have been trained on these labels" in found["noise"].text
    assert (
        "398 of 400 images have soft labels; 2 could not be read; 5 images are exact duplicates"
        in found["coverage"].text
    )
    assert found["encoding"].level == "good"
    assert found["students"].level == "look"
    assert [one.section for one in summarize(Absent(reason="runs alone"), NO_STUDENTS)] == ["students"]


def test_commands_are_those_of_the_command_line(figures: StoreFigures, capsys: pytest.CaptureFixture[str]) -> None:
    assert not isinstance(figures.sharpness, Absent)
    out_of_sample = replace(figures.about, seen="out-of-sample", data="my data/train.parquet")
    others = [
        figures,
        replace(figures, about=out_of_sample, sharpness=replace(figures.sharpness, suggested_temperature=6.0)),
        replace(figures, encoding=replace(figures.encoding, mean_t=0.5)),
        replace(figures, encoding=replace(figures.encoding, mean_t=None)),
        replace(figures, encoding=replace(figures.encoding, store_bytes=10**12, name="float16")),
        replace(figures, coverage=replace(figures.coverage, missing=3)),
        replace(figures, agreement=replace(figures.agreement, accuracy=0.2)),  # type: ignore[type-var]
    ]
    commands = {one.command for variant in others for one in summarize(variant, NO_STUDENTS) if one.command}
    assert {shlex.split(command)[1] for command in commands} == {
        *("crossfit", "train", "generate", "inspect", "convert", "verify")
    }
    for command in commands:
        program, name, *words = shlex.split(command)
        assert program == "softlabel"
        assert name in COMMANDS
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        assert all(word in text for word in words if word.startswith("--")), command
    trained = next(command for command in commands if "--temperature 6" in command)
    assert shlex.split(trained)[2:6] == ["--data", "my data/train.parquet", "--labels", figures.about.store]


def test_students(figures: StoreFigures) -> None:
    run = RunFacts(run="runs/kd", settings={}, final={"eval_accuracy": 0.75}, curves={})
    facts = Students(runs=(run,), comparisons=(), grid=None, notes=())
    assert "75.0% on its evaluation data" in sentences(figures, facts)["students"].text
    compared = Comparison(
        run="runs/kd",
        data="test.parquet",
        held_out=True,
        trained_on=0,
        by_keys=0,
        of_eval_data=True,
        samples=1000,
        non_finite=0,
        with_teacher=1000,
        accuracy=0.8,
        teacher_accuracy=0.9,
        agreement=0.85,
        divergence=0.1,
        joint=None,
        class_agreement=(),
        class_divergence=(),
        divergence_by_entropy=(),
        student=None,
        teacher=None,
        corners=(),
    )
    on_training = replace(compared, run="runs/other", held_out=False, trained_on=1000, accuracy=0.99)
    found = sentences(figures, replace(facts, comparisons=(on_training, compared)))["students"]
    assert found.level == "look"
    assert found.text == (
        "Student runs/kd is right on 80.0% of 1,000 held-out samples, its teacher on 90.0%; the two agree on 85.0%."
    )


def write_recorded(root: Path, recorded: dict[str, Any], **changes: Any) -> StoreFigures:
    run = make_run(samples=20, classes=4, dataset=DatasetInfo(kind="x", rows=20, fingerprint="ab", **changes))
    samples = Samples.of(run)
    with Committer.open(root, run, recorded) as committer:
        for plan in committer.missing():
            committer.commit(write_shard(root, run, plan, *samples.rows(plan)))
        committer.finish()
    with open_store(root) as store:
        return measure_store(store, progress=False)


def test_whether_the_teachers_have_seen_the_samples(tmp_path: Path) -> None:
    run = tmp_path / "teacher"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"data (fingerprint of the keys)": "ab"}))
    (run / "model.json").write_text("{}")
    found = write_recorded(tmp_path / "in", {"teachers": [f"run:{run}"]})
    assert found.about.seen == "unknown"
    assert f"Teacher run:{run} was trained on data with the same keys" in found.about.seen_note
    assert found.about.teachers[0].spec == f"run:{run}"
    assert "may have been trained on these labels" in sentences(found)["noise"].text
    assert sentences(found)["noise"].command.startswith("softlabel crossfit --data DATA")
    (run / "run.json").write_text(json.dumps({"data (fingerprint of the keys)": "cd"}))
    assert write_recorded(tmp_path / "other", {"teachers": [f"run:{run}"]}).about.seen == "unknown"
    found = write_recorded(tmp_path / "out", {"teachers": [f"run:{run}"], "crossfit": 4})
    assert found.about.seen == "out-of-sample"
    assert "4 teachers" in found.about.seen_note
    for student, seen in (
        ("zoo:resnet20@w.pt", "unknown"),
        (f"run:{run}", "unknown"),
        ("zoo:resnet20", "out-of-sample"),
    ):
        recorded = {"crossfit": 4, "crossfit_settings": {"student": student}}
        found = write_recorded(tmp_path / f"fit{len(student)}", recorded)
        assert found.about.seen == seen, student
    assert write_recorded(tmp_path / "none", {}, has_labels=False).about.seen == "out-of-sample"
    ignored = {"options": {"ignore_labels": True}}
    assert write_recorded(tmp_path / "ignored", ignored, has_labels=False).about.seen == "unknown"


def test_the_suggested_temperature_shows_a_student_two_classes(tmp_path: Path) -> None:
    logits, labels = draw(sharp=12)
    with write(tmp_path / "sharp", logits * 3, labels) as store:
        found = measure_store(store, progress=False).sharpness
    assert not isinstance(found, Absent)
    assert found.suggested_temperature is not None
    assert found.suggested_temperature > 4
    p = np.exp(np.float64(logits[0, :, 0] * 3) / found.suggested_temperature)
    p /= p.sum(axis=1, keepdims=True)
    nearest = np.exp(-(p * np.log(p)).sum(axis=1)).mean()
    assert 1.4 < nearest < 2.8
    assert len(p) == N
