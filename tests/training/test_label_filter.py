"""Soft labels that students do not follow: those of samples that a user would have left out, or changed, by hand."""

from pathlib import Path

import numpy as np
import pytest

from softlabel import open_store, train
from softlabel.errors import MismatchError, UsageError
from tests.support.commands import run_softlabel
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.stores import draw_logits, write_logits
from tests.support.training_runs import (
    ROWS,
    have_equal_weights,
    make_config,
    make_keys,
    make_settings,
    read_history,
    read_weights,
    train_in_ranks,
)

REST = {"student": "python:tests.support.students:build_smooth_student?resize=16&crop=16", "epochs": 2}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is often wrong; every fifth sample has no hard label. Beside its store those that a user would
    have made of it: without the rows that differ from the hard label, without those that are not within 0.3 and 0.9,
    and with the classes exchanged."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = make_digit_jpegs()
    images, labels = images[:ROWS], labels[:ROWS]
    known = [None if number % 5 == 0 else int(label) for number, label in enumerate(labels)]
    write_parquet(folder / "data.parquet", images, keys=make_keys(ROWS), labels=known, class_names=DIGITS)
    write_parquet(folder / "unlabelled.parquet", images, keys=make_keys(ROWS))
    logits_NC = draw_logits(ROWS, 10)
    logits_NC[np.arange(ROWS), labels] += 3

    def write(name: str, logits_NC: np.ndarray, rows: np.ndarray) -> None:
        chosen = {"images": [images[row] for row in rows], "labels": [int(labels[row]) for row in rows]}
        write_logits(
            folder / name, [make_keys(ROWS)[row] for row in rows], logits_NC[rows], class_names=DIGITS, **chosen
        )

    write("store", logits_NC, np.arange(ROWS))
    store = open_store(folder / "store")
    raw_NC = store.take(np.arange(ROWS)).scaled_logits.astype(np.float64) * store.run.temperature
    sure_N = (np.exp(raw_NC) / np.exp(raw_NC).sum(axis=1, keepdims=True)).max(axis=1)
    differ_N = np.array([label is not None and row.argmax() != label for row, label in zip(raw_NC, known, strict=True)])
    outside_N = (sure_N < 0.3) | (sure_N > 0.9)
    assert 10 < differ_N.sum() < ROWS - 20
    assert 10 < outside_N.sum() < ROWS - 20
    write("mask", logits_NC, np.flatnonzero(~differ_N))
    write("confidence", logits_NC, np.flatnonzero(~outside_N))
    swapped_NC = logits_NC.copy()
    for row in np.flatnonzero(differ_N):
        one, other = int(raw_NC[row].argmax()), int(labels[row])
        swapped_NC[row, [one, other]] = swapped_NC[row, [other, one]]
    write("swap", swapped_NC, np.arange(ROWS))
    np.savez(folder / "shares.npz", mask=1 - differ_N.mean(), confidence=1 - outside_N.mean(), swap=1.0,
             differing=differ_N.sum() / (ROWS - ROWS // 5))  # fmt: skip
    return folder


OPTIONS = {
    "mask": {"fix_labels": "mask"},
    "swap": {"fix_labels": "swap"},
    "confidence": {"confidence": "0.3:0.9"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("loss", ["kd", "dkd", "dist"])
def test_a_filter_does_what_a_user_would_do_to_the_store(digits: Path, tmp_path: Path, name: str, loss: str) -> None:
    rest = {**REST, "loss": loss, "batch_size": ROWS}
    result = train(make_config(digits, tmp_path / "filtered", labels=digits / "store", **OPTIONS[name], **rest))
    train(make_config(digits, tmp_path / "by-hand", labels=digits / name, missing="hard-only", **rest))
    assert have_equal_weights(tmp_path / "filtered", tmp_path / "by-hand")
    shares = np.load(digits / "shares.npz")
    last = result.history[-1]
    assert last.kept_share == pytest.approx(float(shares[name]))
    assert last.differing_share == (0.0 if name == "confidence" else pytest.approx(float(shares["differing"])))
    assert float(read_history(tmp_path / "filtered")[-1]["kept_share"]) == pytest.approx(float(shares[name]))
    assert "kept_share" not in read_history(tmp_path / "by-hand")[-1]


def test_parts_and_processes_add_up_to_the_batch(digits: Path, tmp_path: Path) -> None:
    rest = {**REST, "confidence": "0.3:0.9", "fix_labels": "swap", "batch_size": 31, "loss": ["kd", "dist"]}
    train(make_config(digits, tmp_path / "one", **rest))
    train_in_ranks(make_settings(digits, tmp_path / "two", accumulate=2, **rest), ranks=2)
    for loss in ("kd", "dist"):
        for name, value in read_weights(tmp_path / "one" / loss).items():
            np.testing.assert_allclose(
                value.numpy(), read_weights(tmp_path / "two" / loss)[name].numpy(), rtol=2e-3, atol=2e-4
            )
        one, two = (read_history(tmp_path / folder / loss)[-1] for folder in ("one", "two"))
        for name in ("loss", "kept_share", "differing_share"):
            assert float(one[name]) == pytest.approx(float(two[name]), rel=2e-4)


def test_the_log_says_what_is_kept(digits: Path, tmp_path: Path) -> None:
    given = ["train", "--data", digits / "data.parquet", "--labels", digits / "store", "--student", REST["student"]]
    given += ["--augment", "none", "--batch-size", ROWS, "--epochs", 1, "--out", tmp_path / "run"]
    shown = run_softlabel(*given, "--confidence", "0.3:0.9", "--fix-labels", "mask").stderr
    shares = np.load(digits / "shares.npz")
    assert f"not the hard label {float(shares['differing']):.2%}" in shown
    assert "soft labels kept" in shown
    # Resumed runs of the same options only.
    assert "confidence" in run_softlabel(*given, "--confidence", "0.2:0.9", "--fix-labels", "mask", code=2).stderr


def test_labels_of_the_most_probable_classes(digits: Path, tmp_path: Path) -> None:
    run_softlabel("convert", digits / "store", tmp_path / "topk", "--encoding", "topk", "--top-k", 3)
    run_softlabel("convert", digits / "store", tmp_path / "sampled", "--encoding", "sampled", "--samples", 8)
    rest = {**REST, "labels": tmp_path / "topk", "batch_size": ROWS}
    result = train(make_config(digits, tmp_path / "run", fix_labels="mask", **rest))
    assert result.history[-1].kept_share == pytest.approx(float(np.load(digits / "shares.npz")["mask"]))
    with pytest.raises(UsageError, match="fix_labels: swap needs the teacher's logit of the label"):
        train(make_config(digits, tmp_path / "swap", fix_labels="swap", **rest))
    with pytest.raises(MismatchError, match=r"confidence: .*its tail is known at temperature"):
        train(make_config(digits, tmp_path / "confidence", confidence="0.3:0.9", **rest))
    with pytest.raises(UsageError, match="confidence: needs the teacher's most probable class"):
        train(
            make_config(
                digits, tmp_path / "sampled-run", **{**rest, "labels": tmp_path / "sampled"}, confidence="0:0.9"
            )
        )


def test_mistakes_are_named(digits: Path, tmp_path: Path) -> None:
    for text in ("0.9", "0.9:0.3", "0:1.1", "a:b", "0.1:0.2:0.3"):
        with pytest.raises(UsageError, match="confidence: expected two probabilities LO:HI"):
            make_config(digits, tmp_path, confidence=text)
    with pytest.raises(UsageError, match="fix_labels: swap is of the soft term, which needs soft labels"):
        make_config(digits, tmp_path, fix_labels="swap", labels=None)
    with pytest.raises(UsageError, match="fix_labels: compares soft labels with hard ones, which no sample has"):
        train(make_config(digits, tmp_path, data=digits / "unlabelled.parquet", fix_labels="mask", **REST))
