"""SPECs and checkpoints: every container, every prefix, and nothing executed."""

import argparse
import hashlib
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from softlabel.common.spec import Spec, literal, parse_spec
from softlabel.errors import SpecError, TeacherError
from softlabel.models import RunModel, build_model, load_weights, read_run, save_run, weights_sha256
from softlabel.models.teacher import load_teacher


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(1)
    return build_model("zoo:resnet8", num_classes=4)


# ---- SPEC ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zoo:resnet8", Spec(kind="zoo", name="resnet8")),
        ("zoo:resnet20@a/b.th", Spec(kind="zoo", name="resnet20", checkpoint="a/b.th")),
        (
            "torchvision:resnet50?weights=IMAGENET1K_V2&resize=232",
            Spec(kind="torchvision", name="resnet50", options={"weights": "IMAGENET1K_V2", "resize": "232"}),
        ),
        ("python:a.b:make@w@2.pt", Spec(kind="python", name="a.b:make", checkpoint="w@2.pt")),
        ("run:runs/me@home", Spec(kind="run", name="runs/me@home")),
        ("zoo:cnn2?note=a%26b%3D1", Spec(kind="zoo", name="cnn2", options={"note": "a&b=1"})),
        ("timm:resnet50.a1_in1k@w.pth", Spec(kind="timm", name="resnet50.a1_in1k", checkpoint="w.pth")),
        ("hf:me/vit@home?download=true", Spec(kind="hf", name="me/vit@home", options={"download": "true"})),
        ("a:b/net.onnx?mean=0.5", Spec(kind="onnx", name="a:b/net.onnx", options={"mean": "0.5"})),
        ("net.PT2?trust=true", Spec(kind="pt2", name="net.PT2", options={"trust": "true"})),
        ("zoo:cnn2@C:/w.th?crop=none", Spec(kind="zoo", name="cnn2", checkpoint="C:/w.th", options={"crop": "none"})),
    ],
)
def test_parse(text: str, expected: Spec) -> None:
    assert parse_spec(text) == expected
    assert parse_spec(expected.text) == expected


@given(
    st.sampled_from(["zoo", "torchvision", "python"]),
    st.text("abz09_.:", min_size=1),
    st.none() | st.text("abz09_./@: ", min_size=1),
    st.dictionaries(st.text("abz_", min_size=1), st.text(min_size=1), max_size=3),
)
def test_text_is_read_back_as_it_was(kind: str, name: str, checkpoint: str | None, options: dict[str, str]) -> None:
    spec = Spec(kind=kind, name=name, checkpoint=checkpoint, options=options)
    assert parse_spec(spec.text) == spec


@pytest.mark.parametrize(
    "text", ["", "resnet20", "zoo:", "zoo:resnet8@", "keras:resnet50", "zoo:a?b", "zoo:a?b=1&b=2", "zoo:a?=1"]
)
def test_wrong_specs_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("32", 32),
        ("0.5", 0.5),
        ("true", True),
        ("False", False),
        ("none", None),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ('"7"', "7"),
        ("plain text", "plain text"),
    ],
)
def test_option_values(text: str, value: object) -> None:
    assert literal(text) == value
    assert type(literal(text)) is type(value)


# ---- containers of weights ----


