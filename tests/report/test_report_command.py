"""`softlabel report` from end to end: the files that it writes, its exit codes, and whose pictures the page shows.

N samples, C classes.
"""

import csv
import io
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import softlabel
from softlabel import open_source
from softlabel.cli.main import main
from softlabel.errors import UsageError
from softlabel.report import write
from softlabel.report.pictures import make_pictures
from softlabel.report.report import report_json
from tests.report.store_reference import learn_confidently
from tests.report.test_summary import write_recorded
from tests.support.commands import run_softlabel
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.processes import Process
from tests.support.stores import draw_logits, read_files, write_logits
from tests.support.training_runs import STUDENT, make_keys

ROWS, WRONG, COPIES = 120, (5, 40, 77), 2
LABELS = np.array(make_digit_jpegs()[1][:ROWS])


def invert(jpeg: bytes) -> bytes:
    buffer = io.BytesIO()
    ImageOps.invert(Image.open(io.BytesIO(jpeg)).convert("RGB")).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def draw_teacher() -> np.ndarray:
    """Logits (N, C) of a teacher that is almost sure of the true class."""
    logits_NC = draw_logits(ROWS, 10) / 2
    logits_NC[np.arange(ROWS), LABELS] += 8
    return logits_NC


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.parquet with some wrong hard labels and two equal images; test.parquet: other pixels under the same keys.

    With a store of each (labels, test-labels), and a student of the first (runs/student).
    """
    folder = tmp_path_factory.mktemp("report")
    images = make_digit_jpegs()[0][:ROWS]
    images[1] = images[0]
    hard = LABELS.copy()
    hard[list(WRONG)] = (hard[list(WRONG)] + 1) % 10
    for data, store, files, labels in (
        ("data", "labels", images, hard.tolist()),
        ("test", "test-labels", [invert(image) for image in images], LABELS.tolist()),
    ):
        write_parquet(folder / f"{data}.parquet", files, keys=make_keys(ROWS), labels=labels, class_names=DIGITS)
        keys, names = make_keys(ROWS), DIGITS
        write_logits(folder / store, keys, draw_teacher(), images=files, labels=labels, class_names=names).close()
    given = ("--data", "data.parquet", "--labels", "labels", "--student", STUDENT, "--out", "runs/student")
    more = ("--epochs", 1, "--batch-size", 40, "--eval-data", "test.parquet", "--device", "cpu", "--tensorboard=false")
    run_softlabel("train", *given, *more, cwd=folder)
    return folder


def read_images(text: str) -> set[str]:
    return set(re.findall(r'src="(data:image[^"]+)"', text))


def test_page_json_and_csv_say_the_same_and_the_same_again(folder: Path) -> None:
    written = []
    for number in (1, 2):
        files = (f"page{number}.html", f"figures{number}.json", f"noise{number}.csv")
        options = [word for pair in zip(("--out", "--json", "--noise-csv"), files, strict=True) for word in pair]
        done = run_softlabel("report", "labels", "--data", "data.parquet", *options, cwd=folder)
        assert len(re.findall("^(good |look |act  )", done.stdout, flags=re.MULTILINE)) == 6
        written.append([(folder / name).read_bytes() for name in files])
    assert written[0] == written[1]
    page, figures, table = (data.decode() for data in written[0])
    found = json.loads(figures)

    p_NC = np.exp(draw_teacher().astype(np.float64))
    p_NC /= p_NC.sum(axis=1, keepdims=True)
    hard = LABELS.copy()
    hard[list(WRONG)] = (hard[list(WRONG)] + 1) % 10
    assert found["agreement"]["accuracy"] == np.mean(p_NC.argmax(axis=1) == hard)
    expected = learn_confidently(p_NC, hard)["wrong"]
    assert found["noise"]["candidates"] == len(expected) > 0
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["key"] for row in rows] == [make_keys(ROWS)[one] for _, _, one, _ in expected]
    assert found["coverage"]["duplicates"]["samples"] == COPIES

    embedded = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, flags=re.DOTALL)
    assert embedded is not None
    assert json.loads(embedded[1]) == found
    with softlabel.open_store(folder / "labels") as store:
        again = softlabel.write_report(store, out=None, progress=False)
    assert again.path is None
    assert json.loads(report_json(again.report))["noise"] == found["noise"]


def test_samples_of_equal_keys_keep_their_own_pictures(folder: Path) -> None:
    options = ("--runs", "runs/student", "--eval-data", "test.parquet", "--eval-labels", "test-labels")
    run_softlabel("report", "labels", "--data", "data.parquet", *options, "--out", "both.html", cwd=folder)
    page = (folder / "both.html").read_text()
    store, students = page[page.index('<section id="noise"') :].split('<section id="students"')
    # What is compared on each dataset begins with its name.
    _, *parts = re.split(r"\bOn (data|test)\.parquet: ", students)
    shown = dict(zip(parts[::2], map(read_images, parts[1::2]), strict=True))
    trained, held_out = (
        {one.data for one in make_pictures(open_source(str(folder / name)), make_keys(ROWS)).values()}
        for name in ("data.parquet", "test.parquet")
    )
    assert not trained & held_out
    for found, own in ((read_images(store), trained), (shown["data"], trained), (shown["test"], held_out)):
        assert found
        assert found <= own


def test_runs_are_reported_without_a_store(folder: Path) -> None:
    done = run_softlabel("report", "runs", "--out", "runs.html", "--json", "runs.json", cwd=folder)
    found = json.loads((folder / "runs.json").read_text())
    assert [one["run"] for one in found["students"]["runs"]] == ["runs/student"]
    assert found["noise"].keys() == {"reason"}
    assert re.search(r"runs/student reached [0-9.]+% on its evaluation data", done.stdout)


def test_conditions_that_are_true_end_with_3(folder: Path) -> None:
    conditions = ("noise>0", "duplicates>0", "accuracy<0.5", "missing>=1")
    options = [word for one in conditions for word in ("--fail-if", one)]
    done = run_softlabel("report", "labels", *options, "--out", "ci.html", cwd=folder, code=3)
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed: ")]
    assert [re.search(r"'(.*)' was to fail", line)[1] for line in failed] == ["noise>0", "duplicates>0"]  # type: ignore[index]
    assert (folder / "ci.html").is_file()
    run_softlabel("report", "labels", "--fail-if", "noise>0.5", "--out", "ci.html", cwd=folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--fail-if", "noise>0.5", "labels"),
        ("--out", "ci.html", "--fail-if", "noise>0.5", "missing>0", "labels", "--device", "cpu"),
        ("--fail-if", "noise>0.5", "labels", "--fail-if", "missing>0"),
        ("--fail-if=noise>0.5", "--fail-if", "missing>0", "labels"),
    ],
    ids=" ".join,
)
def test_an_option_with_several_values_may_stand_before_the_store(folder: Path, arguments: tuple[str, ...]) -> None:
    more = () if "--out" in arguments else ("--out", "ci.html")
    done = run_softlabel("report", *more, *arguments, cwd=folder)
    assert "ci.html: " in done.stdout
    true = [one.replace("noise>0.5", "accuracy<=1") for one in arguments]
    run_softlabel("report", *more, *true, cwd=folder, code=3)


def test_an_interrupted_report_says_that_nothing_is_kept(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "options.yaml")
    process = Process(main, ["report", str(tmp_path / "labels"), "--config", str(tmp_path / "options.yaml")])
    with (tmp_path / "options.yaml").open("wb"):  # waits until it is read
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "softlabel: interrupted; report keeps nothing, rerun it"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("labels", "--fail-if", "noise"), "'noise>0.05'"),
        (("labels", "--fail-if", "noise>many"), "'noise>0.05'"),
        (("labels", "--fail-if", "beauty>1"), "candidates"),
        (("labels", "--fail-if", "student_kl>1"), "was not measured"),
        (("labels", "--out", "nowhere/report.html"), "nowhere"),
        (("labels", "--json", "nowhere/report.json"), "nowhere"),
        (("labels", "--eval-data", "test.parquet"), "--runs"),
        (("runs", "--noise-csv", "noise.csv"), "--noise-csv"),
        (("nothing",), "nothing"),
        (("labels", "--data", "test.parquet"), "is not the one that was labelled"),
        (("labels", "--json", "wrong.html"), "found one twice"),
        (("labels", "--json", "runs"), "found a folder"),
        (("labels", "--workers", "-1"), "--workers"),
        (("--runs", "a", "b", "--fail-if", "noise>1", "labels"), "--runs took 'b' or --fail-if took 'labels'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_request_is_one_line(folder: Path, arguments: tuple[str, ...], named: str) -> None:
    more = () if "--out" in arguments else ("--out", "wrong.html")
    done = run_softlabel("report", *arguments, *more, cwd=folder, code=2)
    last = [line for line in done.stderr.splitlines() if line.startswith("softlabel: ")]
    assert len(last) == 1, done.stderr
    assert named in last[0]
    assert not done.stdout
    assert not (folder / "wrong.html").exists()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("--json", "labels/manifest.json"), "the store labels"),
        (("--out", "labels/shards/new.html"), "the store labels"),
        (("--out", "link/model.json"), "the run runs/student"),
        (("--noise-csv", "runs/../data.parquet"), "the data data.parquet"),
        (("--json", "linked.json"), "the data test.parquet"),
        (("--json", "test-labels/manifest.json"), "the store test-labels"),
        (("--json", "runs/../wrong.html"), "found one twice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_a_report_is_about_is_never_overwritten(folder: Path, options: tuple[str, ...], kept: str) -> None:
    if not (folder / "link").exists():
        (folder / "link").symlink_to("runs/student")
        (folder / "linked.json").symlink_to("test.parquet")
    before = read_files(folder)
    given = ("labels", "--data", "data.parquet", "--runs", "runs", "--eval-data", "test.parquet?key=index")
    more = () if "--out" in options else ("--out", "wrong.html")
    done = run_softlabel("report", *given, "--eval-labels", "test-labels", *options, *more, cwd=folder, code=2)
    assert kept in done.stderr.splitlines()[-1]
    assert read_files(folder) == before


def test_files_that_a_source_names_in_other_ways_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("images/a.jpg", "list.csv", "part-0.tar", "x.npy", "y.npy", "grid/T1/metrics.csv"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")
    Path("grid/students.json").write_text('{"T1": {}}')
    write_recorded(Path("labels"), {"data": str(tmp_path / "x.npy")})
    before = read_files(tmp_path)
    for given, out in (
        ({"data": "list.csv"}, "images/a.jpg"),
        ({"data": "part-*.tar"}, "part-0.tar"),
        ({"data": "part-{0..0}.tar"}, "part-0.tar"),
        ({"data": "x.npy?labels=y.npy"}, "y.npy"),
        ({"data": Path("images")}, "images/page.html"),
        ({"runs": ["grid"], "eval_data": ["x.npy", "list.csv"]}, "list.csv"),
        ({"runs": ["grid"]}, "grid/students.json"),
        ({}, "x.npy"),  # the store records it
    ):
        with pytest.raises(UsageError, match="outside of what the report is about"):
            softlabel.write_report("labels", **given, out=out, progress=False)  # type: ignore[arg-type]
    assert read_files(tmp_path) == before


def test_a_student_with_answers_that_are_not_finite_is_named_and_fulfils_no_condition(
    folder: Path, tmp_path: Path
) -> None:
    for run in ("nan", "sound"):
        shutil.copytree(folder / "runs/student", tmp_path / run)
    weights = load_file(tmp_path / "nan/model.safetensors")
    save_file({name: one * float("nan") for name, one in weights.items()}, tmp_path / "nan/model.safetensors")
    given = ("report", folder / "labels", "--data", folder / "data.parquet", "--out", "page.html", "--runs", "nan")
    for metric in ("student_kl>0.1", "student_accuracy<0.1", "student_agreement<0.1"):
        done = run_softlabel(*given, "sound", "--fail-if", metric, cwd=tmp_path, code=2)
        assert "is not finite" in done.stderr.splitlines()[-1]
    done = run_softlabel(*given, "--json", "alone.json", cwd=tmp_path)
    assert "act   Student nan: answers that are not finite numbers for 120 samples" in done.stdout
    assert "Warning" not in done.stderr
    assert "right on" not in done.stdout
    run_softlabel(*given, "sound", "--json", "both.json", cwd=tmp_path)
    page, found = (tmp_path / "page.html").read_text(), json.loads((tmp_path / "both.json").read_text())
    broken, sound = found["students"]["comparisons"]
    assert (broken["non_finite"], sound["non_finite"]) == (ROWS, 0)
    assert [broken[name] for name in ("accuracy", "agreement", "divergence")] == [None] * 3
    assert sound["accuracy"] is not None
    assert "The student answers 120 images with numbers that are not finite" in page


def test_a_damaged_store_is_no_report(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "labels", tmp_path / "labels")
    (shard,) = (tmp_path / "labels" / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    done = run_softlabel("report", "labels", "--data", folder / "data.parquet", cwd=tmp_path, code=1)
    assert shard.name in done.stderr
    assert not (tmp_path / "report.html").exists()


HOSTILE = "\u202efdp.\x1b[2J\rcat\nact"


def test_names_neither_turn_nor_erase_what_stands_beside_them(tmp_path: Path) -> None:
    """Of classes and keys, in the terminal and on the page."""
    keys = [f"{HOSTILE}{number}" for number in range(40)]
    labels = np.arange(len(keys)) % 2
    logits = np.where(np.eye(2)[labels] > 0, 0.0, -9.0).astype(np.float32)
    labels[:5] = 1 - labels[:5]
    names = (HOSTILE, "plain")
    write_logits(tmp_path / "labels", keys, logits, labels=labels, class_names=names, bad=[f"{HOSTILE}bad"]).close()
    shown = [run_softlabel(*words, cwd=tmp_path).stdout for words in (("inspect", "labels"), ("report", "labels"))]
    for text in (*shown, (tmp_path / "report.html").read_text()):
        assert "\ufffdfdp.\ufffd[2J\ufffdcat\ufffdact" in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert len(shown[1].splitlines()) == 7


def test_every_section_has_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More candidates than pictures leave some to duplicates."""
    monkeypatch.setattr(write, "MOST_PICTURES", 12)
    images, labels = (list(one[:ROWS]) for one in make_digit_jpegs())
    images[100:120:2] = images[101:120:2]
    hard = [(one + number % 2) % 10 for number, one in enumerate(labels)]
    keys = make_keys(ROWS)
    write_parquet(tmp_path / "data.parquet", images, keys=keys, labels=hard, class_names=DIGITS)
    write_logits(tmp_path / "labels", keys, draw_teacher(), images=images, labels=hard, class_names=DIGITS).close()
    page = tmp_path / "page.html"
    done = softlabel.write_report(tmp_path / "labels", data=tmp_path / "data.parquet", out=page, progress=False)
    assert done.report.noise.candidates > 12  # type: ignore[union-attr]
    assert done.pictures == 12
    noise, rest = page.read_text().split('<section id="calibration"')
    assert len(re.findall("<img ", noise)) >= 6
    assert len(re.findall("<img ", rest)) >= 6


def test_no_cell_of_the_table_is_a_formula(tmp_path: Path) -> None:
    """A spreadsheet runs cells that begin with these characters."""
    keys = [f"{mark}cmd{number}" for number, mark in enumerate("=+-@x" * 8)]
    labels = np.arange(len(keys)) % 2
    logits = np.where(np.eye(2)[labels] > 0, 0.0, -9.0).astype(np.float32)
    labels[:5] = 1 - labels[:5]
    write_logits(tmp_path / "labels", keys, logits, labels=labels, class_names=["=1+1", "plain"]).close()
    softlabel.write_report(tmp_path / "labels", out=None, noise_csv=tmp_path / "noise.csv", progress=False)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "noise.csv").read_text())))
    assert sorted(row["key"] for row in rows) == sorted(["'=cmd0", "'+cmd1", "'-cmd2", "'@cmd3", "xcmd4"])
    assert {row["label"] for row in rows} | {row["suggestion"] for row in rows} == {"'=1+1", "plain"}
