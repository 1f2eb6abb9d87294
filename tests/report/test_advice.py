"""What a report says to do: commands that work on the store that it is about, and nothing that it contradicts."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import softlabel
from softlabel.convert import convert_store, merge_stores
from softlabel.errors import UsageError
from softlabel.report.figures import EncodingCost, Noise
from softlabel.report.report import Report
from softlabel.store.encodings import Int8, TopK
from tests.support.commands import run_softlabel
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.stores import Samples, make_run, write_logits, write_store
from tests.support.training_runs import ROWS, STUDENT, make_keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of weak teachers, and data.parquet: labelled, crossfit, converted, merged."""
    folder = tmp_path_factory.mktemp("advice")
    images, labels = make_digit_jpegs()
    images, labels = images[:ROWS], labels[:ROWS]
    write_parquet(folder / "data.parquet", images, keys=make_keys(ROWS), labels=labels, class_names=DIGITS)
    data, half = str(folder / "data.parquet"), ROWS // 2
    given = {"student": STUDENT, "epochs": 1, "batch_size": 20, "lr": 1e-4, "device": "cpu", "tensorboard": False}
    softlabel.crossfit(data, out=folder / "crossfit", folds=2, progress=False, **given)
    teacher = f"run:{folder}/crossfit.folds/teacher-1"
    for name, rows in (("labelled", ""), ("a", f"?rows=0:{half}"), ("b", f"?rows={half}:{ROWS}")):
        softlabel.generate(
            data + rows, teachers=[teacher], out=folder / name, preflight=False, device="cpu", progress=False
        )
    convert_store(folder / "labelled", folder / "converted", encoding=Int8(), progress=False)
    merge_stores([folder / "a", folder / "b"], folder / "merged", progress=False)
    return folder


@pytest.mark.parametrize("store", ["labelled", "crossfit", "converted", "merged"])
def test_offered_checks_and_repairs_work_on_the_store(folder: Path, store: str) -> None:
    done = softlabel.write_report(
        folder / store, data=folder / "data.parquet", out=folder / "page.html", device="cpu", progress=False
    )
    page = (folder / "page.html").read_text()
    offered = {one.command for one in done.report.summary} | set(
        re.findall('aria-label="Copy the command ([^"]*)"', page)
    )
    checks = [words for command in offered if (words := shlex.split(command)) and words[1] in ("verify", "repair")]
    assert {"verify"} <= {words[1] for words in checks}
    assert store == "crossfit" or "repair" in {words[1] for words in checks}
    for words in checks:
        run_softlabel(*words[1:], cwd=folder)


def noise_of(root: Path, *, right: int, wrong: int, crossfit: bool) -> tuple[str, str, Report]:
    """(Sentence and command, section of the page, report) of 300 rows: teachers that are sure of so many labels, and
    sure of another class for so many of the others; half and half for the rest."""
    labels = np.arange(300) % 3
    logits = np.zeros((300, 3), np.float32)
    logits[np.arange(300), labels] = 0.1
    logits[np.arange(right), labels[:right]] = 8
    logits[np.arange(right, right + wrong), (labels[right : right + wrong] + 1) % 3] = 8
    logits -= logits.max(axis=1, keepdims=True)
    keys = [str(number) for number in range(300)]
    run = make_run(samples=300, classes=3, shard_rows=300)
    stored = {"keys": keys, "labels": labels, "content": np.zeros(300, np.uint64), "logits": logits[None] / 4}
    recorded = {"crossfit": 4} if crossfit else {}
    write_store(root, run, Samples(**stored), fidelity=None, recorded=recorded)
    report = softlabel.write_report(root, out=root.with_suffix(".html"), progress=False).report
    page = root.with_suffix(".html").read_text()
    (one,) = [one for one in report.summary if one.section == "noise"]
    return (
        f"{one.text} {one.command}",
        page[page.index('<section id="noise"') : page.index('<section id="calib')],
        report,
    )


def test_soft_labels_of_weak_teachers_are_not_recommended(tmp_path: Path) -> None:
    said, section, report = noise_of(tmp_path / "weak", right=60, wrong=240, crossfit=True)
    assert isinstance(report.noise, Noise)
    assert report.noise.candidates
    assert "most of them will be errors of teachers" in said
    assert "softlabel train" not in said
    assert "softlabel verify" in said
    assert "do not train on soft labels alone" in section
    said, section, _ = noise_of(tmp_path / "strong", right=270, wrong=30, crossfit=True)
    assert "--soft-weight 1 --hard-weight 0" in said
    assert "lower hard_weight" in section
    assert "softlabel crossfit" not in section  # it was cross-fitted
    _, section, _ = noise_of(tmp_path / "unknown", right=270, wrong=30, crossfit=False)
    assert "softlabel crossfit" in section


def test_without_candidates_no_error_is_spoken_of(tmp_path: Path) -> None:
    said, section, report = noise_of(tmp_path / "none", right=300, wrong=0, crossfit=True)
    assert isinstance(report.noise, Noise)
    assert not report.noise.candidates
    assert "errors" not in said
    assert "nothing to look through" in section


def test_a_store_of_unreadable_samples_alone_says_so(tmp_path: Path) -> None:
    run = make_run(samples=20, classes=4)
    write_store(tmp_path / "labels", run, bad=range(20))
    found = softlabel.write_report(tmp_path / "labels", out=tmp_path / "page.html", progress=False).report
    coverage = next(one for one in found.summary if one.section == "coverage")
    assert (coverage.level, coverage.command) == ("act", f"softlabel inspect {tmp_path}/labels")
    assert coverage.text.startswith("none of the images could be read; 0 of 20 images have soft labels")
    assert all("none of the 20 samples could be read" in one.text for one in found.summary[:3])
    assert "label data that has them" not in (tmp_path / "page.html").read_text()


def test_the_loss_of_a_second_step_is_that_of_inspect(tmp_path: Path, folder: Path) -> None:
    rng = np.random.default_rng(0)
    keys = [str(number) for number in range(50)]
    write_logits(tmp_path / "first", keys, rng.normal(0, 5, (50, 20)).astype(np.float32)).close()
    convert_store(tmp_path / "first", tmp_path / "second", encoding=TopK(k=5, temperatures=(4.0,)), progress=False)
    done = softlabel.write_report(tmp_path / "second", out=tmp_path / "page.html", progress=False)
    assert isinstance(done.report.encoding, EncodingCost)
    shown = re.search("this step: .* mean ([^,]+), worst ([^,]+)", run_softlabel("inspect", tmp_path / "second").stdout)
    assert shown is not None
    found = done.report.encoding
    assert (f"{found.mean_t:.1e}", f"{found.worst_t:.1e}", found.of) == (*shown.groups(), "sources")
    assert f"loses {found.mean_t:.1e} nats" in done.report.summary[3].text
    assert "KL(source || stored)" in (tmp_path / "page.html").read_text()
    with pytest.raises(UsageError, match="encoding_loss was not measured"):
        softlabel.write_report(tmp_path / "second", out=None, fail_if=["encoding_loss>1"], progress=False)
