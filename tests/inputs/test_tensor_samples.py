"""Samples that are arrays of numbers, from generate to a trained student: against a plain forward pass of torch."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import softlabel
from softlabel.errors import DataError, MismatchError, SpecError, TeacherError, UsageError
from softlabel.inputs.base import Sample
from softlabel.inputs.tensor import BANDS, TENSORS, TensorKind
from softlabel.inputs.text import TEXTS
from softlabel.models import build_model
from tests.support.commands import run_softlabel

ROWS, CLASSES = 48, 5
SPECTRA = np.random.default_rng(0).standard_normal((ROWS, 2, 20, 9)).astype(np.float32)
TABLE = np.random.default_rng(1).standard_normal((ROWS, 6)).astype(np.float64)
TILES = np.random.default_rng(2).random((ROWS, 13, 8, 8)).astype(np.float32)
LABELS = np.random.default_rng(3).integers(0, CLASSES, ROWS)
MODULE = "tests.inputs.test_tensor_samples"


def build_audio(num_classes: int = CLASSES) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes)
    )


def build_mlp(num_classes: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, num_classes))


def build_bands(num_classes: int = CLASSES) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(13, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )


def build_probabilities(num_classes: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(6, num_classes), nn.Sigmoid())


class Two(nn.Module):
    """A network with two inputs by name."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, num_classes), nn.Embedding(7, num_classes)

    def forward(self, table: Tensor, word: Tensor) -> Tensor:
        return self.left(table) + self.right(word)


class Named(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"table": torch.tensor(TABLE[index]), "word": index % 7, "label": int(LABELS[index])}


