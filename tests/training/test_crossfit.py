"""Cross-fitting: every row is by the teacher that was not trained on its sample, whatever interrupts the command.

N samples, C classes.
"""

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from safetensors.torch import load_file

import softlabel
from softlabel import open_source, open_store
from softlabel.errors import DataError, MismatchError, UsageError
from softlabel.testing.source import hash_keys
from tests.support.commands import run_softlabel
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, decode_by_pillow, make_digit_jpegs
from tests.support.processes import start_softlabel
from tests.support.texts import SENTENCES, save_classifier
from tests.support.training_runs import have_equal_weights, make_keys

ROWS, FOLDS, SEED, T = 240, 3, 5, 2.0
BROKEN = 33  # an image that cannot be read; it has no hard label
STUDENT = "python:tests.support.students:build_smooth_student?resize=none"
TRAINING = {"--epochs": 1, "--batch-size": 32, "--lr": 0.05, "--seed": SEED, "--tensorboard": "false"}
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def fold_of(key: str, folds: int = FOLDS, seed: int = SEED) -> int:
    """As the guide says it: from 1."""
    return int(xxhash.xxh3_64_intdigest(key.encode(), seed) % folds) + 1


def make_command(data: object, out: Path, *more: object, **changes: object) -> list[object]:
    given = {"--data": data, "--student": STUDENT, "--folds": FOLDS, "--out": out, "--temperature": T, **TRAINING}
    given |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return ["crossfit", *(word for pair in given.items() for word in pair), *more]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.parquet: every tenth image without a label, one of these broken. oof: its labels, with all folds kept."""
    folder = tmp_path_factory.mktemp("digits")
    images, numbers = make_digit_jpegs()
    images, labels = images[:ROWS], [None if n % 10 == 3 else label for n, label in enumerate(numbers[:ROWS])]
    images[BROKEN] = b"not an image"
    write_parquet(folder / "data.parquet", images, keys=make_keys(ROWS), labels=labels, class_names=DIGITS)
    done = run_softlabel(
        *make_command(folder / "data.parquet", folder / "oof", "--keep-folds", encoding="float32", shard_rows=50)
    )
    assert f"complete, {ROWS - 1} rows" in done.stdout
    phases = [line for line in done.stderr.splitlines() if line.startswith(("fold ", "merging"))]
    assert len(phases) == 2 * FOLDS + 1, done.stderr
    return folder


# ---- what it computes ----


def test_every_row_is_by_the_teacher_that_was_not_trained_on_it(digits: Path) -> None:
    images, _ = make_digit_jpegs()
    keys = [key for number, key in enumerate(make_keys(ROWS)) if number != BROKEN]
    with open_store(digits / "oof", verify="full") as store:
        assert store.run.dataset.fingerprint == hash_keys(make_keys(ROWS))
        assert store.run.dataset.fingerprint == open_source(digits / "data.parquet").fingerprint()
        assert list(store.bad) == [make_keys(ROWS)[BROKEN]]
        rows = store.take(np.arange(len(store)))
    assert rows.keys == keys
    assert rows.labels.tolist() == [
        -100 if int(key[:4]) % 10 == 3 else label
        for key, label in zip(keys, np.delete(make_digit_jpegs()[1][:ROWS], BROKEN).tolist(), strict=True)
    ]
    pixels = torch.stack([torch.tensor(decode_by_pillow(images[int(key[:4])])) for key in keys])
    inputs = ((pixels / 255 - MEAN) / STD).flatten(1)
    logits = []
    for number in range(1, FOLDS + 1):
        state = load_file(digits / "oof.folds" / f"teacher-{number}" / "model.safetensors")
        hidden = torch.tanh(inputs @ state["1.weight"].T + state["1.bias"])
        logits.append((hidden @ state["3.weight"].T + state["3.bias"]).numpy())
    own = np.array([fold_of(key) for key in keys])
    assert np.bincount(own)[1:].min() > ROWS // FOLDS // 2
    for number in range(1, FOLDS + 1):
        scaled = logits[number - 1] / T
        scaled -= scaled.max(axis=1, keepdims=True)
        distance = np.abs(rows.scaled_logits - scaled).max(axis=1)
        assert distance[own == number].max() < 1e-5
        assert distance[own != number].min() > 1e-3


@pytest.mark.parametrize("number", [1, FOLDS])
def test_a_teacher_is_the_network_trained_on_the_labelled_rest(digits: Path, tmp_path: Path, number: int) -> None:
    table = pq.read_table(digits / "data.parquet")
    keys, labels = make_keys(ROWS), table["label"].to_pylist()
    kept = [fold_of(key) != number and label is not None for key, label in zip(keys, labels, strict=True)]
    pq.write_table(table.filter(pa.array(kept)), tmp_path / "rest.parquet")
    options = [word for pair in TRAINING.items() for word in pair]
    run_softlabel(
        *("train", "--data", tmp_path / "rest.parquet", "--student", STUDENT, "--out", tmp_path / "run"), *options
    )
    assert have_equal_weights(tmp_path / "run", digits / "oof.folds" / f"teacher-{number}")


def test_folds_are_sources_and_functions_of_key_and_seed(digits: Path) -> None:
    def read(options: str) -> list[str]:
        return open_source(f"{digits / 'data.parquet'}?{options}").keys()

    keys = make_keys(ROWS)
    for seed in (0, SEED):
        parts = [read(f"fold={number}/4" + f"&fold_seed={seed}" * (seed > 0)) for number in range(1, 5)]
        assert sorted(key for part in parts for key in part) == keys
        for number, part in enumerate(parts, 1):
            assert part == [key for key in keys if fold_of(key, 4, seed) == number]
            rest = read(f"without_fold={number}/4&fold_seed={seed}")
            assert rest == [key for key in keys if key not in part]
            # With other samples beside it, or without, a sample stays in its fold.
            assert read(f"rows=100:&fold={number}/4&fold_seed={seed}") == [key for key in part if key >= keys[100]]
    labelled = open_source(f"{digits / 'data.parquet'}?without_fold=1/4&labelled=only")
    assert labelled.keys() == [key for key in read("without_fold=1/4") if int(key[:4]) % 10 != 3]
    assert labelled.labels().min() >= 0
    assert [sample.key for sample in labelled.read([5, 0])] == [labelled.keys()[5], labelled.keys()[0]]
    assert labelled.blocks()[0][0] == 0
    assert labelled.blocks()[-1][1] == len(labelled)
    counts = np.bincount([fold_of(str(number), 8, 1) for number in range(8000)])[1:]
    assert ((counts - 1000) ** 2 / 1000).sum() < 24.3  # chi-squared with 7 degrees of freedom, p = 0.001


def test_the_whole_is_a_store_like_any_other(digits: Path, tmp_path: Path) -> None:
    data, oof = digits / "data.parquet", digits / "oof"
    inspected = run_softlabel("inspect", oof).stdout
    assert "crossfit   3 folds; each was labelled by a teacher that was trained on the others" in inspected
    assert json.loads(run_softlabel("inspect", oof, "--json").stdout)["recorded"]["crossfit"] == FOLDS
    good = tmp_path / "good.parquet"
    table = pq.read_table(data)
    pq.write_table(pa.concat_tables([table.slice(0, BROKEN), table.slice(BROKEN + 1)]), good)
    run_softlabel("verify", oof, "--data", data)
    run_softlabel(
        "train", "--data", good, "--labels", oof, "--student", STUDENT, "--epochs", 1, "--out", tmp_path / "s"
    )
    assert (
        "KL(teacher || model)"
        in run_softlabel("evaluate", "--data", good, "--model", tmp_path / "s", "--labels", oof).stdout
    )
    run_softlabel("convert", oof, tmp_path / "small", "--encoding", "int8")
    assert "crossfit   3 folds" in run_softlabel("inspect", tmp_path / "small").stdout
    # A fold's own store and teacher are named by SOURCEs and SPECs that other processes can open.
    labels = digits / "oof.folds" / "labels-2"
    assert "whole" in run_softlabel("verify", labels, "--recompute", 20).stdout
    assert "nothing to repair" in run_softlabel("repair", oof).stdout


def test_arguments_of_python_and_several_labels_at_once(tmp_path: Path) -> None:
    """Arrays with independent outputs, some labels not known, some samples without any; the stores of folds go."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(90, 6)).astype(np.float32)
    labels = (inputs[:, :4] > 0).astype(np.int8)
    labels[rng.random(labels.shape) < 0.1] = -1
    labels[::7] = -1
    np.savez(tmp_path / "data.npz", x=inputs, labels=labels)
    data = f"{tmp_path / 'data.npz'}?inputs=x&labels=labels"
    done = softlabel.crossfit(
        data,
        student="python:tests.support.students:build_table_student?inputs=6",
        out=tmp_path / "oof",
        folds=2,
        encoding="float32",
        temperature=1.0,
        epochs=2,
        batch_size=16,
        lr=0.1,
        tensorboard=False,
        progress=False,
    )
    assert [fold.labelled for fold in done.folds] == [
        sum(fold_of(str(n), 2, 0) == k for n in range(90)) for k in (1, 2)
    ]
    assert sorted(path.name for path in (tmp_path / "oof.folds").iterdir()) == [
        *("crossfit.json", "teacher-1", "teacher-2")
    ]
    with open_store(tmp_path / "oof", verify="full") as store:
        assert store.run.activation == "sigmoid"
        rows = store.take(np.arange(90))
    assert rows.keys == [str(number) for number in range(90)]
    np.testing.assert_array_equal(rows.hard_labels, labels)
    for number in (1, 2):
        state = load_file(tmp_path / "oof.folds" / f"teacher-{number}" / "model.safetensors")
        own = [n for n in range(90) if fold_of(str(n), 2, 0) == number]
        expected = inputs[own] @ state["weight"].numpy().T + state["bias"].numpy()
        np.testing.assert_allclose(rows.scaled_logits[own], expected, atol=1e-5)


