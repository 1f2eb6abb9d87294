"""ONNX files and programs of torch.export as teachers of arrays, against onnxruntime, scikit-learn and torch."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from torch import nn

import softlabel
from softlabel.errors import SoftLabelError, TeacherError
from softlabel.inputs.base import Inputs
from softlabel.models.teacher import load_teacher
from tests.inputs.test_tensor_samples import TABLE, Named, Two, assert_labels, build_mlp, write_weights
from tests.support.commands import run_softlabel

onnx, onnxruntime, skl2onnx = map(pytest.importorskip, ("onnx", "onnxruntime", "skl2onnx"))

X, Y = load_breast_cancer(return_X_y=True)
X = X.astype(np.float32)[:200]
Y = Y[:200]
NAMES = [f"c{place}" for place in range(X.shape[1])]
TENSOR = "tensor"


@cache
def forest(kind: str, zipmap: bool = False) -> bytes:
    make = {
        "boosted": lambda: GradientBoostingClassifier(n_estimators=8, random_state=0),
        "forest": lambda: RandomForestClassifier(n_estimators=10, random_state=0),
    }[kind]
    model = make().fit(X, Y)
    proto = skl2onnx.to_onnx(model, X[:1], options={"zipmap": zipmap})
    data: bytes = proto.SerializeToString()
    return data


def probabilities_of(path: Path, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(["probabilities"], {session.get_inputs()[0].name: rows})[0]
    return found


@pytest.fixture
def table(tmp_path: Path) -> str:
    columns = {name: X[:, place] for place, name in enumerate(NAMES)}
    pq.write_table(pa.table({**columns, "label": Y}), tmp_path / "table.parquet", row_group_size=64)
    return f"{tmp_path}/table.parquet?inputs={','.join(NAMES)}&label=label"


@pytest.mark.parametrize("kind", ["boosted", "forest"])
def test_softmax_of_the_labels_of_a_forest_is_its_probabilities(kind: str, table: str, tmp_path: Path) -> None:
    path = tmp_path / "forest.onnx"
    path.write_bytes(forest(kind))
    done = run_softlabel(
        "generate", "--data", table, "--teacher", f"{path}?output=probabilities&probabilities=true", "--out",
        tmp_path / "labels", "--encoding", "float32", "--temperature", 1, "--device", "cpu", "--batch-size", 64,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with softlabel.open_store(tmp_path / "labels") as store:
        rows = store.take(store.lookup([str(row) for row in range(len(X))]))
        found = torch.softmax(torch.from_numpy(np.array(rows.scaled_logits)), dim=1).numpy()
        assert store.run.input == TENSOR
    expected = probabilities_of(path, X)
    assert (expected <= 0).any() == (kind == "forest")  # of which the logarithm has no number
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_sigmoid_of_the_labels_of_independent_probabilities_is_them(table: str, tmp_path: Path) -> None:
    model = OneVsRestClassifier(LogisticRegression(max_iter=50)).fit(X[:, :4] / 100, np.stack([Y, 1 - Y, Y], 1))
    path = tmp_path / "several.onnx"
    path.write_bytes(skl2onnx.to_onnx(model, X[:1, :4], options={"zipmap": False}).SerializeToString())
    pq.write_table(pa.table({name: X[:, place] / 100 for place, name in enumerate(NAMES[:4])}), tmp_path / "t.parquet")
    softlabel.generate(
        f"{tmp_path}/t.parquet?inputs={','.join(NAMES[:4])}",
        teachers=[f"{path}?output=probabilities&probabilities=true"],
        out=tmp_path / "labels", encoding="float32", temperature=1.0, device="cpu", activation="sigmoid",
    )  # fmt: skip
    with softlabel.open_store(tmp_path / "labels") as store:
        rows = store.take(store.lookup([str(row) for row in range(len(X))]))
        found = torch.from_numpy(np.array(rows.scaled_logits)).sigmoid().numpy()
    np.testing.assert_allclose(found, probabilities_of(path, X[:, :4] / 100), atol=1e-6)


def test_a_forest_and_a_network_are_combined_by_probabilities(table: str, tmp_path: Path) -> None:
    (tmp_path / "forest.onnx").write_bytes(forest("forest"))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    program = torch.export.export(network, (torch.zeros(4, 30),), dynamic_shapes=({0: torch.export.Dim("b")},))
    torch.export.save(program, tmp_path / "mlp.pt2")
    mean, std = X.mean(axis=0), X.std(axis=0)
    numbers = f"mean={','.join(map(str, mean))}&std={','.join(map(str, std))}"
    softlabel.generate(
        table,
        teachers=[
            f"{tmp_path}/forest.onnx?output=probabilities&probabilities=true",
            f"{tmp_path}/mlp.pt2?trust=true&{numbers}",
        ],
        combine="probs",
        out=tmp_path / "labels",
        device="cpu",
        encoding="float32",
        temperature=1.0,
        batch_size=50,
    )
    with softlabel.open_store(tmp_path / "labels") as store, torch.inference_mode():
        rows = store.take(store.lookup([str(row) for row in range(len(X))]))
        found = torch.softmax(torch.from_numpy(np.array(rows.scaled_logits)), dim=1).numpy()
        normalised = (torch.from_numpy(X) - torch.from_numpy(mean)) / torch.from_numpy(std)
        answers = torch.softmax(network(normalised), dim=1).numpy()
    np.testing.assert_allclose(found, (probabilities_of(tmp_path / "forest.onnx", X) + answers) / 2, atol=1e-5)


def test_a_zip_map_is_probabilities_by_class(tmp_path: Path) -> None:
    (tmp_path / "maps.onnx").write_bytes(forest("boosted", zipmap=True))
    (tmp_path / "plain.onnx").write_bytes(forest("boosted"))
    name = onnxruntime.InferenceSession(str(tmp_path / "maps.onnx")).get_outputs()[1].name
    teacher = load_teacher(f"{tmp_path}/maps.onnx?output={name}&probabilities=true", kind=TENSOR)
    found = teacher.logits(Inputs.single(torch.from_numpy(X[:9]))).softmax(dim=1)
    np.testing.assert_allclose(found.numpy(), probabilities_of(tmp_path / "plain.onnx", X[:9]), atol=1e-6)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_program_with_several_inputs_gets_them_by_name(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model, path = Two().eval(), tmp_path / f"two{suffix}"
    example = (torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))
    batch = torch.export.Dim("b")
    shapes = {"table": {0: batch}, "word": {0: batch}}
    if suffix == ".pt2":
        torch.export.save(torch.export.export(model, example, dynamic_shapes=shapes), path)
    else:
        names = {"input_names": ["table", "word"], "output_names": ["logits"]}
        proto = torch.onnx.export(model, example, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
        assert proto is not None
        path.write_bytes(proto.model_proto.SerializeToString())
    spec = f"{path}?trust=true" if suffix == ".pt2" else str(path)
    softlabel.generate(
        Named(), teachers=[spec], out=tmp_path / "labels", device="cpu", encoding="float32", batch_size=9
    )
    assert_labels(tmp_path / "labels", model, torch.from_numpy(TABLE).float(), torch.arange(len(TABLE)) % 7)
    with pytest.raises(TeacherError, match=r"expected inputs table \(batch, 6\), word \(batch\), found one array"):
        load_teacher(spec, kind=TENSOR).logits(Inputs.single(torch.zeros(2, 6)))


def test_programs_of_any_rank_and_batch(tmp_path: Path) -> None:
    """A sequence (L, D) in a file of three rows a batch, and the same network on the fly."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(10, 3)).eval()
    torch.export.save(torch.export.export(network, (torch.zeros(3, 5, 2),)), tmp_path / "net.pt2")
    teacher = load_teacher(f"{tmp_path}/net.pt2?trust=true&mean=1&std=2", kind=TENSOR)
    assert teacher.num_classes == 3
    for count in (1, 3, 7):
        given = torch.randn(count, 5, 2)
        with torch.inference_mode():
            expected = network((given - 1) / 2)
        assert torch.allclose(teacher.logits(Inputs.single(given)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "output label: expected floats, found tensor.int64.; choose another of label: tensor.int64., probab"),
        ("?output=probabilitys", "expected one of label, probabilities, found 'probabilitys'"),
        ("?output=probabilities", "'[?]probabilities=true' takes that"),
        ("?output=probabilities&probabilities=1", "probabilities: expected true or false"),
        ("?output=probabilities&probabilities=true&crop=3", "crop= is of images"),
    ],
)
def test_what_a_forest_cannot_give_is_refused(words: str, message: str, table: str, tmp_path: Path) -> None:
    (tmp_path / "forest.onnx").write_bytes(forest("boosted"))
    with pytest.raises(SoftLabelError, match=message):
        softlabel.generate(table, teachers=[f"{tmp_path}/forest.onnx{words}"], out=tmp_path / "labels", device="cpu")


def test_logits_are_no_probabilities_and_a_table_is_no_image(table: str, tmp_path: Path) -> None:
    write_weights(build_mlp, tmp_path / "w.safetensors")
    proto = torch.onnx.export(
        build_mlp().eval(), (torch.zeros(2, 6),), dynamo=True, verbose=False, output_names=["logits"]
    )
    assert proto is not None
    (tmp_path / "mlp.onnx").write_bytes(proto.model_proto.SerializeToString())
    with pytest.raises(TeacherError, match="expected probabilities that sum to 1, found a row from"):
        load_teacher(f"{tmp_path}/mlp.onnx?probabilities=true", kind=TENSOR).logits(Inputs.single(torch.ones(2, 6)))
    with pytest.raises(TeacherError, match="expected one input of images"):
        load_teacher(f"{tmp_path}/mlp.onnx?mean=0&std=1")
    with pytest.raises(SoftLabelError, match="fails on samples of shape"):
        softlabel.generate(table, teachers=[f"{tmp_path}/mlp.onnx"], out=tmp_path / "labels", device="cpu")
