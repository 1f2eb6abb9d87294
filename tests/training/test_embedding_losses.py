"""Students that learn from stored embeddings: against a step written out, over processes and parts, resumed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
import xxhash
import yaml
from safetensors.torch import load_file
from torch import Tensor

from softlabel import TrainConfig, open_store, train
from softlabel.cli.main import main
from softlabel.errors import MismatchError, UsageError
from softlabel.models import build_model
from softlabel.store.encodings import Head
from softlabel.training.embedding_losses import EMBEDDING_LOSSES
from tests.loss import test_embedding_losses as references
from tests.loss.test_loss_matrix import needs_compiler
from tests.support.commands import run_softlabel
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.stores import Samples, make_run, write_store
from tests.support.training_runs import (
    ROWS,
    STUDENT,
    have_equal_weights,
    make_config,
    make_keys,
    make_settings,
    read_history,
    read_weights,
    train_in_ranks,
    write_features,
)

SMOOTH = "python:tests.support.students:build_smooth_student?resize=16&crop=16"
WIDTH = 12
# With and without a projector, of rows and of batches.
SEVERAL = ["simkd", "srd", "rkd", "crd"]
LEARNING: dict[str, Any] = {"student": SMOOTH, "optimizer": "adamw", "lr": 0.01, "epochs": 30, "augment": "none"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data.parquet and `store` of encoding head, whose teacher knows the labels; few.parquet has 12 of the rows, and
    `part` lacks every fifth row."""
    folder = tmp_path_factory.mktemp("embeddings")
    images, labels = make_digit_jpegs()
    images, labels = images[:ROWS], labels[:ROWS]
    write_parquet(folder / "unlabelled.parquet", images, keys=make_keys(ROWS))
    for name, count in (("data", ROWS), ("few", 12)):
        keys = make_keys(count)
        write_parquet(folder / f"{name}.parquet", images[:count], keys=keys, labels=labels[:count], class_names=DIGITS)
    rng = np.random.default_rng(0)
    weight_CD = 3 * np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0][:10].astype(np.float32)
    bias_C = rng.normal(size=10).astype(np.float32) / 10
    hidden_ND = (weight_CD[labels] + 0.3 * rng.normal(size=(ROWS, WIDTH))).astype(np.float16)
    head = safetensors.numpy.save({"weight": weight_CD, "bias": bias_C})
    keys, content = make_keys(ROWS), np.array([xxhash.xxh3_64_intdigest(image) for image in images], np.uint64)
    for name, rows in (("store", np.arange(ROWS)), ("part", np.flatnonzero(np.arange(ROWS) % 5))):
        run = make_run(
            samples=len(rows),
            classes=10,
            class_names=DIGITS,
            encoding=Head(width=WIDTH, hidden="float16"),
            shard_rows=len(rows),
        )
        samples = Samples(
            keys=[keys[row] for row in rows],
            labels=np.array(labels)[rows],
            content=content[rows],
            logits=np.zeros((1, 1, 10), np.float32),
            columns={"hidden": hidden_ND[None, rows]},
        )
        write_store(folder / name, run, samples, extra={"head": head}, fidelity=None)
    np.savez(folder / "teacher.npz", weight=weight_CD, bias=bias_C, hidden=hidden_ND, labels=labels)
    return folder


def read_projector(run: Path) -> dict[str, Tensor]:
    return load_file(run / "projector.safetensors")