def test_texts(tmp_path: Path) -> None:
    save_classifier(tmp_path / "bert", layers=1)
    texts = [f"{sentence} {number}" for number in range(5) for sentence in SENTENCES]
    table = pa.table({"text": texts, "label": [number % 3 for number in range(len(texts))]})
    pq.write_table(table, tmp_path / "texts.parquet")
    done = softlabel.crossfit(
        tmp_path / "texts.parquet",
        student=f"text:{tmp_path / 'bert'}",
        out=tmp_path / "oof",
        folds=2,
        epochs=1,
        batch_size=4,
        optimizer="adamw",
        tensorboard=False,
        progress=False,
    )
    assert done.total_rows == len(texts)
    with open_store(tmp_path / "oof", verify="full") as store:
        rows = store.take(np.arange(len(texts)))
    assert rows.keys == [str(number) for number in range(len(texts))]
    found = softlabel.evaluate(
        tmp_path / "oof.folds" / "teacher-2", f"{tmp_path / 'texts.parquet'}?fold=2/2", tmp_path / "oof", progress=False
    )
    assert found.agreement == 1.0


# ---- interruptions ----


def test_killed_in_every_phase(digits: Path, tmp_path: Path) -> None:
    """kill -9, and the same command: what is finished stays, and the end is what it is without a kill."""
    out, folds = tmp_path / "oof", tmp_path / "oof.folds"
    command = make_command(digits / "data.parquet", out, encoding="float32", shard_rows=50)
    rng = random.Random(7)
    done: dict[Path, tuple[int, int]] = {}
    awaited = [folds / "teacher-1" / "checkpoint.pt", folds / "labels-1" / "manifest.json"]
    awaited += [folds / "teacher-2" / "model.json", out / "manifest.json"]
    for path in awaited:
        process = start_softlabel(*command)
        while process.poll() is None and not path.exists():
            time.sleep(0.001)
        if path != awaited[-1]:  # merging takes milliseconds
            time.sleep(rng.random() * 0.02)
            assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        finished = [path.parent / "model.safetensors" for path in folds.glob("teacher-*/model.json")]
        finished += list(folds.glob("labels-*/shards/[0-9]*"))
        now = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished}
        assert {path: now.get(path) for path in done} == done
        done = now
    assert len(done) > FOLDS
    last = run_softlabel(*command)
    assert last.stderr.count("is trained already") == FOLDS
    for number in range(1, FOLDS + 1):
        teacher = f"teacher-{number}"
        assert have_equal_weights(folds / teacher, digits / "oof.folds" / teacher)
    with open_store(out, verify="full") as ours, open_store(digits / "oof") as theirs:
        assert ours.run.fingerprint() == theirs.run.fingerprint()
        all_rows = np.arange(len(theirs))
        np.testing.assert_array_equal(ours.take(all_rows).scaled_logits, theirs.take(all_rows).scaled_logits)
    assert not list(folds.glob("labels-*"))
    assert "already complete" in run_softlabel(*command).stdout


