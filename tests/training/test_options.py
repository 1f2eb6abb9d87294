"""What the options of training do, each against something that is not the trainer."""

import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import softlabel
from softlabel import SoftLabelLoader, TrainConfig, open_store, train
from softlabel.errors import DataError, MismatchError, StoreError, UsageError
from softlabel.models import build_model
from softlabel.store.manifest import Combine, Member
from tests.support.commands import run_softlabel
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.stores import Samples, draw_logits, make_run, write_store
from tests.support.training_runs import (
    ROWS,
    have_equal_weights,
    make_config,
    make_keys,
    make_settings,
    read_history,
    read_weights,
    start_training,
    wait_for_file,
    write_digits,
)

SMOOTH = "python:tests.support.students:build_smooth_student?resize=16&crop=16"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))


def test_parts_of_a_batch_add_up_to_it(digits: Path, tmp_path: Path) -> None:
    for parts in (1, 3):
        train(make_config(digits, tmp_path / str(parts), student=SMOOTH, accumulate=parts))
    for name, value in read_weights(tmp_path / "1").items():
        torch.testing.assert_close(value, read_weights(tmp_path / "3")[name], rtol=1e-4, atol=1e-5)
    one, three = read_history(tmp_path / "1"), read_history(tmp_path / "3")
    assert float(one[-1]["loss"]) == pytest.approx(float(three[-1]["loss"]), rel=1e-5)


def test_a_clipped_gradient_moves_no_further_than_its_norm(digits: Path, tmp_path: Path) -> None:
    rest = {"student": SMOOTH, "epochs": 1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    rest |= {"warmup_epochs": 0, "lr": 0.5}
    torch.manual_seed(0)
    start = build_model(SMOOTH, num_classes=10).state_dict()
    for clip in (None, 1e-3):
        train(make_config(digits, tmp_path / str(clip), clip_norm=clip, **rest))
        after = read_weights(tmp_path / str(clip))
        moved = torch.cat([(after[name] - start[name]).ravel() for name in start]).norm()
        furthest = 3 * 0.5 * 1e-3  # three steps
        assert (moved > furthest) if clip is None else (0 < moved < furthest * 1.001)


def test_the_average_of_weights_is_evaluated_and_saved(digits: Path, tmp_path: Path) -> None:
    out, test = tmp_path / "run", digits / "data.parquet"
    # One step an epoch: every checkpoint of the weights that are averaged is one of a shorter run.
    rest = {"student": SMOOTH, "batch_size": ROWS, "schedule": "constant", "warmup_epochs": 0, "lr": 0.05}
    result = train(make_config(digits, out, epochs=3, ema=0.2, eval_data=test, **rest))
    torch.manual_seed(0)
    average = {name: value.double() for name, value in build_model(SMOOTH, num_classes=10).state_dict().items()}
    for epochs in (1, 2, 3):
        train(make_config(digits, tmp_path / str(epochs), epochs=epochs, **rest))
        decay = min(0.2, (1 + epochs) / (10 + epochs))
        for name, value in read_weights(tmp_path / str(epochs)).items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
    for name, value in read_weights(out).items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)
    assert result.history[-1].eval_accuracy == softlabel.evaluate(out, test, device="cpu").accuracy


