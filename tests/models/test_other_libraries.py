"""Teachers of timm, transformers, torch.export and ONNX against a plain run of the same library."""

import hashlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import softlabel
from softlabel.cli.main import main
from softlabel.common.spec import parse_spec
from softlabel.dataset import open_source
from softlabel.errors import SpecError, TeacherError, UsageError
from softlabel.evaluation.evaluate import evaluate
from softlabel.inputs.base import Inputs
from softlabel.inputs.image_decode import decode_image
from softlabel.inputs.image_transform import Preprocessing
from softlabel.models import Program, RunModel, build_model, save_run
from softlabel.models.head import Head
from softlabel.models.teacher import Teacher, load_teacher, student_preprocessing
from tests.support.datasets import write_dataset


def assert_near(ours: Tensor, theirs: Tensor, std: tuple[float, ...]) -> None:
    """The same pixels, but for the roundings of PIL's resize against torchvision's: 2 levels of 255, few of them."""
    assert ours.shape == theirs.shape
    levels = (ours - theirs).abs() * 255 * torch.tensor(std)[:, None, None]
    assert float(levels.max()) < 2.01
    assert float(levels.mean()) < 0.1


def photo(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth uint8 image (3, height, width)."""
    coarse_CHW = torch.rand(3, 7, 7, generator=torch.Generator().manual_seed(seed))
    fine_CHW = nn.functional.interpolate(coarse_CHW[None], (height, width), mode="bilinear")[0]
    return (fine_CHW * 255).round().to(torch.uint8)


PHOTOS = [photo(70, 50), photo(51, 94, 1), photo(64, 64, 2), photo(97, 60, 3)]


def labels(teacher: Teacher, images: list[Tensor] = PHOTOS) -> Tensor:
    return teacher.logits(Inputs.single(torch.stack([teacher.preprocessing.geometry(image) for image in images])))


def pil(image_CHW: Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def randomise(model: nn.Module) -> nn.Module:
    """Weights and statistics that make every layer matter."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 1.5 / parameter[0].numel() ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


# ---- timm ----


@pytest.fixture(scope="module")
def timm_network(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module]:
    timm = pytest.importorskip("timm")
    model = randomise(timm.create_model("resnet10t", num_classes=7))
    path = tmp_path_factory.mktemp("timm") / "w.pth"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    return f"timm:resnet10t@{path}", model


def test_timm_equals_timms_own_transform_and_forward(timm_network: tuple[str, nn.Module]) -> None:
    from timm.data import create_transform, resolve_model_data_config

    spec, model = timm_network
    teacher = load_teacher(spec)
    config = resolve_model_data_config(model, use_test_size=True)
    assert (teacher.num_classes, teacher.preprocessing.crop) == (7, config["input_size"][1])
    assert teacher.preprocessing.resize == int(config["input_size"][1] / config["crop_pct"])
    transform = create_transform(**config, is_training=False)
    inputs_BCHW = torch.stack([transform(pil(image)) for image in PHOTOS])
    ours_BCHW = teacher.preprocessing.normalize(torch.stack([teacher.preprocessing.geometry(i) for i in PHOTOS]))
    assert_near(ours_BCHW, inputs_BCHW, teacher.preprocessing.std)
    with torch.inference_mode():
        expected = model(inputs_BCHW)
        exact = model(ours_BCHW)
    assert torch.allclose(labels(teacher), exact, rtol=1e-4, atol=1e-4)
    # What a rounding of single pixels makes of the logits.
    assert float((labels(teacher) - expected).abs().max()) < 0.01 * float(expected.abs().max())


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "convnext_atto", "resnet50.a1_in1k", "tf_efficientnet_b0", "deit3_small_patch16_384"],
)
def test_timm_preprocessing_is_timms(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    ours, theirs = student_preprocessing(f"timm:{name}"), create_transform(**config, is_training=False)
    image_CHW = photo(333, 401)
    ours_CHW = ours.normalize(ours.geometry(image_CHW)[None])[0]
    assert_near(ours_CHW, theirs(pil(image_CHW)), ours.std)


def test_timm_weights_are_evaluated_as_timm_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    timm = pytest.importorskip("timm")
    from timm.data import resolve_data_config

    model = timm.create_model("convnext_atto", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    theirs = resolve_data_config({}, model=model, use_test_size=True)  # as timm's validate.py
    assert theirs["input_size"] != model.pretrained_cfg["input_size"]
    caplog.set_level("INFO")
    found = load_teacher(f"timm:convnext_atto@{tmp_path}/w.pth").preprocessing
    assert (found.crop, found.resize) == (theirs["input_size"][1], int(theirs["input_size"][1] / theirs["crop_pct"]))
    assert "prepared as for timm's weights convnext_atto.d2_in1k: mean=0.485,0.456,0.406" in caplog.text
    assert student_preprocessing("timm:convnext_atto").crop == model.pretrained_cfg["input_size"][1]


def test_timm_squash_and_what_cannot_be_expressed() -> None:
    timm = pytest.importorskip("timm")
    from timm.data import create_transform

    squashing = [n for n in timm.list_pretrained() if timm.get_pretrained_cfg(n).to_dict().get("crop_mode") == "squash"]
    name = next(n for n in squashing if timm.get_pretrained_cfg(n).interpolation == "bicubic")
    found = student_preprocessing(f"timm:{name}")
    assert found.squash
    cfg = timm.get_pretrained_cfg(name)
    transform = create_transform(
        cfg.input_size, crop_pct=cfg.crop_pct, crop_mode="squash", interpolation="bicubic", mean=cfg.mean, std=cfg.std
    )
    image_CHW = photo(200, 500)
    ours_CHW = found.normalize(found.geometry(image_CHW)[None])[0]
    assert_near(ours_CHW, transform(pil(image_CHW)), found.std)
    bordered = next(
        n for n in timm.list_pretrained() if timm.get_pretrained_cfg(n).to_dict().get("crop_mode") == "border"
    )
    with pytest.raises(SpecError, match="crop mode border, which softlabel cannot"):
        student_preprocessing(f"timm:{bordered}")
    everything = "mean=0,0,0&std=1,1,1&resize=64&crop=60&interpolation=bilinear"
    assert student_preprocessing(f"timm:{bordered}?{everything}").resize == 64


def test_timm_teachers_have_heads_and_lower_precision(timm_network: tuple[str, nn.Module]) -> None:
    teacher = load_teacher(f"{timm_network[0]}?crop=64")
    images_BCHW = torch.stack([teacher.preprocessing.geometry(image) for image in PHOTOS])
    logits_BC, hidden_BD = Head.of(teacher).logits(Inputs.single(images_BCHW))
    layer = timm_network[1].get_classifier()
    with torch.inference_mode():
        assert torch.allclose(layer(hidden_BD), logits_BC, rtol=1e-4, atol=1e-4)
    rough = load_teacher(f"{timm_network[0]}?crop=64", precision="bf16").logits(Inputs.single(images_BCHW))
    assert 1e-5 < float((rough - logits_BC).abs().max() / logits_BC.abs().max()) < 0.1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet10t", r"random weights.*timm:resnet10t@FILE.*pretrained=true \(a download\)"),
        ("timm:resnet10tt@a.pt", "did you mean resnet10t"),
        ("timm:hf_hub:timm/resnet10t@a.pt", "timm has no model"),
        ("timm:resnet10t?checkpoint_path=a.pt&pretrained=true", "expected the checkpoint after '@'"),
        ("timm:resnet10t@a.pt?pretrained=true", "not both"),
        ("timm:resnet10t@nowhere.pt", "no such file"),
    ],
)
def test_wrong_timm_specs_are_refused(spec: str, message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(SpecError, match=message):
        load_teacher(spec)


# ---- transformers ----


def hf_folder(folder: Path, kind: str, processor: Any, **fields: Any) -> str:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    if kind == "vit":
        config = transformers.ViTConfig(
            image_size=48, patch_size=16, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, **({"num_labels": 5} | fields if "id2label" not in fields else fields),
        )  # fmt: skip
    else:
        config = transformers.ConvNextConfig(
            hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], num_labels=5, image_size=48
        )
    model = randomise(transformers.AutoModelForImageClassification.from_config(config))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return f"hf:{folder}"


