"""Stores of teachers with independent outputs, against plain forward passes and numpy in float64.

N samples, C classes, M members.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

import softlabel
from softlabel.convert import combine_store, convert_store, export_store, merge_stores
from softlabel.errors import MismatchError, SpecError, TeacherError, UsageError
from softlabel.labels.combine import Combination
from softlabel.loader.target import make_target
from softlabel.loss import SigmoidTarget
from softlabel.maintain.extend import extend
from softlabel.models import build_model
from softlabel.store.encodings import Head, Int8, Sampled, TopK
from tests.support.commands import run_softlabel
from tests.support.teachers import write_teacher

N, C, T = 70, 5, 2.0
PLAIN = "mean=0&std=1"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 images with labels of five classes at once, some of them unknown, and three teachers."""
    folder = tmp_path_factory.mktemp("sigmoid")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images)
    np.savez(folder / "more.npz", images=rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8), key=np.arange(900, 909))
    for seed in range(3):
        write_teacher(folder / f"t{seed}.safetensors", num_classes=C, seed=seed)
    write_teacher(folder / "one.safetensors", num_classes=1, seed=4)
    likely = sigmoid((answers(folder, 0) + answers(folder, 1)) / 6)
    labels = (rng.random((N, C)) < likely).astype(np.int8)
    labels[rng.random((N, C)) < 0.2] = -1
    labels[3] = -1
    np.savez(folder / "data.npz", images=images, labels=labels)
    return folder


def spec(ready: Path, name: object = 0) -> str:
    return f"zoo:resnet8@{ready}/{name if isinstance(name, str) else f't{name}'}.safetensors?{PLAIN}"


def data(ready: Path) -> str:
    return f"{ready}/data.npz?images=images&labels=labels"


def answers(ready: Path, name: object = 0) -> Any:
    """What the network gives, without softlabel's teacher, engine or store: float64 (N, C)."""
    images = torch.from_numpy(np.load(ready / "data.npz")["images"]).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        return build_model(spec(ready, name)).eval()(images).double().numpy()