def test_every_container_gives_the_same_weights(student: nn.Module, tmp_path: Path) -> None:
    state = student.state_dict()
    prefixed = {f"module.{k}": v for k, v in state.items()}
    contents: dict[str, Any] = {
        "plain": state,
        "state_dict": {"state_dict": prefixed, "best_prec1": 91.5, "epoch": 3},
        "model": {"model": state, "optimizer": {"state": {}, "lr": 0.1}},
        "nested": {"model": {"state_dict": state}},
        "compiled": {"net": {f"_orig_mod.{k}": v for k, v in state.items()}},
        "both": {f"module._orig_mod.{k}": v for k, v in state.items()},
        "averaged": {"n_averaged": torch.tensor(5), **prefixed},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
        assert same(load_weights(tmp_path / f"{name}.pt"), state), name
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load_weights(tmp_path / "old.pth"), state)
    save_file(state, tmp_path / "a.safetensors")
    assert same(load_weights(tmp_path / "a.safetensors"), state)
    save_file(prefixed, tmp_path / "b.safetensors")
    assert same(load_weights(tmp_path / "b.safetensors"), state)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("state_dict", "state_dict_ema"), "state_dict_ema"),
        (("model", "model_ema"), "model_ema"),
        (("ema_state_dict", "model_state_dict"), "ema_state_dict"),
        (("model.", "ema_model.module."), "ema_model.module"),
    ],
    ids=["timm", "torchvision", "first", "one dict"],
)
def test_of_several_sets_of_weights_the_average_is_taken_and_named(
    student: nn.Module, tmp_path: Path, names: tuple[str, str], taken: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw = student.state_dict()
    average = {k: v + 1 if v.is_floating_point() else v for k, v in raw.items()}
    each = {name: average if "ema" in name else raw for name in names}
    if "." in names[0]:
        content: dict[str, Any] = {p + k: v for p, state in each.items() for k, v in state.items()}
    else:
        content = {**each, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "a.pt")
    caplog.set_level("INFO")
    teacher = load_teacher(f"zoo:resnet8@{tmp_path}/a.pt")
    assert same(teacher.model.state_dict(), average)
    assert teacher.spec.options == {"weights_key": taken}, "what was taken is recorded with the place of the weights"
    assert teacher.spec.identity == "zoo:resnet8"
    (raw_name,) = (name.rstrip(".") for name in names if "ema" not in name)
    assert f"took {taken}, left out {raw_name}" in caplog.text
    assert same(build_model(f"zoo:resnet8@{tmp_path}/a.pt?weights_key={raw_name}").state_dict(), raw)
    with pytest.raises(SpecError, match=r"weights_key.*found 'nothing'"):
        build_model(f"zoo:resnet8@{tmp_path}/a.pt?weights_key=nothing")


def test_several_sets_of_weights_of_which_none_is_meant(student: nn.Module, tmp_path: Path) -> None:
    state = student.state_dict()
    torch.save({"student": state, "teacher": state}, tmp_path / "sets.pt")
    torch.save({p + k: v for p in ("student.", "teacher.") for k, v in state.items()}, tmp_path / "flat.pt")
    for name in ("sets", "flat"):
        with pytest.raises(SpecError, match=r"several.*weights_key=.*student.*teacher"):
            build_model(f"zoo:resnet8@{tmp_path}/{name}.pt")
        assert same(build_model(f"zoo:resnet8@{tmp_path}/{name}.pt?weights_key=teacher").state_dict(), state)


def test_what_trainers_and_profilers_leave_in_a_checkpoint(
    student: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = student.state_dict()
    extra = torch.zeros(1)
    lightning = {f"model.{k}": v for k, v in state.items()}
    contents = {
        "lightning": {"state_dict": {**lightning, "criterion.weight": torch.ones(4)}, "epoch": 1},
        "compiled": {f"model._orig_mod.{k}": v for k, v in state.items()},
        "thop": {**state, "total_ops": extra, "total_params": extra, "layer1.0.conv1.total_ops": extra},
        "aux": {**state, "aux.conv.weight": torch.zeros(3, 3), "AuxLogits.fc.bias": extra},
    }
    caplog.set_level("INFO")
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
        caplog.clear()
        assert same(build_model(f"zoo:resnet8@{tmp_path}/{name}.pt").state_dict(), state), name
        assert ("left out" in caplog.text) == (name != "compiled"), name
    save_file(lightning, tmp_path / "safe.pt")
    assert same(build_model(f"zoo:resnet8@{tmp_path}/safe.pt").state_dict(), state)
    torch.save({f"backbone.{k}": v for k, v in state.items() if "conv1" in k}, tmp_path / "part.pt")
    with pytest.raises(SpecError, match="missing"):
        build_model(f"zoo:resnet8@{tmp_path}/part.pt")


class Malicious:
    """What a checkpoint from a stranger may hold: unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("container", ["zip", "old", "pickle", "new pickle"])
def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path: Path, container: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    content = {"extra": Malicious(f"touch {marker}"), "state_dict": {"conv1.weight": torch.zeros(2)}}
    if "pickle" in container:
        path.write_bytes(pickle.dumps(content, protocol=2 if container == "pickle" else 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(TeacherError, match=r"evil\.pt: (refused.*system.*safetensors|.*something else)") as caught:
        build_model(f"zoo:resnet8@{path}")
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "torch's advice is to switch the protection off"
    # The file does what this test says that it does.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        (pickle.loads(path.read_bytes()) if "pickle" in container else torch.load(path, weights_only=False))
    assert marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pt", b"", "found an empty file"),
        ("pointer.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        ("page.safetensors", b"<!DOCTYPE html><html>log in</html>", "found a web page"),
        ("packed.pth", b"\x1f\x8b\x08\0", "compressed by gzip"),
        ("text.th", b"404 not found", "damaged or something else"),
        ("text.safetensors", b"404 not found", "expected a safetensors file"),
        ("lies.safetensors", struct.pack("<Q", 1 << 40) + b"{}", "expected a safetensors file"),
    ],
)
def test_damaged_checkpoints(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TeacherError, match=message):
        load_weights(tmp_path / name)


def test_truncated_checkpoints(shared_data: Path, tmp_path: Path) -> None:
    for name in ("resnet20-12fca82f.th", "resnet20-jpeg.safetensors"):
        whole = (shared_data / "cifar10-resnets" / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(TeacherError, match=name):
            load_weights(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit")
def test_a_torchscript_program_is_not_a_checkpoint(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "a.pt"))
    with pytest.raises(TeacherError, match="found a TorchScript program"):
        load_weights(tmp_path / "a.pt")


def test_checkpoints_without_a_state_dict(tmp_path: Path) -> None:
    for content in (torch.zeros(3), {"epoch": 1, "lr": 0.1}, [1, 2], {}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(TeacherError, match="expected a state dict"):
            load_weights(tmp_path / "a.pt")
    with pytest.raises(SpecError, match="no such file"):
        load_weights(tmp_path / "missing.pt")
    with pytest.raises(SpecError, match="a folder"):
        load_weights(tmp_path)


# ---- building ----


@pytest.mark.parametrize("name", ["resnet20-12fca82f.th", "resnet20-jpeg.safetensors"])
def test_real_checkpoints_fill_every_tensor(shared_data: Path, name: str) -> None:
    path = shared_data / "cifar10-resnets" / name
    model = build_model(f"zoo:resnet20@{path}")
    weights = load_weights(path)
    assert len(weights) > 90
    for key, value in model.state_dict().items():
        if key in weights:
            assert torch.equal(value, weights[key]), key
        else:
            assert key.endswith("num_batches_tracked"), key
    assert model.linear.out_features == 10


@pytest.mark.parametrize("extension", ["pt", "safetensors"])
def test_class_count_comes_from_the_checkpoint(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    for spec in ("zoo:resnet8", "zoo:cnn8", "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small"):
        state = build_model(spec, num_classes=17).state_dict()
        save_file(state, path) if extension == "safetensors" else torch.save(state, path)
        assert same(build_model(f"{spec}@{path}").state_dict(), state)
        assert same(build_model(f"{spec}@{path}", num_classes=17).state_dict(), state)
        with pytest.raises(SpecError, match=r"of another shape.*17"):
            build_model(f"{spec}@{path}", num_classes=5)


def test_class_count_by_option_and_by_argument() -> None:
    assert build_model("zoo:resnet8?num_classes=3").linear.out_features == 3
    assert build_model("zoo:resnet8?num_classes=3", num_classes=3).linear.out_features == 3
    assert build_model("torchvision:resnet18", num_classes=6).fc.out_features == 6
    with pytest.raises(SpecError, match="num_classes=3, but 4"):
        build_model("zoo:resnet8?num_classes=3", num_classes=4)


def test_a_checkpoint_of_another_network(shared_data: Path, student: nn.Module, tmp_path: Path) -> None:
    path = shared_data / "cifar10-resnets" / "resnet20-12fca82f.th"
    with pytest.raises(SpecError, match=r"missing \(layer1\.3\.conv1\.weight"):
        build_model(f"zoo:resnet32@{path}")
    with pytest.raises(SpecError, match=r"unknown \(layer1\.1"):
        build_model(f"zoo:resnet8@{path}")
    state = student.state_dict()
    state.pop("bn1.running_mean")
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(SpecError, match=r"1 missing \(bn1\.running_mean\)"):
        build_model(f"zoo:resnet8@{tmp_path}/part.pt")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zoo:resnet18", "resnet8, resnet14"),
        ("zoo:resnet8?colour=3", "colour"),
        ("torchvision:resnet8", "did you mean resnet"),
        ("torchvision:resnet18?weights=NOPE", "IMAGENET1K_V1 or DEFAULT"),
        ("torchvision:resnet18@a.pt?weights=DEFAULT", "not both"),
        ("python:json", "no factory"),
        ("python:nowhere_to_be_found:make", "cannot import"),
        ("python:json:nowhere", "cannot import"),
        ("python:json:__name__", "found str"),
        ("python:json:dumps?obj=1", "found str"),
        ("run:nowhere", r"no model\.json"),
    ],
)
def test_specs_that_cannot_be_built(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build_model(spec)


def test_a_factory_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_factory_here.py").write_text(
        "from torch import nn\n"
        "def make(num_classes=3, hidden=5):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(hidden) if hidden is None else nn.Linear(12, hidden),\n"
        "                         nn.Linear(hidden, num_classes))\n"
        "def fixed():\n"
        "    return nn.Linear(2, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    model = build_model("python:my_factory_here:make?hidden=9", num_classes=6)
    assert (model[1].out_features, model[2].out_features) == (9, 6)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = build_model(f"python:my_factory_here:make@{tmp_path}/w.pt?hidden=9")
    assert same(again.state_dict(), model.state_dict())
    assert build_model("python:my_factory_here:fixed", num_classes=2).out_features == 2


def test_a_class_is_a_factory() -> None:
    model = build_model("python:torch.nn:Linear?in_features=3&out_features=2&bias=False")
    assert isinstance(model, nn.Linear)
    assert model.bias is None


# ---- identity ----


def test_sha256_is_the_documented_hash(student: nn.Module) -> None:
    digest = hashlib.sha256()
    for name, value in sorted(student.state_dict().items()):
        header = json.dumps([name, str(value.dtype)[6:], list(value.shape)]).encode()
        digest.update(len(header).to_bytes(4, "little") + header + np.ascontiguousarray(value.numpy()).tobytes())
    assert weights_sha256(student) == digest.hexdigest()


def test_sha256_is_of_the_weights_and_nothing_else(student: nn.Module, tmp_path: Path) -> None:
    before = weights_sha256(student)
    state = student.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.th")
    save_file(state, tmp_path / "b.safetensors")
    assert weights_sha256(build_model(f"zoo:resnet8@{tmp_path}/a.th")) == before
    assert weights_sha256(build_model(f"zoo:resnet8@{tmp_path}/b.safetensors")) == before
    assert weights_sha256(student.to(memory_format=torch.channels_last).eval()) == before
    with torch.no_grad():
        student.linear.bias[2] = torch.nextafter(student.linear.bias[2], torch.tensor(9.0))
    assert weights_sha256(student) != before


def test_sha256_depends_on_dtypes_and_names() -> None:
    class One(nn.Module):
        def __init__(self, name: str, value: Tensor) -> None:
            super().__init__()
            self.register_buffer(name, value)

    zeros = [torch.zeros(2, dtype=d) for d in (torch.float32, torch.int32, torch.bfloat16, torch.bool, torch.uint8)]
    hashes = {weights_sha256(One("a", value)) for value in zeros}
    hashes |= {weights_sha256(One("b", zeros[0])), weights_sha256(One("a", torch.zeros(2, 1)))}
    hashes |= {weights_sha256(One("a", torch.zeros(()))), weights_sha256(One("a", torch.zeros(0)))}
    assert len(hashes) == 9


# ---- run folders ----


def test_a_run_folder_is_a_spec(student: nn.Module, tmp_path: Path) -> None:
    torch.save(student.state_dict(), tmp_path / "gone.pt")
    described = RunModel(
        student=f"zoo:resnet8@{tmp_path}/gone.pt?num_classes=4",
        num_classes=4,
        preprocessing={"mean": [0.5] * 3, "std": [0.2] * 3, "resize": 32, "crop": 32, "interpolation": "bicubic"},
    )
    save_run(tmp_path, student, described)
    (tmp_path / "gone.pt").unlink()
    assert read_run(tmp_path) == described
    assert same(build_model(f"run:{tmp_path}").state_dict(), student.state_dict())
    assert same(build_model(f"run:{tmp_path}", num_classes=4).state_dict(), student.state_dict())
    with pytest.raises(SpecError, match="4 classes, but 5"):
        build_model(f"run:{tmp_path}", num_classes=5)
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "model.json").write_text('{"student": "zoo:resnet8"}')
    with pytest.raises(SpecError, match=r"model\.json: expected student, num_classes and preprocessing"):
        build_model(f"run:{tmp_path}")


def test_a_run_of_tied_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    save_run(tmp_path, model, RunModel(student="python:none:x", num_classes=3, preprocessing={}))
    assert same(load_weights(tmp_path / "model.safetensors"), dict(model.state_dict()))