def write_weights(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    torch.manual_seed(7)
    model = build().eval()
    save_file(model.state_dict(), path)
    return model


def stored_logits(store: Path) -> np.ndarray[Any, Any]:
    """In the order of the data, up to a constant a row."""
    with softlabel.open_store(store) as opened:
        rows = opened.take(opened.lookup([str(row) for row in range(ROWS)]))
        return np.asarray(rows.scaled_logits)


def assert_labels(store: Path, model: nn.Module, *inputs: Tensor, temperature: float = 4.0) -> None:
    with torch.inference_mode():
        expected = (model(*inputs) / temperature).numpy()
    expected -= expected.max(axis=1, keepdims=True)
    np.testing.assert_allclose(stored_logits(store), expected, atol=1e-5)


@pytest.mark.parametrize("suffix", ["npz", "h5", "npy"])
def test_arrays_of_floats_are_labelled_as_a_plain_forward_pass_does(suffix: str, tmp_path: Path) -> None:
    model = write_weights(build_audio, tmp_path / "cnn.safetensors")
    if suffix == "npz":
        np.savez(tmp_path / "data.npz", x=SPECTRA, y=LABELS)
    elif suffix == "npy":
        np.save(tmp_path / "data.npy", SPECTRA)
    else:
        with h5py.File(tmp_path / "data.h5", "w") as file:
            file["x"], file["y"] = SPECTRA, LABELS
    words = "?inputs=x" if suffix == "npy" else "?inputs=x&labels=y"
    teacher = f"python:{MODULE}:build_audio@{tmp_path / 'cnn.safetensors'}"
    done = run_softlabel(
        "generate", "--data", f"{tmp_path}/data.{suffix}{words}", "--teacher", teacher, "--out", tmp_path / "labels",
        "--encoding", "float32", "--device", "cpu", "--batch-size", 20,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_labels(tmp_path / "labels", model, torch.from_numpy(SPECTRA))
    assert softlabel.open_store(tmp_path / "labels").run.input == "tensor"


def test_a_student_trains_on_arrays_and_is_a_teacher_afterwards(tmp_path: Path) -> None:
    write_weights(build_mlp, tmp_path / "mlp.safetensors")
    np.savez(tmp_path / "table.npz", x=TABLE, y=LABELS)
    data = f"{tmp_path}/table.npz?inputs=x&labels=y"
    spec = f"python:{MODULE}:build_mlp"
    softlabel.generate(data, teachers=[f"{spec}@{tmp_path}/mlp.safetensors"], out=tmp_path / "labels", device="cpu")
    done = run_softlabel(
        "train", "--data", data, "--labels", tmp_path / "labels", "--student", f"{spec}?mean=0&std=2", "--epochs", 40,
        "--batch-size", 16, "--lr", 0.05, "--hard-weight", 0, "--soft-weight", 1, "--augment", "none",
        "--out", tmp_path / "run", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = softlabel.evaluate(tmp_path / "run", data, tmp_path / "labels", device="cpu")
    assert found.teacher_kl is not None
    assert found.teacher_kl < 1e-3
    softlabel.generate(
        data,
        teachers=[f"run:{tmp_path}/run"],
        out=tmp_path / "again",
        device="cpu",
        encoding="float32",
        temperature=1.0,
    )

    assert_labels(
        tmp_path / "again",
        build_model(f"run:{tmp_path}/run").eval(),
        torch.from_numpy(TABLE).float() / 2,
        temperature=1.0,
    )


class Rated(TensorKind):
    """A kind with a parameter."""

    def __init__(self, rate: int) -> None:
        self.rate = rate


def test_kinds_with_parameters_keep_them_in_another_process() -> None:
    one, other = pickle.loads(pickle.dumps((Rated(8000), Rated(16000))))
    assert (one.rate, other.rate) == (8000, 16000)
    assert one == Rated(8000) != other
    assert pickle.loads(pickle.dumps(TENSORS)) == TENSORS != BANDS


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, a teacher of it, its labels, and the same table with labels and columns changed."""
    folder = tmp_path_factory.mktemp("table")
    write_weights(build_mlp, folder / "mlp.safetensors")
    np.savez(folder / "table.npz", x=TABLE, y=LABELS, other=(LABELS + np.eye(1, ROWS, 5, dtype=int)[0]) % CLASSES)
    np.savez(folder / "narrow.npz", x=TABLE[:, :3], y=LABELS, tokens=TABLE.astype(np.int64))
    softlabel.generate(
        f"{folder}/table.npz?inputs=x&labels=y", teachers=[f"python:{MODULE}:build_mlp@{folder}/mlp.safetensors"],
        out=folder / "labels", device="cpu", progress=False,
    )  # fmt: skip
    return folder


def test_another_hard_label_is_found(table: Path, tmp_path: Path) -> None:
    done = run_softlabel("verify", table / "labels", "--data", f"{table}/table.npz?inputs=x&labels=other", code=3)
    assert "1 samples have another hard label than in the store: 5" in done.stdout
    done = run_softlabel(
        "train", "--data", f"{table}/table.npz?inputs=x&labels=other", "--labels", table / "labels", "--student",
        f"python:{MODULE}:build_mlp", "--epochs", 1, "--out", tmp_path / "run", "--device", "cpu",
    )  # fmt: skip
    assert f"1 of {ROWS} samples have another hard label than in" in done.stderr


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ("x&labels=y", (), "the network fails on samples of shape (3,): RuntimeError"),
        ("tokens&labels=y", ("--mixup", 0.2), "takes whole numbers; leave out --mixup"),
    ],
)
def test_a_student_that_does_not_fit_is_one_line(
    words: str, options: tuple[object, ...], message: str, table: Path, tmp_path: Path
) -> None:
    data = f"{table}/narrow.npz?inputs={words}"
    student = f"python:{MODULE}:build_mlp"
    done = run_softlabel(
        "train", "--data", data, "--student", student, "--epochs", 1, "--out", tmp_path / "run", *options, "--device",
        "cpu", code=2,
    )  # fmt: skip
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if not options:
        spec = f"{student}@{table}/mlp.safetensors"
        done = run_softlabel("evaluate", "--data", data, "--model", spec, "--device", "cpu", code=2)
        assert message in done.stderr


def test_a_refused_teacher_leaves_the_folder_free(table: Path, tmp_path: Path) -> None:
    data = f"{table}/table.npz?inputs=x&labels=y"
    wrong = write_weights(build_probabilities, tmp_path / "wrong.safetensors")
    assert wrong is not None
    teachers = [f"python:{MODULE}:build_probabilities@{tmp_path}/wrong.safetensors"]
    with pytest.raises(TeacherError):
        softlabel.generate(data, teachers=teachers, out=tmp_path / "labels", device="cpu", activation="sigmoid")
    spec = f"python:{MODULE}:build_mlp@{table}/mlp.safetensors"
    softlabel.generate(data, teachers=[spec], out=tmp_path / "labels", device="cpu")
    assert len(softlabel.open_store(tmp_path / "labels")) == ROWS


def test_a_join_compares_arrays(table: Path) -> None:
    join = softlabel.LabelJoin(table / "labels", key="key", image="x")
    keys = [str(row) for row in range(4)]
    assert "target" in join({"key": keys, "x": TABLE[:4]})
    with pytest.raises(MismatchError, match="sample '0' is not the one that was labelled"):
        join({"key": keys, "x": TABLE[1:5]})


def test_a_network_with_several_inputs_gets_them_by_name(tmp_path: Path) -> None:
    model = write_weights(Two, tmp_path / "two.safetensors")
    teacher = f"python:{MODULE}:Two@{tmp_path}/two.safetensors"
    softlabel.generate(
        Named(), teachers=[teacher], out=tmp_path / "labels", device="cpu", encoding="float32", batch_size=9
    )
    assert_labels(tmp_path / "labels", model, torch.from_numpy(TABLE).float(), torch.arange(ROWS) % 7)
    loader = softlabel.SoftLabelLoader(Named(), tmp_path / "labels", batch_size=16, shuffle=False)
    for _ in range(2):  # the second epoch comes out of the cache
        (first, *_) = loader
        assert first.inputs["table"].dtype == torch.float32
        assert torch.equal(first.inputs["word"], torch.arange(16) % 7)


def hash_as_specified(values: np.ndarray[Any, Any]) -> int:
    """The marked hash of an array, as FORMAT.md specifies it."""
    little = values.astype(values.dtype.newbyteorder("<"))
    seed = xxhash.xxh3_64_intdigest(f"{little.dtype.str} {'x'.join(map(str, values.shape))}".encode())
    return xxhash.xxh3_64_intdigest(little.tobytes("C"), seed) & ~0xFFFF | 0x7870


def test_content_hashes_are_those_of_the_format() -> None:
    half = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    turned = np.arange(6, dtype=">i2").reshape(2, 3).T
    for raw, values in ((half, half.float().numpy()), (turned, turned), (7, np.array(7)), (TABLE[0], TABLE[0])):
        assert TENSORS.content_hash(raw) == hash_as_specified(values)  # type: ignore[arg-type]
    parts = {"b": TABLE[0], "a": 3}
    text = "".join(f"{name}={hash_as_specified(np.array(parts[name])):016x};" for name in "ab").encode()
    expected = xxhash.xxh3_64_intdigest(text, xxhash.xxh3_64_intdigest(b"named 2")) & ~0xFFFF | 0x7870
    assert TENSORS.content_hash(parts) == TENSORS.decode(Sample(key="k", raw=parts))[1] == expected
    assert TEXTS.content_hash(("né", "b")) == xxhash.xxh3_64_intdigest("3:néb".encode())


def test_images_of_many_bands(tmp_path: Path) -> None:
    model = write_weights(build_bands, tmp_path / "s2.safetensors")
    np.savez(tmp_path / "tiles.npz", bands=np.moveaxis(TILES, 1, -1))
    mean, std = np.linspace(0.1, 0.5, 13), np.linspace(0.5, 1, 13)
    numbers = f"mean={','.join(map(str, mean))}&std={','.join(map(str, std))}"
    teacher = f"python:{MODULE}:build_bands@{tmp_path}/s2.safetensors?resize=8&crop=6&{numbers}"
    data = f"{tmp_path}/tiles.npz?inputs=bands&layout=channels-last"
    softlabel.generate(data, teachers=[teacher], out=tmp_path / "labels", device="cpu", encoding="float32")
    cropped = (torch.from_numpy(TILES)[:, :, 1:7, 1:7] - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(
        -1, 1, 1
    )
    assert_labels(tmp_path / "labels", model, cropped.float())
    with pytest.raises(UsageError, match="'TrivialAugmentWide' is for 8-bit RGB images"):
        softlabel.generate(data, teachers=[teacher], out=tmp_path / "views", device="cpu", augment="trivial", views=2)


def test_a_number_that_is_not_finite_is_a_bad_sample(tmp_path: Path) -> None:
    write_weights(build_mlp, tmp_path / "mlp.safetensors")
    table = TABLE.copy()
    table[5, 2], table[9, 0], table[11, 3] = np.nan, np.inf, -1e39
    np.savez(tmp_path / "table.npz", x=table)
    teacher = f"python:{MODULE}:build_mlp@{tmp_path}/mlp.safetensors"
    summary = softlabel.generate(
        f"{tmp_path}/table.npz?inputs=x", teachers=[teacher], out=tmp_path / "labels", device="cpu"
    )
    assert summary.total_bad == 3
    assert softlabel.open_store(tmp_path / "labels").bad == {
        "5": "NaN at position 2",
        "9": "an infinite number at position 0",
        "11": "-1e+39 at position 3, beyond the range of float32",
    }


def test_a_changed_number_is_refused_by_its_key(tmp_path: Path) -> None:
    write_weights(build_mlp, tmp_path / "mlp.safetensors")
    np.savez(tmp_path / "table.npz", x=TABLE)
    data = f"{tmp_path}/table.npz?inputs=x"
    teacher = f"python:{MODULE}:build_mlp@{tmp_path}/mlp.safetensors"
    softlabel.generate(data, teachers=[teacher], out=tmp_path / "labels", device="cpu")
    table = TABLE.copy()
    table[3, 0] += 1e-9
    np.savez(tmp_path / "table.npz", x=table)
    with pytest.raises(MismatchError, match="'3' is not the one that was labelled"):
        list(softlabel.SoftLabelLoader(data, tmp_path / "labels", batch_size=8))


def test_a_program_of_float64_gets_float64(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, double = onnx.helper, onnx.TensorProto.DOUBLE
    weight = np.random.default_rng(5).standard_normal((2, CLASSES))
    start = np.array([1.7e9, 0.0])  # seconds: float32 has one of 128
    graph = helper.make_graph(
        [helper.make_node("Sub", ["x", "start"], ["d"]), helper.make_node("MatMul", ["d", "weight"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("x", double, ["n", 2])],
        [helper.make_tensor_value_info("logits", double, ["n", CLASSES])],
        [onnx.numpy_helper.from_array(start, "start"), onnx.numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "d.onnx")
    rows = np.stack([1.7e9 + np.arange(ROWS) % 7, TABLE[:, 0]], axis=1)
    np.savez(tmp_path / "t.npz", x=rows)
    data = f"{tmp_path}/t.npz?inputs=x"
    given = {"teachers": [f"{tmp_path}/d.onnx"], "device": "cpu", "encoding": "float32", "temperature": 1.0}
    softlabel.generate(data, out=tmp_path / "labels", **given)
    expected = (rows - start) @ weight
    expected -= expected.max(axis=1, keepdims=True)
    np.testing.assert_allclose(stored_logits(tmp_path / "labels"), expected, atol=1e-5)


class Mixed(Dataset[Any]):
    """Whole numbers as integers, others as floats: what a careless `__getitem__` returns."""

    def __init__(self, integers: set[int]) -> None:
        self.integers = integers

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[np.ndarray[Any, Any], int]:
        row = TABLE[index].astype(np.float32)
        return np.rint(row).astype(np.int64) if index in self.integers else row, int(LABELS[index])


@pytest.mark.parametrize(("integers", "message"), [({0}, "'1': expected int64"), ({3}, "'3': expected float32")])
def test_the_type_of_a_sample_does_not_depend_on_its_batch(integers: set[int], message: str, tmp_path: Path) -> None:
    write_weights(build_mlp, tmp_path / "mlp.safetensors")
    teacher = f"python:{MODULE}:build_mlp@{tmp_path}/mlp.safetensors"
    with pytest.raises(DataError, match=f"sample {message} like those before it, found .*; give all samples one type"):
        softlabel.generate(
            Mixed(integers), teachers=[teacher], out=tmp_path / "l", device="cpu", batch_size=16, preflight=False
        )
    for cache_mb in (0, 64):  # a cache has the type of the first sample
        with pytest.raises(DataError, match=f"sample {message}"):
            list(softlabel.SoftLabelLoader(Mixed(integers), batch_size=16, shuffle=False, cache_mb=cache_mb))


class View(nn.Module):
    """A network that depends on the order of the axes in memory."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.last = nn.Linear(2 * 20 * 9, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.view(x.size(0), -1))


def test_arrays_of_three_axes_keep_their_order_in_memory(tmp_path: Path) -> None:
    model = write_weights(View, tmp_path / "view.safetensors")
    np.savez(tmp_path / "data.npz", x=SPECTRA, y=LABELS)
    data, spec = f"{tmp_path}/data.npz?inputs=x&labels=y", f"python:{MODULE}:View"
    teacher = f"{spec}@{tmp_path}/view.safetensors"
    softlabel.generate(data, teachers=[teacher], out=tmp_path / "l", device="cpu", encoding="float32", batch_size=20)
    assert_labels(tmp_path / "l", model, torch.from_numpy(SPECTRA))
    settings = softlabel.TrainConfig(
        data=data, student=spec, out=str(tmp_path / "run"), epochs=1, batch_size=16, device="cpu", augment="none"
    )
    assert softlabel.train(settings).students[0].history[0].loss > 0


@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_integers_for_a_network_of_floats_are_refused_with_the_remedy(mixup: float, tmp_path: Path) -> None:
    write_weights(build_mlp, tmp_path / "mlp.safetensors")
    np.savez(tmp_path / "t.npz", x=np.arange(ROWS * 6).reshape(ROWS, 6) % 11, y=LABELS)
    data, spec = f"{tmp_path}/t.npz?inputs=x&labels=y", f"python:{MODULE}:build_mlp"
    remedy = r"samples are int64: give the {} samples of the type that it takes; '\?mean=0&std=1' in its SPEC makes"
    teacher = f"{spec}@{tmp_path}/mlp.safetensors"
    with pytest.raises(TeacherError, match=remedy.format("teacher")):
        softlabel.generate(data, teachers=[teacher], out=tmp_path / "refused", device="cpu")
    softlabel.generate(data, teachers=[f"{teacher}?mean=0&std=1"], out=tmp_path / "labels", device="cpu")
    settings = softlabel.TrainConfig(
        data=data, student=spec, out=str(tmp_path / "run"), epochs=1, device="cpu", augment="none", mixup=mixup
    )
    with pytest.raises(UsageError, match="mixup: mixes images" if mixup else remedy.format("student")):
        softlabel.train(settings)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_network_without_preprocessing_sees_bands_from_0_to_1(dtype: str, tmp_path: Path) -> None:
    most = 1 if dtype == "float32" else np.iinfo(dtype).max
    bands = (TILES * most).astype(dtype)
    np.savez(tmp_path / "b.npz", x=bands, y=LABELS)
    torch.manual_seed(7)
    model = build_bands().eval()
    found = softlabel.evaluate(model, f"{tmp_path}/b.npz?inputs=x&labels=y&layout=channels-first", device="cpu")
    with torch.inference_mode():
        logits = model(torch.from_numpy((bands.astype(np.float64) / most).astype(np.float32)))
    expected = nn.functional.cross_entropy(logits.double(), torch.from_numpy(LABELS))
    assert found.cross_entropy == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("zoo:cnn2@{images}?num_classes=5", "takes images, and the samples are arrays of numbers"),
        ("python:{module}:build_mlp@{weights}?crop=3", "crop= is of images, and the samples are arrays"),
        (
            "python:{module}:build_mlp@{weights}?mean=1,2&std=1,1",
            r"expected 2 channels, as mean=1,2 has numbers, found shape \(6,\); give mean= and std= in its SPEC 6 num",
        ),
    ],
)
def test_what_is_of_images_is_refused_for_arrays(teacher: str, message: str, tmp_path: Path) -> None:
    write_weights(build_mlp, tmp_path / "w.safetensors")
    np.savez(tmp_path / "table.npz", x=TABLE)
    write_weights(lambda: build_model("zoo:cnn2", num_classes=5), tmp_path / "i.safetensors")
    spec = teacher.format(weights=tmp_path / "w.safetensors", images=tmp_path / "i.safetensors", module=MODULE)
    with pytest.raises((SpecError, softlabel.SoftLabelError), match=message):
        softlabel.generate(f"{tmp_path}/table.npz?inputs=x", teachers=[spec], out=tmp_path / "labels", device="cpu")