def make(ready: Path, out: Path, *names: object, **options: Any) -> Any:
    settings = {"activation": "sigmoid", "temperature": T, "batch_size": 16, "shard_rows": 30, "preflight": False}
    teachers = [spec(ready, name) for name in names or (0,)]
    softlabel.generate(data(ready), **{"teachers": teachers, "out": out, "progress": False, **settings, **options})
    return softlabel.open_store(out, verify="full")


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def binary_kl(t: Any, z: Any) -> Any:
    """(N,): mean over the classes."""
    p, q = sigmoid(t), sigmoid(z)
    return (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(axis=-1)


@pytest.mark.parametrize(
    ("encoding", "within"), [("float32", 1e-5), ("float16", 4e-3), (Int8(), 4e-3), (Head(), 2e-2)], ids=str
)
def test_stored_are_the_scaled_logits_themselves(ready: Path, tmp_path: Path, encoding: Any, within: float) -> None:
    store = make(ready, tmp_path / "s", encoding=encoding)
    rows, exact = store.take(range(N)), answers(ready) / T
    np.testing.assert_allclose(rows.scaled_logits, exact, atol=within)
    assert (rows.scaled_logits.max(axis=1) != 0).all()
    np.testing.assert_array_equal(rows.hard_labels, np.load(ready / "data.npz")["labels"])
    assert (rows.labels == -100).all()
    lost, measured = binary_kl(exact, rows.scaled_logits.astype(np.float64)), store.manifest.totals.fidelity
    assert measured is not None
    assert measured.mean_t == pytest.approx(0 if encoding == "float32" else lost.mean(), rel=0.05, abs=1e-12)
    assert measured.worst_t == pytest.approx(0 if encoding == "float32" else lost.max(), rel=0.05, abs=1e-12)
    assert store.manifest.format_version == 6
    target = make_target(store.run, rows.columns, extra=store.extra)
    assert isinstance(target, SigmoidTarget)
    np.testing.assert_allclose(target.scaled_logits.float().numpy(), rows.scaled_logits, atol=1e-6)
    assert target.retemperable


def test_the_command_line_and_what_it_says(ready: Path, tmp_path: Path) -> None:
    options = ["--data", data(ready), "--teacher", spec(ready), "--activation", "sigmoid", "--batch-size", 32]
    done = run_softlabel("generate", *options, "--out", tmp_path / "s")
    known = np.load(ready / "data.npz")["labels"]
    right = ((answers(ready) > 0) == (known > 0))[known >= 0].mean()
    assert f"accuracy of these labels where a hard label exists: {right:.4f}" in done.stdout
    assert "activation sigmoid" in run_softlabel("inspect", tmp_path / "s").stdout
    run_softlabel("verify", tmp_path / "s", "--recompute", 20, "--data", data(ready))
    offered = run_softlabel("plan", *options, "--seconds", 0.1).stdout
    assert "int8" in offered
    assert "topk" not in offered
    run = json.loads((tmp_path / "s" / "manifest.json").read_text())["run"]
    assert run["activation"] == "sigmoid"
    # What was begun is finished with the same outputs alone.
    refused = run_softlabel("generate", *options[:4], "--out", tmp_path / "s", "--ignore-labels", code=2)
    assert "activation: the store has sigmoid, this run softmax" in refused.stderr


def test_a_list_of_images_with_a_column_for_each_class(ready: Path, tmp_path: Path) -> None:
    given = np.load(ready / "data.npz")
    names = [f"finding {number}" for number in range(C)]
    lines = [",".join(["Path", "Age", *names])]
    for row, (image, flags) in enumerate(zip(given["images"], given["labels"], strict=True)):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
        unknown = "-1.0" if row % 2 else ""  # uncertain or not mentioned, as CheXpert writes them
        lines.append(",".join([f"{row}.png", "60", *(unknown if flag < 0 else f"{flag}.0" for flag in flags)]))
    (tmp_path / "chest.csv").write_text("\n".join(lines))
    base = ["generate", "--teacher", spec(ready), "--activation", "sigmoid", "--batch-size", 32]
    done = run_softlabel(*base, "--data", f"{tmp_path}/chest.csv?labels={','.join(names)}", "--out", tmp_path / "s")
    right = ((answers(ready) > 0) == (given["labels"] > 0))[given["labels"] >= 0].mean()
    assert f"accuracy of these labels where a hard label exists: {right:.4f}" in done.stdout
    store = softlabel.open_store(tmp_path / "s")
    np.testing.assert_array_equal(store.take(range(N)).hard_labels, given["labels"])
    assert list(store.run.class_names or ()) == names
    unlabelled = run_softlabel(*base, "--data", tmp_path / "chest.csv", "--out", tmp_path / "u")
    assert "'?labels=COLUMN,COLUMN' several classes at once" in unlabelled.stderr


@pytest.mark.parametrize("rule", ["logits", "probs"])
def test_members_are_averaged(ready: Path, tmp_path: Path, rule: str) -> None:
    store = make(ready, tmp_path / "s", 0, 1, combine=rule, weights=[3, 1], encoding="float32")
    one, other = answers(ready, 0) / T, answers(ready, 1) / T
    share = 0.75 * sigmoid(one) + 0.25 * sigmoid(other)
    expected = 0.75 * one + 0.25 * other if rule == "logits" else np.log(share / (1 - share))
    np.testing.assert_allclose(store.take(range(N)).scaled_logits, expected, atol=2e-5)
    assert make_target(store.run, store.take([0]).columns).retemperable == (rule == "logits")
    # The same out of kept members: when a student is trained, and as a store of its own.
    kept = make(ready, tmp_path / "k", 0, 1, combine="keep", encoding="float32")
    chosen = Combination(rule=rule, weights=(3, 1))  # type: ignore[arg-type]
    target = make_target(kept.run, kept.take(range(N)).columns, combination=chosen)
    np.testing.assert_allclose(target.scaled_logits.numpy(), expected, atol=2e-5)
    combine_store(tmp_path / "k", tmp_path / "c", weights=[3, 1], combine=rule, progress=False)  # type: ignore[arg-type]
    made = softlabel.open_store(tmp_path / "c", verify="full").take(range(N))
    np.testing.assert_allclose(made.scaled_logits, expected, atol=2e-5)
    np.testing.assert_array_equal(made.hard_labels, np.load(ready / "data.npz")["labels"])


def test_a_store_over_its_life(ready: Path, tmp_path: Path) -> None:
    labels = np.load(ready / "data.npz")["labels"]
    kept = make(ready, tmp_path / "k", 0, 1, combine="keep")
    whole = kept.take(range(N))
    run_softlabel("extend", tmp_path / "k", "--teacher", spec(ready, 2))
    extended = softlabel.open_store(tmp_path / "k", verify="full").take(range(N))
    np.testing.assert_allclose(extended.scaled_logits[:, 2], answers(ready, 2) / T, atol=4e-3)
    np.testing.assert_array_equal(extended.scaled_logits[:, :2], whole.scaled_logits)
    np.testing.assert_array_equal(extended.hard_labels, labels)
    # Damaged, found, and labelled again to the bit.
    victim = next((tmp_path / "k" / "shards").glob("00001-*"))
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 8
    victim.write_bytes(raw)
    assert victim.name in run_softlabel("verify", tmp_path / "k", code=3).stdout
    run_softlabel("repair", tmp_path / "k")
    np.testing.assert_array_equal(
        softlabel.open_store(tmp_path / "k", verify="full").take(range(N)).scaled_logits, extended.scaled_logits
    )
    # Another file format and encoding; another temperature; more samples, without labels.
    plain = make(ready, tmp_path / "s", encoding="float32").take(range(N))
    convert_store(tmp_path / "s", tmp_path / "h", format="hdf5", encoding="float16", progress=False)
    made = softlabel.open_store(tmp_path / "h", verify="full")
    np.testing.assert_allclose(made.take(range(N)).scaled_logits, plain.scaled_logits, atol=4e-3)
    np.testing.assert_array_equal(made.take(range(N)).hard_labels, labels)
    combine_store(tmp_path / "h", tmp_path / "cold", temperature=1, progress=False)
    cold = softlabel.open_store(tmp_path / "cold", verify="full").take(range(N))
    np.testing.assert_allclose(cold.scaled_logits, T * plain.scaled_logits, atol=8e-3)
    make_more = {"teachers": [spec(ready)], "temperature": T, "activation": "sigmoid", "encoding": "float32"}
    softlabel.generate(
        f"{ready}/more.npz?images=images&keys=key",
        out=tmp_path / "m",
        shard_rows=30,
        progress=False,
        **make_more,  # type: ignore[arg-type]
    )
    merge_stores([tmp_path / "s", tmp_path / "m"], tmp_path / "both", progress=False)
    both = softlabel.open_store(tmp_path / "both", verify="full").take(range(N + 9))
    np.testing.assert_array_equal(both.scaled_logits[:N], plain.scaled_logits)
    np.testing.assert_array_equal(both.hard_labels, np.concatenate([labels, np.full((9, C), -1)]))
    # Plain files.
    export_store(tmp_path / "s", tmp_path / "hf", to="hf", progress=False)
    table = pq.read_table(tmp_path / "hf" / "data")
    np.testing.assert_array_equal(np.stack(table["scaled_logits"].to_numpy()), plain.scaled_logits)
    np.testing.assert_array_equal(np.stack(table["multi_hot"].to_numpy()), labels)
    export_store(tmp_path / "s", tmp_path / "s.npz", to="npz", progress=False)
    with np.load(tmp_path / "s.npz") as found:
        np.testing.assert_array_equal(found["scaled_logits"], plain.scaled_logits)
        np.testing.assert_array_equal(found["multi_hot"], labels)
        assert json.loads(str(found["softlabel"]))["activation"] == "sigmoid"


def test_one_output(ready: Path, tmp_path: Path) -> None:
    images = np.load(ready / "data.npz")["images"]
    np.savez(tmp_path / "two.npz", images=images, labels=np.resize([0, 1, -1], N))
    (tmp_path / "names.txt").write_text("healthy\nill\n")
    source = f"{tmp_path}/two.npz?images=images&labels=labels&classes={tmp_path}/names.txt"
    settings: dict[str, Any] = {"teachers": [spec(ready, "one")], "progress": False, "temperature": T}
    with pytest.raises(SpecError, match=r"found a network with one output: .* give --activation sigmoid"):
        softlabel.generate(source, out=tmp_path / "no", **settings)
    softlabel.generate(source, out=tmp_path / "s", activation="sigmoid", encoding="float32", **settings)
    with softlabel.open_store(tmp_path / "s", verify="full") as store:
        rows = store.take(range(N))
        np.testing.assert_allclose(rows.scaled_logits, answers(ready, "one") / T, atol=1e-5)
        np.testing.assert_array_equal(rows.hard_labels[:, 0], np.resize([0, 1, -1], N))
        assert store.run.class_names == ("ill",)
    loader = softlabel.SoftLabelLoader(source, tmp_path / "s", shuffle=False, batch_size=N)
    (batch,) = loader
    np.testing.assert_array_equal(batch.labels.numpy(), rows.hard_labels)
    loss = softlabel.distillation_loss(
        torch.zeros(N, 1), batch.target, batch.labels, temperature=T, soft_weight=1, hard_weight=1
    )
    assert loss.isfinite()


def test_what_makes_no_sense_is_refused(ready: Path, tmp_path: Path) -> None:
    for encoding in (TopK(k=2), Sampled(samples=5)):
        with pytest.raises(UsageError, match=f"'{encoding.name}': stores a softmax over the classes"):
            make(ready, tmp_path / "s", encoding=encoding)
    with pytest.raises(MismatchError, match=r"has several classes at once.* give --activation sigmoid"):
        make(ready, tmp_path / "s", activation="softmax")
    with pytest.raises(MismatchError, match=r"the teachers have 1, the labels of .* 5"):
        make(ready, tmp_path / "s", "one")
    store = make(ready, tmp_path / "s")
    with pytest.raises(ValueError, match="'topk': stores a softmax"):
        dataclasses.replace(store.run, encoding=TopK(k=2, temperatures=(T,)))
    with pytest.raises(UsageError, match="'topk': stores a softmax"):
        convert_store(tmp_path / "s", tmp_path / "x", encoding=TopK(k=2), progress=False)
    softlabel.generate(f"{ready}/more.npz?images=images", teachers=[spec(ready)], out=tmp_path / "soft", progress=False)
    with pytest.raises(MismatchError, match="has several classes at once, --activation says softmax"):
        softlabel.evaluate(spec(ready), data(ready), activation="softmax", progress=False)
    with pytest.raises(MismatchError, match="has several classes at once, the store holds a softmax"):
        softlabel.SoftLabelLoader(data(ready), tmp_path / "soft", missing="skip")


class SigmoidTeacher(nn.Module):
    """Ends in what should have been left out."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.inner = build_model("zoo:resnet8", num_classes=C)
        self.inner.load_state_dict(state)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.inner(images_BCHW).sigmoid()


def make_sigmoid_teacher(path: str) -> nn.Module:
    return SigmoidTeacher(load_file(path))


def test_outputs_that_went_through_the_sigmoid_are_refused(ready: Path, tmp_path: Path) -> None:
    teacher = f"python:{__name__}:make_sigmoid_teacher?path={ready}/t0.safetensors&{PLAIN}"
    with pytest.raises(TeacherError, match="none below 0 and none above 1, as of a sigmoid"):
        make(ready, tmp_path / "s", preflight=True, teachers=[teacher])


class Items(Dataset[Any]):
    """Images with labels of several classes, one of them of none."""

    def __init__(self, images: Any, labels: list[Any]) -> None:
        self.images, self.labels_of_items = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.labels_of_items[index]


def test_the_loader_gives_what_the_data_say(ready: Path, tmp_path: Path) -> None:
    make(ready, tmp_path / "s")
    images, labels = (np.load(ready / "data.npz")[name] for name in ("images", "labels"))
    loader = softlabel.SoftLabelLoader(data(ready), tmp_path / "s", batch_size=32, ignore_labels=True)
    assert all((batch.labels == -1).all() and batch.labels.shape[1] == C for batch in loader)
    other = Items(images[::-1].copy(), list(labels))
    with pytest.raises(MismatchError, match="is not the one that was labelled"):
        softlabel.SoftLabelLoader(other, tmp_path / "s")
    join = softlabel.with_soft_labels(Items(images, [torch.from_numpy(one) for one in labels]), tmp_path / "s")
    assert len(join.collate(join.__getitems__([0, 5]))[1]) == 2
    wrong = labels.copy()
    wrong[0] = np.where(wrong[0] >= 0, 1 - wrong[0], wrong[0])
    with pytest.raises(MismatchError, match="1 of 2 samples have another hard label"):
        softlabel.with_soft_labels(Items(images, list(wrong)), tmp_path / "s").__getitems__([0, 5])


def test_runs_say_what_their_outputs_are(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(
        json.dumps({"student": "zoo:resnet8", "num_classes": 3, "preprocessing": {}, "activation": "sigmoid"})
    )
    write_teacher(tmp_path / "model.safetensors", num_classes=3)
    with pytest.raises(SpecError, match="one trained with a sigmoid; give --activation sigmoid"):
        softlabel.generate("digits", teachers=[f"run:{tmp_path}"], out=tmp_path / "s", progress=False)


def test_extend_takes_a_calibrated_teacher_of_the_same_outputs(ready: Path, tmp_path: Path) -> None:
    found = softlabel.calibrate(
        data(ready),
        teachers=[spec(ready, 0), spec(ready, 1)],
        activation="sigmoid",
        out=tmp_path / "t.json",
        progress=False,
    )
    labels, z = np.load(ready / "data.npz")["labels"], answers(ready, 0)
    known = labels >= 0

    def nll(temperature: float) -> float:
        return float(np.logaddexp(0, np.where(labels > 0, -z, z)[known] / temperature).mean())

    best = found.members[0]
    assert best.nll_before == pytest.approx(nll(1), rel=1e-4)
    assert best.nll_after == pytest.approx(nll(best.temperature), rel=1e-4)
    assert nll(best.temperature) < min(nll(best.temperature * 1.02), nll(best.temperature / 1.02))
    make(ready, tmp_path / "k", 0, combine="keep", calibration=tmp_path / "t.json", encoding="float32")
    extend(tmp_path / "k", teacher=spec(ready, 1), calibration=tmp_path / "t.json", progress=False)
    rows = softlabel.open_store(tmp_path / "k", verify="full").take(range(N))
    for member in (0, 1):
        expected = answers(ready, member) / T / found.members[member].temperature
        np.testing.assert_allclose(rows.scaled_logits[:, member], expected, atol=1e-5)
    with pytest.raises(MismatchError, match="expected temperatures of a softmax, found those of a sigmoid"):
        softlabel.generate(
            f"{ready}/more.npz?images=images",
            teachers=[spec(ready)],
            out=tmp_path / "x",
            calibration=tmp_path / "t.json",
        )