def processors() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    square = {"height": 48, "width": 48}
    return {
        "vit": transformers.ViTImageProcessor(size=square),
        "vit-bicubic": transformers.ViTImageProcessor(size=square, resample=3, image_std=[0.2, 0.3, 0.4]),
        "vit-nearest": transformers.ViTImageProcessor(size=square, resample=0),
        "raw": transformers.ViTImageProcessor(size=square, do_normalize=False),
        "bytes": transformers.ViTImageProcessor(
            size=square, do_rescale=False, image_mean=[127] * 3, image_std=[60] * 3
        ),
        "deit": transformers.DeiTImageProcessor(size={"height": 56, "width": 56}, crop_size=square),
        "clip": transformers.BitImageProcessor(size={"shortest_edge": 53}, crop_size=square),
        "convnext": transformers.ConvNextImageProcessor(size={"shortest_edge": 48}),
    }


@pytest.mark.parametrize("name", ["vit", "vit-bicubic", "vit-nearest", "raw", "bytes", "deit", "clip", "convnext"])
def test_hf_equals_its_own_processor_and_model(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    spec = hf_folder(tmp_path, "convnext" if name == "convnext" else "vit", processors()[name])
    teacher = load_teacher(spec)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    inputs_BCHW = torch.cat([processor(pil(image), return_tensors="pt")["pixel_values"] for image in PHOTOS])
    with torch.inference_mode():
        expected = model(pixel_values=inputs_BCHW).logits
    assert teacher.num_classes == 5
    ours_BCHW = teacher.preprocessing.normalize(torch.stack([teacher.preprocessing.geometry(i) for i in PHOTOS]))
    assert_near(ours_BCHW, inputs_BCHW, teacher.preprocessing.std)
    assert float((labels(teacher) - expected).abs().max()) < 0.02 * float(expected.abs().max())
    assert Preprocessing.from_dict(json.loads(json.dumps(teacher.preprocessing.to_dict()))) == teacher.preprocessing
    assert student_preprocessing(f"{spec}?resize=60&crop=48&squash=false").squash is False


def test_an_hf_processor_that_does_more_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.MobileViTImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, do_flip_channel_order=True
    )
    spec = hf_folder(tmp_path, "vit", processor)
    with pytest.raises(SpecError, match=r"MobileViTImageProcessor does more .*mean="):
        load_teacher(spec)
    given = "mean=0,0,0&std=1,1,1&resize=48&crop=48&interpolation=bilinear"
    assert load_teacher(f"{spec}?{given}").preprocessing == Preprocessing(
        mean=(0.0,) * 3, std=(1.0,) * 3, resize=48, crop=48
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type=multi_label"),
        ({"problem_type": "regression", "num_labels": 1}, "a quantity, not a logit, with either --activation"),
        ({"num_labels": 1}, "one output"),
    ],
    ids=["several labels", "regression", "one output"],
)
def test_hf_networks_that_are_no_classifiers_of_one_class(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    spec = hf_folder(tmp_path, "vit", processors()["vit"], **config)
    with pytest.raises((SpecError, TeacherError), match=message):
        load_teacher(spec)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("Red", "green, verdant", "blue", "grey"), None),
        (
            ("green", "red", "blue", "grey"),
            "2 of its 4 classes are in another order.*class 0 is 'green' for it and 'red'",
        ),
        (("cat", "dog", "blue", "grey"), "2 of its 4 classes are not named as the data's.*'cat'"),
    ],
    ids=["same", "moved", "others"],
)
def test_hf_class_names_are_compared_with_the_datas(
    tmp_path: Path, names: tuple[str, ...], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    spec = hf_folder(tmp_path / "net", "vit", processors()["vit"], id2label=dict(enumerate(names)))
    data = write_dataset(tmp_path / "data.parquet", 4)
    softlabel.generate(data, teachers=[spec], out=tmp_path / "store", batch_size=4, progress=False)
    warned = " ".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert bool(said is not None and re.search(said, warned)) == (said is not None), warned
    assert ("of its 4 classes" in warned) == (said is not None), warned


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")
def test_factories_of_torchscript_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    randomise(network)
    module = ModuleType("programs_of_a_test")
    module.script = lambda: torch.jit.script(network)
    module.trace = lambda: torch.jit.trace(network, torch.zeros(2, 3, 16, 16))
    module.frozen = lambda: torch.jit.freeze(torch.jit.script(network))
    monkeypatch.setitem(sys.modules, "programs_of_a_test", module)
    data = write_dataset(tmp_path / "data.parquet", 4)
    images = [decode_image(sample.raw) for sample in open_source(data).read(range(4))]
    for name in ("script", "trace", "frozen"):
        spec = f"python:programs_of_a_test:{name}?resize=16&crop=16&mean=0&std=1"
        softlabel.generate(
            data, teachers=[spec], out=tmp_path / name, temperature=1, encoding="float32", progress=False
        )
        store = softlabel.open_store(tmp_path / name)
        teacher = load_teacher(spec)
        with torch.inference_mode():
            logits = network(torch.stack([teacher.preprocessing.geometry(image) for image in images]) / 255)
        expected = logits - logits.amax(dim=1, keepdim=True)
        assert np.allclose(store.take(np.arange(4)).scaled_logits, expected, atol=1e-4)
    randomise(network)[4].bias.data.add_(1)
    assert load_teacher(spec).sha256 != teacher.sha256, "other weights in the graph are another teacher"


def test_hf_files_that_are_not_there_or_do_not_fit(tmp_path: Path) -> None:
    spec = hf_folder(tmp_path / "a", "vit", processors()["vit"])
    with pytest.raises(SpecError, match=r"nobody/nothing.*\?download=true"):
        load_teacher("hf:nobody/nothing")
    with pytest.raises(SpecError, match="pretrained=false: random weights"):
        load_teacher(f"{spec}?pretrained=false")
    with pytest.raises(SpecError, match=r"no option but download.*revison"):
        load_teacher(f"{spec}?revison=3")
    with pytest.raises(SpecError, match="has 5 classes, but 4 are needed"):
        build_model(spec, num_classes=4)
    weights = tmp_path / "a" / "model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if not k.startswith("classifier")}, weights, metadata={"format": "pt"})
    with pytest.raises(SpecError, match=r"2 of its tensors are missing \(classifier"):
        load_teacher(spec)
    weights.unlink()
    torch.save(state, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(SpecError, match=r"expected a folder with config\.json and model\.safetensors"):
        load_teacher(spec)
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    with pytest.raises(SpecError, match=r"how it prepares images cannot be read.*mean="):
        student_preprocessing(spec)


def test_the_identity_of_a_teacher_is_not_where_it_lies(tmp_path: Path) -> None:
    spec = hf_folder(tmp_path / "net", "vit", processors()["vit"])
    assert parse_spec(f"{spec}?download=true").identity == "hf:net"
    assert parse_spec("hf:google/vit").identity == "hf:google/vit"
    assert parse_spec("a/b.onnx?mean=0").identity == "b.onnx?mean=0"
    assert parse_spec("a/b.pt2?trust=true").identity == "b.pt2"
    assert parse_spec("timm:resnet10t@a.pt").identity == "timm:resnet10t"


# ---- students ----


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_students_of_other_libraries_come_back_from_their_run(tmp_path: Path, kind: str) -> None:
    if kind == "timm":
        pytest.importorskip("timm")
        spec = "timm:test_resnet"
    else:
        spec = hf_folder(tmp_path / "source", "vit", processors()["vit"]) + "?pretrained=false"
    student = build_model(spec, num_classes=3)
    described = RunModel(student=spec, num_classes=3, preprocessing=student_preprocessing(spec, student).to_dict())
    (tmp_path / "run").mkdir()
    save_run(tmp_path / "run", student, described)
    if kind == "hf":  # the run is whole without the folder that its architecture came from
        (tmp_path / "source" / "config.json").unlink()
    teacher = load_teacher(f"run:{tmp_path / 'run'}")
    assert (teacher.preprocessing.to_dict(), teacher.num_classes) == (described.preprocessing, 3)
    images_BCHW = torch.stack([teacher.preprocessing.geometry(image) for image in PHOTOS])
    with torch.inference_mode():
        expected = student.eval()(teacher.preprocessing.normalize(images_BCHW))
    assert torch.allclose(teacher.logits(Inputs.single(images_BCHW)), expected, rtol=1e-4, atol=1e-4)


# ---- programs ----


class Small(nn.Module):
    """Something with a batch norm and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(dim=(2, 3)))


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
STATED = "mean=0.4,0.5,0.6&std=0.2,0.25,0.3"


def small() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Small())


Batch = int | tuple[int, int | None]


def make_inputs(batch: Batch) -> tuple[Tensor, dict[str, Any] | None]:
    """An example for an export, and the sizes of batch that the program takes."""
    images = torch.zeros(batch if isinstance(batch, int) else 4, 3, 32, 32)
    return images, None if isinstance(batch, int) else {"x": {0: torch.export.Dim("b", min=batch[0], max=batch[1])}}


@cache
def export_onnx(batch: Batch) -> bytes:
    """`small()` as ONNX, which takes torch seconds."""
    images, shapes = make_inputs(batch)
    program = torch.onnx.export(small().eval(), (images,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def save_program(path: Path, *, batch: Batch, training: bool = False, **options: Any) -> str:
    """A .pt2 or .onnx file of `small()` at 32 x 32, of one batch size or of a range of them."""
    if path.suffix == ".pt2":
        images, shapes = make_inputs(batch)
        program = torch.export.export(small().train(training), (images,), dynamic_shapes=shapes)
        torch.export.save(program, path, **options)
        return f"{path}?trust=true&{STATED}"
    pytest.importorskip("onnxruntime")
    path.write_bytes(export_onnx(batch))
    return f"{path}?{STATED}"


def expected_of(images_BCHW: Tensor) -> Tensor:
    """The network itself in float64, on images normalised by hand."""
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    with torch.inference_mode():
        return small().double()((images_BCHW.double() / 255 - mean) / std).float()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", [1, 4, (2, 6), (1, None)], ids=str)
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_programs_of_any_batch_equal_their_network(tmp_path: Path, suffix: str, batch: Any) -> None:
    teacher = load_teacher(save_program(tmp_path / f"net{suffix}", batch=batch))
    assert teacher.preprocessing == Preprocessing(mean=MEAN, std=STD, resize=32, crop=32)
    assert teacher.num_classes == 6
    assert teacher.sha256 == hashlib.sha256((tmp_path / f"net{suffix}").read_bytes()).hexdigest()
    for count in (1, 3, 4, 11):
        images_BCHW = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        # As images lie in memory when they were decoded, too.
        for given in (images_BCHW, images_BCHW.contiguous(memory_format=torch.channels_last)):
            assert torch.allclose(teacher.logits(Inputs.single(given)), expected_of(images_BCHW), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_programs_that_carry_their_preprocessing(tmp_path: Path, suffix: str) -> None:
    expected = Preprocessing(mean=MEAN, std=STD, resize=36, crop=32, interpolation="bicubic").to_dict()
    path = tmp_path / f"net{suffix}"
    if suffix == ".pt2":
        save_program(path, batch=4, extra_files={"preprocessing.json": json.dumps(expected)})
        spec = f"{path}?trust=true"
    else:
        save_program(path, batch=4)
        onnx = pytest.importorskip("onnx")
        model = onnx.load(path)
        model.metadata_props.add(key="preprocessing", value=json.dumps(expected))
        onnx.save(model, path)
        spec = str(path)
    assert load_teacher(spec).preprocessing.to_dict() == expected
    joined = "&" if "?" in spec else "?"
    assert load_teacher(f"{spec}{joined}interpolation=bilinear").preprocessing.interpolation == "bilinear"


@pytest.mark.filterwarnings("ignore")
def test_what_a_program_cannot_do_is_refused(tmp_path: Path) -> None:
    specs = [save_program(tmp_path / f"net{suffix}", batch=(1, None)) for suffix in (".pt2", ".onnx")]
    for spec in specs:
        with pytest.raises(SpecError, match="--precision bf16 does not apply"):
            load_teacher(spec, precision="bf16")
        with pytest.raises(SpecError, match="give mean= and std="):
            load_teacher(spec.replace(STATED, "crop=32"))
        with pytest.raises(SpecError, match=r"expected no option but .*'colour'"):
            load_teacher(f"{spec}&colour=3")
        with pytest.raises(TeacherError, match="fails on"):
            load_teacher(f"{spec}&crop=30")
        with pytest.raises(SpecError, match="no such file"):
            load_teacher(spec.replace("net", "gone"))
        teacher = load_teacher(spec)
        assert isinstance(teacher.model, Program)
        with pytest.raises(UsageError, match=r"encoding head: .*6 outputs, found none; use another --encoding"):
            Head.of(teacher)
    with pytest.raises(SpecError, match=r"can execute code.*trust=true"):
        load_teacher(f"{tmp_path}/net.pt2?{STATED}")
    for name in ("bad.pt2", "bad.onnx"):
        (tmp_path / name).write_bytes(b"404 not found")
        with pytest.raises(TeacherError, match=rf"{name}: (cannot be loaded|expected an ONNX|onnxruntime cannot)"):
            load_teacher(f"{tmp_path}/{name}?{STATED}" + ("&trust=true" if name.endswith("pt2") else ""))


@pytest.mark.filterwarnings("ignore")
def test_a_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"training mode.*model\.eval"):
        load_teacher(save_program(tmp_path / "net.pt2", batch=4, training=True))


@pytest.mark.filterwarnings("ignore")
def test_onnx_weights_beside_the_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    spec = save_program(tmp_path / "net.onnx", batch=2)
    model = onnx.load(tmp_path / "net.onnx")
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=500)
    both = (tmp_path / "net.onnx").read_bytes() + (tmp_path / "net.data").read_bytes()
    teacher = load_teacher(spec)
    assert teacher.sha256 == hashlib.sha256(both).hexdigest()
    images_BCHW = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(teacher.logits(Inputs.single(images_BCHW)), expected_of(images_BCHW), rtol=1e-4, atol=1e-4)
    (tmp_path / "net.data").rename(tmp_path / "gone.data")
    with pytest.raises(SpecError, match=r"expected its weights in .*net\.data"):
        load_teacher(spec)
    moved = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    for tensor in moved.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../net.data" if entry.key == "location" else entry.value
    (tmp_path / "net.onnx").write_bytes(moved.SerializeToString())
    with pytest.raises(TeacherError, match="a file outside its folder"):
        load_teacher(spec)


def test_onnx_networks_with_channels_last_and_several_outputs(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["pixels", "axes"], ["colour"], keepdims=0),
            helper.make_node("MatMul", ["colour", "weight"], ["logits"]),
        ],
        "net",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", "h", "w", 3])],
        [
            helper.make_tensor_value_info("colour", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4]),
        ],
        [numpy_helper.from_array(np.array([1, 2]), "axes"), numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    teacher = load_teacher(f"{tmp_path / 'net.onnx'}?mean=0&std=1&crop=20")
    images_BCHW = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    expected = (images_BCHW.double() / 255).mean(dim=(2, 3)).float() @ torch.from_numpy(weight)
    assert torch.allclose(teacher.logits(Inputs.single(images_BCHW)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_program_is_evaluated_like_any_model(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.parquet", 9, labelled=False)
    spec = save_program(tmp_path / "net.onnx", batch=4)
    assert evaluate(spec, str(data), batch_size=5).samples == 9
    with pytest.raises(SpecError, match="--precision bf16 does not apply"):
        evaluate(spec, str(data), precision="bf16")


# ---- the command line ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["timm", "hf", "pt2", "onnx"])
def test_generate_and_verify_with_a_teacher_of_each_kind(
    tmp_path: Path, kind: str, timm_network: tuple[str, nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "timm":
        spec = f"{timm_network[0]}?resize=40&crop=36"
    elif kind == "hf":
        spec = hf_folder(tmp_path / "net", "vit", processors()["vit"])
    else:
        spec = save_program(tmp_path / f"net.{kind}", batch=4)
    data = write_dataset(tmp_path / "data.parquet", 10, labelled=False)
    options = ["--data", str(data), "--teacher", spec]
    store = tmp_path / "store"
    assert main(["generate", *options, "--out", str(store), "--batch-size", "4", "--temperature", "2"]) == 0
    opened = softlabel.open_store(store, verify="full")
    teacher = load_teacher(spec)
    (member,) = opened.manifest.run.members
    assert (member.sha256, member.preprocessing) == (teacher.sha256, teacher.preprocessing.to_dict())
    assert str(tmp_path) not in member.spec
    images = [decode_image(sample.raw) for sample in open_source(data).read(range(10))]
    expected = labels(teacher, images) / 2
    expected -= expected.amax(dim=1, keepdim=True)
    found = torch.from_numpy(np.asarray(opened.take(np.arange(10)).scaled_logits, dtype=np.float32))
    found -= found.amax(dim=1, keepdim=True)
    assert torch.allclose(found, expected, rtol=2e-3, atol=2e-3)
    assert main(["verify", str(store), "--data", str(data), "--recompute", "10"]) == 0
    assert main(["plan", *options, "--seconds", "0.1"]) == 0
    if kind in ("pt2", "onnx"):
        assert main(["generate", *options, "--out", str(tmp_path / "head"), "--encoding", "head"]) == 2
        assert "found none; use another --encoding" in capsys.readouterr().err
        arguments = ["train", "--data", str(data), "--student", spec, "--out", str(tmp_path / "run")]
        assert main([*arguments, "--labels", str(store)]) == 2
        assert "cannot be trained" in capsys.readouterr().err


# ---- absent libraries ----

EXTRAS = {
    "timm:resnet18@w.pt": ("timm", "timm"),
    "hf:folder": ("transformers", "hf"),
    "net.onnx?mean=0&std=1": ("onnx", "onnx"),
}
RUN = """
import sys
from softlabel.cli.main import main
for spec in {specs!r}:
    print(main(["generate", "--data", {data!r}, "--teacher", spec, "--out", {out!r}]))
"""


def test_an_absent_library_is_named_with_its_remedy(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.parquet", 2)
    # An installation that lacks them: every package of this one is there, but for these and what belongs to them.
    lacking = tmp_path / "site-packages"
    lacking.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.lower().startswith(("timm", "transformers", "onnx")):
            (lacking / entry.name).symlink_to(entry)
    root = Path(softlabel.__file__).parents[1]
    code = RUN.format(specs=list(EXTRAS), data=str(data), out=str(tmp_path / "store"))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(lacking)])},
    )
    assert done.stdout.split() == ["2"] * len(EXTRAS), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("softlabel: ")]
    for line, (library, extra) in zip(errors, EXTRAS.values(), strict=True):
        assert f"No module named '{library}'" in line
        assert f"pip install 'softlabel[{extra}]'" in line
    assert not (tmp_path / "store").exists()