@pytest.mark.parametrize("name", ["cosine", "mse", "srd", "rkd", "pkt", "sp"])
def test_a_step_is_that_of_the_formula(digits: Path, tmp_path: Path, name: str) -> None:
    """Weights and projector after one step of the published weights, against float64 and the papers' formulas."""
    given: dict[str, Any] = {"data": digits / "few.parquet", "student": SMOOTH, "embedding_loss": name, "epochs": 1}
    given |= {"batch_size": 12, "augment": "none", "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    given |= {"warmup_epochs": 0, "schedule": "constant", "temperature": 2.0}
    train(make_config(digits, tmp_path / "before", **given, lr=0.0))
    train(make_config(digits, tmp_path / "after", **given, lr=0.01))
    model = build_model(SMOOTH, num_classes=10).double()
    model.load_state_dict({key: value.double() for key, value in read_weights(tmp_path / "before").items()})
    images_BCHW = _read_inputs(digits)
    teacher = np.load(digits / "teacher.npz")
    labels_B, hidden_BD = torch.from_numpy(teacher["labels"][:12]), torch.from_numpy(teacher["hidden"][:12]).double()
    logits_BC = hidden_BD @ torch.from_numpy(teacher["weight"]).double().T + torch.from_numpy(teacher["bias"]).double()
    taken_BK = model[:3](images_BCHW)
    answer_BC = model[3](taken_BK)
    log_q_BC, p_BC = F.log_softmax(answer_BC / 2, 1), F.softmax(logits_BC / 2, 1)
    loss = 0.9 * 4 * (p_BC * (p_BC.log() - log_q_BC)).sum(1).mean() + 0.1 * F.cross_entropy(answer_BC, labels_B)
    trained = dict(model.named_parameters())
    if EMBEDDING_LOSSES[name].projects:
        projector = {key: one.double().requires_grad_() for key, one in read_projector(tmp_path / "before").items()}
        taken_BK = taken_BK @ projector["projector.weight"].T + projector["projector.bias"]
        trained |= projector
    else:
        assert not (tmp_path / "after" / "projector.safetensors").exists()
    embedding = references.LOSSES[name][1](taken_BK, hidden_BD)
    weight = {"cosine": 1, "mse": 1, "srd": 2, "rkd": 1, "pkt": 30_000, "sp": 3_000}[name]
    (loss + weight * embedding).backward()
    found = read_weights(tmp_path / "after") | (read_projector(tmp_path / "after") if len(trained) > 4 else {})
    for key, value in trained.items():
        moved = 0.01 * value.grad
        bound = 2e-4 * float(moved.abs().max()) + 1e-7
        torch.testing.assert_close(found[key].double(), value.detach() - moved, rtol=0, atol=bound)
    (row,) = read_history(tmp_path / "after")
    assert float(row["embedding_loss"]) == pytest.approx(float(embedding.detach()), rel=1e-4)
    assert float(row["loss"]) == pytest.approx(float((loss + weight * embedding).detach()), rel=1e-4)


def _read_inputs(digits: Path, student: str = SMOOTH) -> Tensor:
    from softlabel.loader import SoftLabelLoader
    from softlabel.models.teacher import student_preprocessing

    preprocessing = student_preprocessing(student)
    loader = SoftLabelLoader(str(digits / "few.parquet"), batch_size=12, shuffle=False, preprocessing=preprocessing)
    (batch,) = loader
    return (
        (batch.inputs / 255 - torch.tensor(preprocessing.mean).view(3, 1, 1))
        / torch.tensor(preprocessing.std).view(3, 1, 1)
    ).double()


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of several losses, on a store that lacks rows."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(make_config(digits, out, **settings(digits)))
    return out


def settings(digits: Path) -> dict[str, Any]:
    given = {"labels": digits / "part", "missing": "hard-only", "student": SMOOTH, "embedding_loss": SEVERAL}
    return {**given, "augment": "none", "batch_size": 60, "epochs": 2, "lr": 0.003, "clip_norm": 5.0}


@pytest.mark.parametrize("how", ["parts", "ranks"])
def test_parts_and_processes_make_the_same_student(digits: Path, whole: Path, tmp_path: Path, how: str) -> None:
    """A batch in 4 parts, or on 2 processes, is one batch: relations are those of all of its rows."""
    if how == "parts":
        train(make_config(digits, tmp_path / "out", **settings(digits), accumulate=4))
    else:
        train_in_ranks(make_settings(digits, tmp_path / "out", **settings(digits)), ranks=2)
    for name in SEVERAL:
        one, other = read_weights(whole / name), read_weights(tmp_path / "out" / name)
        for key, value in one.items():
            torch.testing.assert_close(
                other[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, at=name: f"{at}: {text}"
            )
        mine, theirs = read_history(whole / name), read_history(tmp_path / "out" / name)
        for row, same in zip(mine, theirs, strict=True):
            assert float(same["embedding_loss"]) == pytest.approx(float(row["embedding_loss"]), rel=1e-3)


def test_a_resumed_run_is_the_same_bit_for_bit(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projectors, memories and their optimiser state are in the checkpoint."""
    given = {"embedding_loss": ["simkd", "srd", "crd"], "epochs": 3, "ema": 0.9, "students_at_once": 1}
    train(make_config(digits, tmp_path / "whole", **given))
    from softlabel.training.epoch_loop import Pass

    finish, done = Pass._finish_epoch, []

    def stop(self: Pass, epoch: int, trackers: Any) -> None:
        finish(self, epoch, trackers)
        done.append(epoch)
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Pass, "_finish_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(digits, tmp_path / "out", **given))
    train(make_config(digits, tmp_path / "out", **given))
    for name in given["embedding_loss"]:
        assert have_equal_weights(tmp_path / "whole" / name, tmp_path / "out" / name)
        one, other = read_projector(tmp_path / "whole" / name), read_projector(tmp_path / "out" / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_student_of_simkd_is_a_plain_network(digits: Path, tmp_path: Path) -> None:
    """Its last layer is the product of the projector and the teacher's; alone, it is that of the teacher's features."""
    train(make_config(digits, tmp_path / "out", **LEARNING, embedding_loss="simkd"))
    teacher, student = np.load(digits / "teacher.npz"), read_weights(tmp_path / "out")
    projector = read_projector(tmp_path / "out")
    weight, bias = torch.from_numpy(teacher["weight"]), torch.from_numpy(teacher["bias"])
    torch.testing.assert_close(student["3.weight"], weight @ projector["projector.weight"])
    torch.testing.assert_close(student["3.bias"], weight @ projector["projector.bias"] + bias)
    description = json.loads((tmp_path / "out" / "model.json").read_text())
    assert description["student"] == SMOOTH
    metrics = tmp_path / "metrics.json"
    arguments = ["--data", str(digits / "data.parquet"), "--model", str(tmp_path / "out"), "--out", str(metrics)]
    assert main(["evaluate", *arguments, "--device", "cpu"]) == 0
    assert json.loads(metrics.read_text())["accuracy"] > 0.5  # it never saw a label


def test_losses_are_students_of_one_pass(whole: Path, digits: Path) -> None:
    """With names of their own, of which each is what it is alone."""
    students = json.loads((whole / "students.json").read_text())
    assert list(students) == SEVERAL
    assert students["crd"]["embedding_weight"] == 0.8
    assert (students["simkd"]["soft_weight"], students["simkd"]["hard_weight"]) == (0, 0)
    assert (students["srd"]["soft_weight"], students["srd"]["hard_weight"]) == (0.9, 0.1)


def test_presets_are_printed(digits: Path) -> None:
    """With the numbers of the source, as options that make the same run."""
    words = ["train", "--data", "digits", "--student", STUDENT, "--labels", "labels", "--out", "out"]
    printed = yaml.safe_load(run_softlabel(*words, "--embedding-loss", "simkd", "--print_config").stdout)
    assert printed["embedding_weight"] == [1.0]
    assert (printed["soft_weight"], printed["hard_weight"]) == ([0.0], [0.0])
    several = run_softlabel(*words, "--embedding-loss", "pkt", "sp", "--print_config").stdout
    assert "# pkt: embedding_weight 30000\n# sp: embedding_weight 3000\n" in several


def test_a_loss_alone_and_none(digits: Path, tmp_path: Path) -> None:
    """`none` beside others is the student without the option; a single weight is a part of a name."""
    train(make_config(digits, tmp_path / "plain", students_at_once=1))
    given = {"embedding_loss": ["none", "sp"], "embedding_weight": [1.0, 10.0], "students_at_once": 1}
    train(make_config(digits, tmp_path / "out", **given))
    assert sorted(json.loads((tmp_path / "out" / "students.json").read_text())) == ["none", "sp-embed1", "sp-embed10"]
    assert have_equal_weights(tmp_path / "plain", tmp_path / "out" / "none")
    assert "embedding_loss" not in json.loads((tmp_path / "plain" / "run.json").read_text())
    assert not have_equal_weights(tmp_path / "out" / "sp-embed1", tmp_path / "out" / "sp-embed10")


def test_the_settings_of_each_student_make_it_alone(digits: Path, tmp_path: Path) -> None:
    given = {"embedding_loss": ["pkt", "mse"], "embedding_projector": "mlp", "students_at_once": 1, "epochs": 1}
    train(make_config(digits, tmp_path / "out", **given))
    for name in given["embedding_loss"]:
        settings = yaml.safe_load((tmp_path / "out" / name / "config.yaml").read_text())
        train(TrainConfig(**settings | {"out": str(tmp_path / name)}))
        assert have_equal_weights(tmp_path / "out" / name, tmp_path / name)


def test_embeddings_alone(digits: Path, tmp_path: Path) -> None:
    """Without a soft and a hard term the projected embedding becomes the teacher's."""
    given = {"soft_weight": 0, "hard_weight": 0, "embedding_loss": "mse", "embedding_projector": "mlp"}
    train(make_config(digits, tmp_path / "out", **LEARNING, **given))
    rows = read_history(tmp_path / "out")
    assert float(rows[-1]["embedding_loss"]) < 0.7 * float(rows[0]["embedding_loss"])
    assert rows[-1]["soft_loss"] == ""


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"labels": None}, UsageError, "embedding_loss: pkt needs the teacher's embeddings"),
        ({"embedding_loss": "none", "embedding_weight": 2.0}, UsageError, "embedding_weight: 2.0 is of a loss"),
        ({"embedding_projector": "mlp"}, UsageError, "embedding_projector: pkt compares how embeddings lie"),
        ({"embedding_loss": "simkd", "embedding_projector": "mlp"}, UsageError, "with simkd a linear one"),
        ({"embedding_weight": 0.0}, UsageError, "embedding_weight: expected a number above 0"),
        ({"soft_weight": 0, "mixup": 0.2}, UsageError, "mixup: a mixed sample has no embedding"),
        ({"embedding_loss": "crd", "streaming": True}, UsageError, "crd: takes embeddings of random samples"),
        ({"embedding_loss": "at"}, MismatchError, "attention"),
        ({"student": SMOOTH + "&embedding=7"}, UsageError, "expected the name of a module, found '7'"),
        ({"student": SMOOTH + "&attention=1"}, UsageError, "attention= says where it is taken"),
        (
            {"embedding_loss": ["pkt", "sp"], "stack": "on", "student": SMOOTH},
            UsageError,
            "a loss on embeddings trains beside each student",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_named(
    digits: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        train(make_config(digits, tmp_path / "out", **{"embedding_loss": "pkt", **changes}))


def test_a_module_by_name_is_pooled(digits: Path, tmp_path: Path) -> None:
    student = "zoo:resnet8?resize=16&crop=16&embedding=layer2"
    train(make_config(digits, tmp_path / "out", student=student, embedding_loss="cosine", epochs=1))
    assert read_projector(tmp_path / "out")["projector.weight"].shape == (WIDTH, 32)
    assert json.loads((tmp_path / "out" / "model.json").read_text())["student"] == "zoo:resnet8?resize=16&crop=16"


def test_a_store_without_labels(digits: Path, tmp_path: Path) -> None:
    """Beside hard labels; of data without any, the student's answer becomes the embedding."""
    write_features(tmp_path / "store", np.load(digits / "teacher.npz")["hidden"])
    given = {"labels": tmp_path / "store", "embedding_loss": "mse"}
    with pytest.raises(UsageError, match="give --soft-weight 0 --embedding-loss NAME"):
        train(make_config(digits, tmp_path / "refused", **given))
    given["soft_weight"] = 0
    train(make_config(digits, tmp_path / "labelled", **given, epochs=1))
    assert json.loads((tmp_path / "labelled" / "model.json").read_text())["num_classes"] == 10
    train(make_config(digits, tmp_path / "out", **LEARNING, **given, data=digits / "unlabelled.parquet"))
    assert not (tmp_path / "out" / "projector.safetensors").exists()
    assert read_weights(tmp_path / "out")["3.weight"].shape == (WIDTH, 32)
    rows = read_history(tmp_path / "out")
    assert float(rows[-1]["embedding_loss"]) < 0.7 * float(rows[0]["embedding_loss"])
    assert (rows[-1]["hard_loss"], rows[-1]["loss"]) == ("", rows[-1]["embedding_loss"])


def test_members_lie_side_by_side(digits: Path, tmp_path: Path) -> None:
    write_features(tmp_path / "store", np.load(digits / "teacher.npz")["hidden"], labels=True, members=2)
    given = {"labels": tmp_path / "store", "epochs": 1}
    train(make_config(digits, tmp_path / "out", **given, embedding_loss="srd"))
    assert read_projector(tmp_path / "out")["projector.weight"].shape[0] == 2 * WIDTH
    with pytest.raises(UsageError, match=r"weights: .* their embeddings have no average"):
        train(make_config(digits, tmp_path / "weighted", **given, embedding_loss="srd", weights=[1.0, 0.5]))
    with pytest.raises(UsageError, match="expected the maps of one teacher, found those of 2"):
        train(make_config(digits, tmp_path / "maps", **given, embedding_loss="at"))


def test_attention_is_that_of_the_formula(digits: Path, tmp_path: Path) -> None:
    """Of the stages with maps; the student's larger ones are averaged to the teacher's size before they are squared."""
    write_features(tmp_path / "store", np.load(digits / "teacher.npz")["hidden"], labels=True)
    network = "zoo:resnet8?resize=16&crop=16"
    given: dict[str, Any] = {"data": digits / "few.parquet", "labels": tmp_path / "store", "embedding_loss": "at"}
    given |= {"student": f"{network}&attention=layer1,layer3", "epochs": 1, "batch_size": 12, "lr": 0.0}
    train(make_config(digits, tmp_path / "out", **given, augment="none"))
    model = build_model(network, num_classes=10).double()
    model.load_state_dict(
        {
            key: value.double() if value.is_floating_point() else value
            for key, value in read_weights(tmp_path / "out").items()
        }
    )
    found: dict[str, Tensor] = {}
    for name in ("layer1", "layer3"):
        model.get_submodule(name).register_forward_hook(lambda _, __, value, at=name: found.__setitem__(at, value))
    model(_read_inputs(digits, network))
    stored = open_store(tmp_path / "store").take(np.arange(12), ["attention"]).columns["attention"]
    theirs = torch.from_numpy(stored.astype(np.float64)).split([64, 16], dim=1)
    ours = [F.avg_pool2d(found["layer1"], 2).square().mean(1).flatten(1), found["layer3"].square().mean(1).flatten(1)]
    expected = sum(references.attention_reference(s, t) for s, t in zip(ours, theirs, strict=True))
    (row,) = read_history(tmp_path / "out")
    assert float(row["embedding_loss"]) == pytest.approx(float(expected.detach()), rel=1e-4)
    del given["student"]
    with pytest.raises(UsageError, match="expected 2 maps, for the teacher's of 8x8, 4x4, found"):
        train(make_config(digits, tmp_path / "other", **given))


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, pytest.param({"compile": True}, marks=[pytest.mark.slow, needs_compiler])],
    ids=str,
)
def test_other_ways_to_compute(digits: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Losses on embeddings are computed in float32 under autocast."""
    given = {"embedding_loss": ["rkd", "crd", "simkd"], "epochs": 1, "lr": 0.01, "augment": "none"}
    train(make_config(digits, tmp_path / "plain", **given))
    train(make_config(digits, tmp_path / "out", **given, **changes))
    for name in given["embedding_loss"]:
        (row,), (same,) = read_history(tmp_path / "plain" / name), read_history(tmp_path / "out" / name)
        assert float(same["embedding_loss"]) == pytest.approx(float(row["embedding_loss"]), rel=0.02), name