def test_evaluations_stop_a_run_and_choose_its_weights(digits: Path, tmp_path: Path) -> None:
    rest = {"eval_data": digits / "data.parquet", "epochs": 7}
    still = train(make_config(digits, tmp_path / "still", lr=0.0, patience=2, student=SMOOTH, **rest))
    assert len(still.history) == 3  # the first is the best, two more are not better
    rare = train(make_config(digits, tmp_path / "rare", eval_every=5, **rest))
    assert [epoch.epoch for epoch in rare.history if epoch.eval_accuracy is not None] == [5, 7]
    # A rate that destroys what was learned, from the sixth epoch on.
    jump = {"schedule": "step", "lr_drops": [5], "lr_factor": 1e4, "lr": 0.02, "student": SMOOTH}
    best = train(make_config(digits, tmp_path / "best", select="best", **{**rest, **jump}))
    accuracies = [epoch.eval_accuracy for epoch in best.history]
    assert best.student.best is not None
    assert max(accuracies) == best.student.best.eval_accuracy > accuracies[-1]  # type: ignore[type-var, operator]
    assert softlabel.evaluate(tmp_path / "best", rest["eval_data"], device="cpu").accuracy == max(accuracies)  # type: ignore[arg-type, type-var]
    kept = load_file(tmp_path / "best" / "best.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in read_weights(tmp_path / "best").items())


def test_mixup_is_of_hard_labels_and_repeats(digits: Path, tmp_path: Path) -> None:
    rest = {"labels": None, "student": SMOOTH}
    for name, alpha, workers in (("a", 0.4, 0), ("b", 0.4, 2), ("none", 0.0, 0)):
        train(make_config(digits, tmp_path / name, mixup=alpha, workers=workers, **rest))
    assert have_equal_weights(tmp_path / "a", tmp_path / "b")
    assert not have_equal_weights(tmp_path / "a", tmp_path / "none")
    with pytest.raises(UsageError, match="mixup: a mixed sample has no soft label"):
        make_config(digits, tmp_path / "soft", mixup=0.4)


def test_mixup_mixes_by_its_formula(digits: Path, tmp_path: Path) -> None:
    """With so large an alpha every share is 1/2, and with one row in a batch an image is mixed with itself."""
    rest = {"labels": None, "student": SMOOTH, "epochs": 1, "augment": "none"}
    train(make_config(digits, tmp_path / "alone", mixup=1e9, batch_size=1, **rest))
    train(make_config(digits, tmp_path / "plain", batch_size=1, **rest))
    for name, value in read_weights(tmp_path / "plain").items():
        torch.testing.assert_close(read_weights(tmp_path / "alone")[name], value, rtol=1e-3, atol=1e-5)


def test_the_teacher_is_measured_while_training(digits: Path, tmp_path: Path) -> None:
    rest = {"student": SMOOTH, "batch_size": 40, "augment": "none", "lr": 0.0}
    result = train(make_config(digits, tmp_path / "run", **rest))
    found = open_store(digits / "store").take(np.arange(ROWS))
    scaled_NC = found.scaled_logits.astype(np.float64)
    p_NC = np.exp(scaled_NC) / np.exp(scaled_NC).sum(axis=1, keepdims=True)
    last = result.history[-1]
    assert last.target_entropy == pytest.approx(-(p_NC * np.log(p_NC)).sum(axis=1).mean(), rel=1e-4)
    assert last.teacher_accuracy == pytest.approx((p_NC.argmax(axis=1) == found.labels).mean())
    measured = softlabel.evaluate(tmp_path / "run", digits / "data.parquet", digits / "store", device="cpu")
    assert last.teacher_agreement == measured.agreement
    assert measured.note is None


def test_members_that_a_store_keeps_apart_are_combined(digits: Path, tmp_path: Path) -> None:
    two_NMC = np.stack([draw_logits(ROWS, 10, seed=seed) for seed in (1, 2)], axis=1)
    two_NMC = (two_NMC - two_NMC.max(axis=2, keepdims=True)) / 4
    labels = open_store(digits / "store").take(np.arange(ROWS)).labels
    for name, logits_NMC in (("kept", two_NMC), ("second", two_NMC[:, 1:])):
        members = logits_NMC.shape[1]
        member = Member(spec="test", sha256="0" * 64, num_classes=10)
        combine = Combine(rule="keep", weights=(0.5, 0.5)) if members == 2 else Combine()
        run = make_run(samples=ROWS, classes=10, members=(member,) * members, combine=combine)
        columns = {"logits": logits_NMC.reshape(1, ROWS, -1).astype(np.float16)}
        content = np.zeros(ROWS, np.uint64)
        samples = Samples(
            keys=make_keys(ROWS), labels=labels, content=content, logits=two_NMC[None, :, 0], columns=columns
        )
        write_store(tmp_path / name, run, samples)
    rest = {"student": SMOOTH, "epochs": 1}
    chosen = {"labels": tmp_path / "kept", "combine": "logits", "weights": [0.0, 1.0]}
    train(make_config(digits, tmp_path / "a", **chosen, **rest))
    train(make_config(digits, tmp_path / "b", labels=tmp_path / "second", **rest))
    assert have_equal_weights(tmp_path / "a", tmp_path / "b")
    # The mean probability, which is what is trained on unless something else is asked for, is another teacher.
    train(make_config(digits, tmp_path / "c", labels=tmp_path / "kept", **rest))
    assert not have_equal_weights(tmp_path / "a", tmp_path / "c")
    with pytest.raises(UsageError, match="only the members of a store that keeps them apart"):
        train(make_config(digits, tmp_path / "d", combine="logits", **rest))
    with pytest.raises(UsageError, match="probabilities are averaged at one temperature"):
        train(make_config(digits, tmp_path / "e", labels=tmp_path / "kept", temperature=[2.0, 4.0], **rest))


@pytest.mark.parametrize(("encoding", "says"), [("topk", "largest classes"), ("sampled", "drawn from the teacher")])
def test_measures_that_an_encoding_cannot_give_are_named(
    digits: Path, tmp_path: Path, encoding: str, says: str
) -> None:
    options = {"topk": ["--top-k", 3], "sampled": ["--samples", 8]}[encoding]
    run_softlabel("convert", digits / "store", tmp_path / "store", "--encoding", encoding, *options)
    result = train(make_config(digits, tmp_path / "run", labels=tmp_path / "store", student=SMOOTH))
    given = ["--data", digits / "data.parquet", "--model", tmp_path / "run", "--labels", tmp_path / "store"]
    shown = run_softlabel("evaluate", *given, "--out", tmp_path / "new" / "figures.json")
    figures = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert f"{figures['accuracy']:.4f}" in shown.stdout
    again = run_softlabel("evaluate", "--config", tmp_path / "new" / "figures.config.yaml")
    assert again.stdout == shown.stdout
    assert says in shown.stdout
    assert "KL(teacher" not in shown.stdout
    whole = softlabel.evaluate(tmp_path / "run", digits / "data.parquet", digits / "store", device="cpu")
    found = softlabel.evaluate(tmp_path / "run", digits / "data.parquet", tmp_path / "store", device="cpu")
    if encoding == "topk":
        assert (found.agreement, found.teacher_accuracy) == (whole.agreement, whole.teacher_accuracy)
        assert result.history[-1].teacher_accuracy is not None
    else:
        assert (found.agreement, found.teacher_accuracy) == (None, None)
        assert result.history[-1].teacher_accuracy is None


# ---- labelled and unlabelled data ----


def two_sources(folder: Path) -> tuple[Path, Path]:
    images, labels = make_digit_jpegs()
    one = write_parquet(folder / "few.parquet", images[:12], keys=make_keys(12), labels=labels[:12], class_names=DIGITS)
    return one, write_parquet(folder / "many.parquet", images[:ROWS], keys=[f"u/{key}" for key in make_keys(ROWS)])


def test_sources_are_mixed_by_their_ratio_in_an_order_of_its_own(tmp_path: Path) -> None:
    few, many = map(str, two_sources(tmp_path))

    def batches(epochs: int, **options: object) -> list[list[str]]:
        loader = SoftLabelLoader([few, many], source_ratio=(1, 3), tail="drop", **{"batch_size": 8, **options})  # type: ignore[arg-type]
        assert len(loader) == 48 // int(str(options.get("batch_size", 8)))
        return [list(batch.keys) for _ in range(epochs) for batch in loader]

    found = batches(10)
    for batch in found:
        assert sum(not key.startswith("u/") for key in batch) == 2
    for epoch in range(10):
        seen = [key for batch in found[6 * epoch : 6 * epoch + 6] for key in batch]
        assert sorted(key for key in seen if not key.startswith("u/")) == make_keys(12)
    unlabelled = [key for batch in found for key in batch if key.startswith("u/")]
    for start in range(0, 360, ROWS):  # pass after pass over the larger source, across the epochs
        assert len(set(unlabelled[start : start + ROWS])) == ROWS
    assert unlabelled[:ROWS] != unlabelled[ROWS : 2 * ROWS]
    # The same sequence with other batches, and as the shares of two ranks.
    wide = batches(2, batch_size=16)
    assert list(itertools.chain(*wide)) == list(itertools.chain(*found[:12]))
    halves = [batches(2, rank=rank, world_size=2) for rank in (0, 1)]
    assert [one + other for one, other in zip(*halves, strict=True)] == found[:12]
    with pytest.raises(UsageError, match="source_ratio: expected a whole number of at least 1 for each of 2 sources"):
        SoftLabelLoader([few, many], source_ratio=(1, 2, 3))


def test_few_labels_and_many_images_train_together(digits: Path, tmp_path: Path) -> None:
    images, labels = make_digit_jpegs()
    few = write_parquet(
        tmp_path / "few.parquet", images[:12], keys=make_keys(12), labels=labels[:12], class_names=DIGITS
    )
    data = [str(few), str(digits / "unlabelled.parquet")]
    rest = {"data": data, "source_ratio": "1:3", "batch_size": 16, "hard_weight": 1.0, "soft_weight": 0.5, "epochs": 3}
    result = train(make_config(digits, tmp_path / "run", **rest))
    assert result.history[-1].step == 3 * (48 // 16)
    assert result.history[-1].hard_loss is not None
    # The hard loss is over the labelled rows alone, the soft loss over all: as the weights say.
    last = result.history[-1]
    assert last.loss == pytest.approx(1.0 * last.hard_loss + 0.5 * last.soft_loss, rel=1e-4)  # type: ignore[operator]
    with pytest.raises(UsageError, match="source_ratio: expected a whole number"):
        make_config(digits, tmp_path / "run", **{**rest, "source_ratio": "1:2:3"})
    shown = run_softlabel("train", "--data", data[0], "--data", data[1], "--labels", digits / "store", "--out",
                    tmp_path / "plain", "--student", SMOOTH, "--epochs", 1, "--batch-size", 33)  # fmt: skip
    assert "4 steps" in shown.stdout  # every sample of both: 132


# ---- what breaks in the middle ----


def interrupted(monkeypatch: pytest.MonkeyPatch, action: object) -> None:
    original = SoftLabelLoader.__iter__

    def breaking(loader: SoftLabelLoader):  # type: ignore[no-untyped-def]
        for step, batch in enumerate(original(loader)):
            if loader.epoch == 1 and step == 1:
                action(loader)  # type: ignore[operator]
            yield batch

    monkeypatch.setattr(SoftLabelLoader, "__iter__", breaking)


def test_a_worker_that_dies_is_named_and_the_run_goes_on(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config(digits, tmp_path / "straight", checkpoint_minutes=0, epochs=20))

    def kill(loader: SoftLabelLoader) -> None:
        worker = next(child for child in multiprocessing.active_children() if child.daemon)
        os.kill(worker.pid or 0, signal.SIGKILL)

    interrupted(monkeypatch, kill)
    rest = {"workers": 2, "checkpoint_minutes": 0, "epochs": 20, "cache_mb": 0}
    with pytest.raises(DataError, match="a loader process died"):
        train(make_config(digits, tmp_path / "broken", **rest))
    monkeypatch.undo()
    assert train(make_config(digits, tmp_path / "broken", **rest)).resumed_from >= 1
    assert have_equal_weights(tmp_path / "straight", tmp_path / "broken")


def test_a_shard_that_vanishes_is_named_and_the_run_goes_on(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_softlabel("convert", digits / "store", tmp_path / "store", "--shard-rows", 20)
    rest = {"labels": tmp_path / "store", "streaming": True, "checkpoint_minutes": 0, "batch_size": 16}
    train(make_config(digits, tmp_path / "straight", **rest))
    away = tmp_path / "away"

    def vanish(loader: SoftLabelLoader) -> None:
        if (tmp_path / "store" / "shards").exists():
            (tmp_path / "store" / "shards").rename(away)

    interrupted(monkeypatch, vanish)
    with pytest.raises(StoreError, match=r"shards/.*"):
        train(make_config(digits, tmp_path / "broken", **rest))
    monkeypatch.undo()
    away.rename(tmp_path / "store" / "shards")
    assert train(make_config(digits, tmp_path / "broken", **rest)).resumed_from >= 1
    assert have_equal_weights(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)  # as if it were not there
    with pytest.raises(UsageError, match=rf"pip install 'softlabel\[{tracker}\]'"):
        train(make_config(digits, tmp_path / "run", tracker=tracker))


def test_a_finished_run_is_lengthened_as_the_message_says(digits: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("a run?", "second", "third"))
    train(make_config(digits, first, student=SMOOTH, epochs=1))
    with pytest.raises(MismatchError, match="or train its weights for 2 more epochs") as refused:
        train(make_config(digits, first, student=SMOOTH, epochs=3))
    words = shlex.split(str(refused.value).rpartition("same command with ")[2])
    changes = dict(zip((word[2:] for word in words[::2]), words[1::2], strict=True))
    assert (changes.pop("out"), changes.pop("epochs")) == ("OTHER", "2")
    # A learning rate of 0 leaves the weights that it starts from as they are.
    still = {"epochs": 2, "lr": 0.0, "weight_decay": 0.0}
    train(make_config(digits, second, **changes, **still))
    train(make_config(digits, third, student=f"run:{second}", **still))
    before, after = read_weights(first), read_weights(third)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # A run stands on its own.
    shutil.rmtree(first)
    shutil.rmtree(second)
    assert build_model(f"run:{third}").state_dict().keys() == before.keys()


def test_an_epoch_is_one_line_where_standard_error_is_no_terminal(digits: Path, tmp_path: Path) -> None:
    data = ["--data", digits / "data.parquet", "--student", SMOOTH, "--device", "cpu", "--tensorboard=false"]
    output = run_softlabel("train", *data, "--out", tmp_path / "run", "--epochs", 2).stderr
    lines = [line.split()[:2] for line in output.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2


def test_weights_after_chosen_epochs_are_runs(digits: Path, tmp_path: Path) -> None:
    """Each is what a run of so many epochs is, is a teacher, and is not asked for once its epoch is over."""
    plain = {"schedule": "constant", "warmup_epochs": 0}
    train(make_config(digits, tmp_path / "run", keep_epochs=[1, 3], **plain))
    train(make_config(digits, tmp_path / "one", epochs=1, **plain))
    assert sorted(found.name for found in (tmp_path / "run").glob("epoch-*")) == ["epoch-1", "epoch-3"]
    assert have_equal_weights(tmp_path / "run" / "epoch-1", tmp_path / "one")
    assert have_equal_weights(tmp_path / "run" / "epoch-3", tmp_path / "run")
    made = softlabel.generate(
        digits / "data.parquet", teachers=[f"run:{tmp_path / 'run' / 'epoch-1'}"], out=tmp_path / "labels"
    )
    assert made.total_rows == ROWS

    with pytest.raises(UsageError, match=r"keep_epochs: expected the weights after epoch 2 .* found none"):
        train(make_config(digits, tmp_path / "run", keep_epochs=[2], **plain))
    with pytest.raises(UsageError, match="keep_epochs: expected epochs from 1 to 3, found 4"):
        make_config(digits, tmp_path / "run", keep_epochs=[4])
    train(make_config(digits, tmp_path / "run", keep_epochs=[2], overwrite=True, **plain))
    assert [found.name for found in (tmp_path / "run").glob("epoch-*")] == ["epoch-2"]


def test_kept_weights_survive_an_interruption(digits: Path, tmp_path: Path) -> None:
    """An epoch that ended before the interruption is kept already, and one after it by the run that goes on."""
    rest = {"epochs": 30, "keep_epochs": [1, 30], "checkpoint_minutes": 1e-4}
    settings = make_settings(digits, tmp_path / "run", **rest)
    process = start_training(settings)
    wait_for_file(tmp_path / "run" / "epoch-1" / "model.json", process)
    process.kill()
    process.communicate()
    begun = read_weights(tmp_path / "run" / "epoch-1")
    train(TrainConfig(**settings))  # type: ignore[arg-type]
    train(make_config(digits, tmp_path / "straight", **rest))
    assert have_equal_weights(tmp_path / "run" / "epoch-30", tmp_path / "straight" / "epoch-30")
    after = read_weights(tmp_path / "straight" / "epoch-1")
    assert all(torch.equal(begun[name], after[name]) for name in after)