def test_a_damaged_whole_is_made_again_from_the_teachers(digits: Path, tmp_path: Path) -> None:
    """Also without the stores of the folds; `repair` says so. Rows are drawn as they were when it was begun."""
    out, data = tmp_path / "oof", digits / "data.parquet"
    command = make_command(data, out, shard_rows=50, encoding="sampled")
    run_softlabel(*command, "--draw", "independent")
    assert "already complete" in run_softlabel(*command).stdout
    with open_store(out) as store:
        before = store.take(np.arange(len(store))).scaled_logits
        shard = out / store.shards[2].file
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused = run_softlabel("repair", out, code=2)
    assert f"move {out} away and repeat the 'softlabel crossfit' that made it" in refused.stderr
    out.rename(tmp_path / "damaged")
    assert run_softlabel(*command).stderr.count("is trained already") == FOLDS
    with open_store(out, verify="full") as store:
        np.testing.assert_array_equal(store.take(np.arange(len(store))).scaled_logits, before)


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"epochs": 2}, "epochs: 1 there, 2 here"),
        ({"folds": 4}, "folds: 3 there, 4 here"),
        ({"seed": 6}, "seed: 5 there, 6 here"),
        ({"temperature": 4}, "temperature: 2.0 there, 4.0 here"),
        ({"encoding": "int8"}, "encoding: {'name': 'float32'} there, {'name': 'int8'} here"),
        ({"student": "zoo:cnn2"}, f"student: '{STUDENT}' there, 'zoo:cnn2' here"),
        ({"augment": "none"}, "augment: 'crop-flip' there, 'none' here"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_changed_settings_are_refused_by_name(
    digits: Path, tmp_path: Path, changes: dict[str, object], found: str, complete: bool
) -> None:
    out = digits / "oof"
    if not complete:
        out = tmp_path / "oof"
        shutil.copytree(digits / "oof.folds", tmp_path / "oof.folds", ignore=shutil.ignore_patterns("labels-*", "*-2"))
    settings: dict[str, object] = {"encoding": "float32", "shard_rows": 50, **changes}
    refused = run_softlabel(*make_command(digits / "data.parquet", out, **settings), code=2)
    assert found in refused.stderr
    assert "was cross-fitted with other settings" in refused.stderr.splitlines()[-1]


def test_what_makes_no_sense_is_refused(digits: Path, tmp_path: Path) -> None:
    data = str(digits / "data.parquet")

    def refuse(error: type[Exception], message: str, source: str = data, **changes: object) -> None:
        given = {"student": STUDENT, "out": tmp_path / "oof", "epochs": 1, "tensorboard": False, **changes}
        with pytest.raises(error, match=message):
            softlabel.crossfit(source, **given)  # type: ignore[arg-type]
        assert not (tmp_path / "oof.folds").exists()

    refuse(UsageError, "folds: expected 2 to 1000, found 1", folds=1)
    refuse(UsageError, "student lm:x: expected a classifier, found a language model", student="lm:x")
    refuse(UsageError, "soft_weight: expected an option of crossfit", soft_weight=0.5)
    refuse(UsageError, "expected one value of each option", lr=[0.1, 0.2])
    refuse(UsageError, "encoding head: stores the last layer of one teacher", encoding="head")
    refuse(UsageError, "name fold= or without_fold=", f"{data}?fold=1/2")
    refuse(DataError, "fold [1-4] of 4 has no sample: 3 samples", f"{data}?rows=0:3")
    refuse(DataError, "no sample has a hard label", f"{data}?label=none")
    refuse(MismatchError, "begun by 'softlabel crossfit', found another", out=digits / "oof.folds" / "labels-1")
    (tmp_path / "other.folds").mkdir()
    (tmp_path / "other.folds" / "mine").touch()
    refuse(UsageError, "expected the folds of an earlier call, or nothing, found mine", out=tmp_path / "other")
    for options, message in {
        "fold=5/4": "fold: expected NUMBER/FOLDS, such as 1/4",
        "without_fold=x": "without_fold: expected NUMBER/FOLDS",
        "fold=1/4&without_fold=1/4": "found both",
        "fold_seed=1": "expected fold= or without_fold= beside it",
        "fold=1/4&fold_seed=-1": "fold_seed: expected a whole number",
        "labelled=yes": "labelled: expected only, found 'yes'",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_source(f"{data}?{options}")
    # What failed before the first step is replaced by other settings.
    run_softlabel(*make_command(data, tmp_path / "new", student="python:tests.support.students:none"), code=2)
    run_softlabel(*make_command(data, tmp_path / "new", student="zoo:cnn2?resize=8&crop=8&mean=0"))
    run_softlabel("train", "--data", f"{data}?rows=3:4&labelled=only", "--student", STUDENT, "--out", "x", code=2)


def test_classes_that_a_teacher_does_not_see_are_reported(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They have their output all the same: the number of classes is that of the whole."""
    inputs = np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)
    labels = np.arange(40) % 3
    labels[7] = 3
    np.savez(tmp_path / "data.npz", x=inputs, labels=labels)
    softlabel.crossfit(
        f"{tmp_path / 'data.npz'}?inputs=x&labels=labels",
        student="python:tests.support.students:build_table_student?inputs=6",
        out=tmp_path / "oof",
        folds=2,
        epochs=1,
        batch_size=8,
        tensorboard=False,
        progress=False,
    )
    assert f"the teacher without fold {fold_of('7', 2, 0)} sees no sample of class 3" in caplog.text
    with open_store(tmp_path / "oof") as store:
        assert store.run.num_classes == 4
