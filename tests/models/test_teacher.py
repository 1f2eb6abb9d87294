"""Teachers against an independent forward pass; preprocessing against plain torchvision."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from softlabel.dataset import open_source
from softlabel.errors import BadImageError, SpecError, TeacherError
from softlabel.generation.ensemble import replace_norms
from softlabel.inputs.base import Inputs
from softlabel.inputs.image_decode import decode_image
from softlabel.inputs.image_transform import Preprocessing, stack_images
from softlabel.models import RunModel, build_model, load_weights, published_weights, save_run, weights_sha256
from softlabel.models.teacher import load_teacher, student_preprocessing
from tests.support import reference_resnet

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A small teacher's SPEC without options; its batch norms have statistics of their own."""
    torch.manual_seed(2)
    model = build_model("zoo:resnet8", num_classes=6)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    return f"zoo:resnet8@{tmp_path / 'w.pt'}"


def random_images(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )


# ---- preprocessing ----


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "nearest-exact"])
@pytest.mark.parametrize(
    ("size", "resize", "crop"), [((70, 50), 40, 32), ((33, 90), 64, 64), ((32, 32), 32, 32), ((90, 41), None, 40)]
)
def test_geometry_and_normalisation_are_torchvisions(
    size: tuple[int, int], resize: int | None, crop: int, interpolation: str
) -> None:
    image_CHW = random_images(1, *size)[0]
    preprocessing = Preprocessing(resize=resize, crop=crop, interpolation=interpolation)
    mode = v1.InterpolationMode(interpolation)
    steps = [*([v1.Resize(resize, mode)] if resize else []), v1.CenterCrop(crop)]
    expected_CHW = v2.Compose([*([v2.Resize(resize, mode, antialias=True)] if resize else []), v2.CenterCrop(crop)])(
        image_CHW
    )
    assert torch.equal(preprocessing.geometry(image_CHW), expected_CHW)
    if interpolation in ("bilinear", "bicubic"):
        # The weights' authors resized PIL images, which rounds after each axis as uint8 tensors do.
        pil_CHW = v1.Compose([v1.ToPILImage(), *steps, v1.PILToTensor()])(image_CHW)
        assert (expected_CHW.int() - pil_CHW.int()).abs().max() <= 1
    finish = v1.Compose([v1.ConvertImageDtype(torch.float32), v1.Normalize(**IMAGENET)])
    normalized = preprocessing.normalize(expected_CHW[None])
    assert torch.allclose(normalized[0], finish(expected_CHW), rtol=0, atol=1e-6)
    # Decoded images lie channels-last in memory: that must not change a pixel.
    lying_CHW = image_CHW.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(preprocessing.geometry(lying_CHW), expected_CHW)


def test_an_image_that_fits_is_not_touched() -> None:
    image_CHW = random_images(1)[0]
    assert Preprocessing(resize=32, crop=32).geometry(image_CHW) is image_CHW
    assert Preprocessing().geometry(image_CHW) is image_CHW
    tall_CHW = random_images(1, 40, 32)[0]
    assert torch.equal(Preprocessing(resize=32, crop=32).geometry(tall_CHW), tall_CHW[:, 4:36])
    assert Preprocessing(resize=32).geometry(tall_CHW).shape == (3, 40, 32)


def test_images_that_do_not_fit() -> None:
    with pytest.raises(BadImageError, match=r"20 x 50 pixels: smaller than crop=32; give resize=32"):
        Preprocessing(crop=32).geometry(random_images(1, 50, 20)[0])
    thin_CHW = torch.zeros(3, 2, 20000, dtype=torch.uint8)
    with pytest.raises(BadImageError, match="20000 x 2 pixels: too thin"):
        Preprocessing(resize=256, crop=224).geometry(thin_CHW)
    assert Preprocessing(resize=32, crop=32).geometry(thin_CHW).shape == (3, 32, 32)
    assert Preprocessing(resize=32, crop=32).geometry(torch.zeros(3, 1, 1, dtype=torch.uint8)).shape == (3, 32, 32)


def test_normalize_keeps_layout_and_input() -> None:
    images_BCHW = random_images(4).to(memory_format=torch.channels_last)
    before = images_BCHW.clone()
    assert Preprocessing().normalize(images_BCHW).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images_BCHW, before)


def test_preprocessing_goes_through_json() -> None:
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), resize=40, crop=None, interpolation="bicubic")
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    for wrong in ({}, {**preprocessing.to_dict(), "mean": None}, {**preprocessing.to_dict(), "resize": "big"}):
        with pytest.raises(SpecError, match="preprocessing: expected"):
            Preprocessing.from_dict(wrong)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("zoo:resnet8", Preprocessing(resize=32, crop=32)),
        ("zoo:resnet8?crop=none", Preprocessing()),
        ("zoo:resnet8?resize=16", Preprocessing(resize=16, crop=16)),
        ("zoo:resnet8?resize=40&crop=none", Preprocessing(resize=40)),
        ("torchvision:resnet18", Preprocessing(resize=256, crop=224)),
        ("torchvision:resnet50?weights=IMAGENET1K_V2", Preprocessing(resize=232, crop=224)),
        ("torchvision:resnet50?weights=DEFAULT&resize=256&crop=224", Preprocessing(resize=256, crop=224)),
        ("torchvision:efficientnet_b0?weights=DEFAULT", Preprocessing(resize=256, crop=224, interpolation="bicubic")),
        (
            "torchvision:vit_b_16?weights=IMAGENET1K_SWAG_E2E_V1",
            Preprocessing(resize=384, crop=384, interpolation="bicubic"),
        ),
        ("python:a:b", Preprocessing()),
        ("python:a:b?mean=0.5&std=0.25,0.5,1", Preprocessing(mean=(0.5,) * 3, std=(0.25, 0.5, 1.0))),
        ("zoo:cnn2?mean=[0,0,0]&std=1,1,1", Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, resize=32, crop=32)),
        ("zoo:cnn2?interpolation=bicubic", Preprocessing(resize=32, crop=32, interpolation="bicubic")),
    ],
)
def test_preprocessing_of_a_spec(spec: str, expected: Preprocessing) -> None:
    assert student_preprocessing(spec) == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("mean=1,2", "as many numbers of each"),
        ("std=a,b,c", "a number for each channel"),
        ("std=0,1,1", "std above 0"),
        ("mean=nan,0,0", "finite"),
        ("resize=big", "whole number"),
        ("crop=true", "whole number"),
        ("crop=0", "at least 1"),
        ("resize=24&crop=32", "does not fit"),
        ("interpolation=cubic", "bilinear, bicubic"),
    ],
)
def test_preprocessing_that_makes_no_sense(option: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        student_preprocessing(f"zoo:resnet8?{option}")
    assert "zoo:resnet8?" in str(caught.value)


# ---- teachers ----


@pytest.mark.parametrize(
    "file", ["resnet20-12fca82f.th", "resnet32-d509ac18.th", "resnet56-4bfd9763.th", "resnet20-jpeg.safetensors"]
)
def test_real_teachers_equal_an_independent_forward(shared_data: Path, file: str) -> None:
    path, count = shared_data / "cifar10-resnets" / file, 160
    _, pixels_NCHW, labels_N = reference_resnet.read_rows(shared_data / "cifar10-jpeg" / "test.parquet", count)
    expected_NC = reference_resnet.logits(reference_resnet.read_weights(path), pixels_NCHW)
    teacher = load_teacher(f"zoo:{file.partition('-')[0]}@{path}")
    samples = open_source(shared_data / "cifar10-jpeg" / "test.parquet").read(range(count))
    images = [teacher.preprocessing.geometry(decode_image(sample.raw)) for sample in samples]
    logits_NC = teacher.logits(Inputs.single(stack_images(images)))
    assert (teacher.num_classes, logits_NC.dtype) == (10, torch.float32)
    assert torch.allclose(logits_NC, expected_NC, rtol=1e-4, atol=2e-4)
    assert float((logits_NC.argmax(1) == labels_N).float().mean()) > 0.7
    assert teacher.sha256 == weights_sha256(build_model(teacher.spec))


def test_sizes_other_than_32(weights: str) -> None:
    images_BCHW = random_images(3, 8, 8)
    as_they_are = load_teacher(f"{weights}?crop=none")
    assert as_they_are.num_classes == 6
    expected = reference_resnet.logits(load_weights(as_they_are.spec.checkpoint), images_BCHW.float() / 255)
    assert torch.allclose(as_they_are.logits(Inputs.single(images_BCHW)), expected, rtol=1e-4, atol=1e-4)


def test_labels_do_not_depend_on_the_batch(weights: str) -> None:
    teacher = load_teacher(weights)
    images_BCHW = random_images(9)
    together = teacher.logits(Inputs.single(images_BCHW))
    alone = torch.cat([teacher.logits(Inputs.single(images_BCHW[i : i + 1])) for i in range(9)])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)
    before = weights_sha256(teacher.model)
    teacher.logits(Inputs.single(images_BCHW))
    assert weights_sha256(teacher.model) == before == teacher.sha256, "labelling must not move batch norm statistics"


def test_training_mode_is_refused(weights: str) -> None:
    teacher = load_teacher(weights)
    teacher.model.layer2[0].bn1.train()
    with pytest.raises(TeacherError, match=r"training mode.*model\.eval"):
        teacher.logits(Inputs.single(random_images(2)))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.02)])
def test_lower_precision_is_near_and_really_lower(weights: str, precision: Any, tolerance: float) -> None:
    images_BCHW = random_images(16)
    exact = load_teacher(weights).logits(Inputs.single(images_BCHW))
    found = load_teacher(weights, precision=precision).logits(Inputs.single(images_BCHW))
    assert found.dtype == torch.float32
    error = float((found - exact).abs().max() / exact.abs().max())
    assert 1e-5 < error < tolerance


def test_a_float64_reference_bounds_the_float32_error(weights: str) -> None:
    images_BCHW = random_images(8)
    teacher = load_teacher(weights)
    mean, std = (torch.tensor(IMAGENET[k], dtype=torch.float64).view(3, 1, 1) for k in ("mean", "std"))
    exact = build_model(weights).eval().double()((images_BCHW.double() / 255 - mean) / std)
    assert torch.allclose(teacher.logits(Inputs.single(images_BCHW)).double(), exact, rtol=1e-4, atol=1e-4)


def test_no_graph_is_kept_and_nothing_needs_gradients(weights: str) -> None:
    teacher = load_teacher(weights)
    assert not teacher.logits(Inputs.single(random_images(2))).requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.mark.parametrize("spec", ["zoo:resnet8", "torchvision:resnet18", "torchvision:resnet18?weights=none"])
def test_a_teacher_without_weights_is_refused(spec: str) -> None:
    with pytest.raises(SpecError, match=r"random weights.*@FILE"):
        load_teacher(spec)


def test_a_torchvision_teacher_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("torchvision:mobilenet_v3_small", num_classes=5).eval()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    teacher = load_teacher(f"torchvision:mobilenet_v3_small@{tmp_path / 'm.pt'}?crop=64")
    assert (teacher.num_classes, teacher.preprocessing.crop) == (5, 64)
    images_BCHW = random_images(2, 64, 64)
    with torch.inference_mode():
        expected = model(v1.Normalize(**IMAGENET)(images_BCHW.float() / 255))
    assert torch.allclose(teacher.logits(Inputs.single(images_BCHW)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "resnet18"])
def test_files_for_torchvision_get_the_input_of_its_published_weights(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torchvision's own network and transform for these weights, which get random ones for a download."""
    from torchvision import models

    torch.manual_seed(0)
    weights = next(iter(models.get_model_weights(name)))
    state = models.get_model(name, **({} if name == "resnet18" else {"init_weights": False})).state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: state)
    theirs = models.get_model(name, weights=weights).eval()
    torch.save(state, tmp_path / "w.pth")
    caplog.set_level("INFO")
    preset = weights.transforms()
    image_CHW = random_images(1, 400, 380)[0]
    with torch.inference_mode():
        expected = theirs(preset(image_CHW)[None])
    for spec in (f"torchvision:{name}@{tmp_path}/w.pth", f"torchvision:{name}?weights={weights.name}"):
        teacher = load_teacher(spec)
        found = teacher.logits(Inputs.single(teacher.preprocessing.geometry(image_CHW)[None]))
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())), spec
    assert f"none of torchvision's published weights; .* as for {weights}" in caplog.text.replace(
        "what the SPEC leaves open is prepared", ".*"
    )
    caplog.clear()
    load_teacher(f"torchvision:{name}@{tmp_path}/w.pth?crop=299&interpolation=bilinear&mean=0&std=1&resize=310")
    assert "published" not in caplog.text


def test_published_weights_are_known_by_their_sha256() -> None:
    from torchvision import models

    for name in models.list_models(module=models):
        entries = list(models.get_model_weights(name))
        for entry in entries:
            digits = entry.url.rpartition("-")[2].partition(".")[0]
            assert published_weights(digits + "0" * (64 - len(digits)), entries) is entry, entry
        assert published_weights("f" * 64, entries) is None


def test_a_vision_transformer_has_the_size_of_its_weights(tmp_path: Path) -> None:
    model = build_model("torchvision:vit_b_32?image_size=64", num_classes=3)
    save_run(tmp_path, model, RunModel(student="torchvision:vit_b_32@gone", num_classes=3, preprocessing={}))
    assert build_model(f"run:{tmp_path}").image_size == 64


def test_a_run_is_a_teacher(tmp_path: Path, weights: str) -> None:
    model = build_model(weights)
    preprocessing = Preprocessing(mean=(0.4, 0.5, 0.6), resize=16, crop=16)
    save_run(tmp_path, model, RunModel(student="zoo:resnet8", num_classes=6, preprocessing=preprocessing.to_dict()))
    teacher = load_teacher(f"run:{tmp_path}")
    assert (teacher.preprocessing, teacher.num_classes) == (preprocessing, 6)
    assert teacher.sha256 == weights_sha256(model)


# ---- factories of all kinds ----


class Answer(nn.Module):
    """Gives what `make` makes of the logits of a linear layer on the mean colour."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x.mean(dim=(2, 3))))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(make: Any, **attributes: Any) -> str:
        module = ModuleType("factories_of_a_test")

        def build() -> nn.Module:
            torch.manual_seed(0)
            model = Answer(make)
            for name, value in attributes.items():
                setattr(model, name, value)
            return model

        module.build = build
        monkeypatch.setitem(sys.modules, "factories_of_a_test", module)
        return "python:factories_of_a_test:build"

    return install


@pytest.mark.parametrize(
    "make",
    [lambda z: z, lambda z: {"logits": z}, Output, lambda z: torch.log_softmax(z, 1), lambda z: z.half()],
    ids=["tensor", "dict", "object", "log-probabilities", "half"],
)
def test_outputs_that_hold_logits(factory: Any, make: Any) -> None:
    for size in ("", "?crop=16"):
        teacher = load_teacher(factory(make) + size)
        assert teacher.num_classes == 4
        assert teacher.logits(Inputs.single(random_images(3, 16, 16))).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda z: (z, z), "found tuple"),
        (lambda z: {"score": z}, "found dict"),
        (lambda z: z[:, :, None], r"found torch\.float32 \(1, 4, 1\)"),
        (lambda z: z.argmax(1, keepdim=True), r"found torch\.int64"),
        (lambda z: z.softmax(1), "found probabilities"),
    ],
)
def test_outputs_that_are_no_logits(factory: Any, make: Any, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load_teacher(factory(make) + "?crop=16")


def test_a_class_count_that_does_not_hold(factory: Any) -> None:
    with pytest.raises(TeacherError, match=r"\(2, 7\).*found \(2, 4\)"):
        load_teacher(factory(lambda z: z) + "?crop=16", num_classes=7)
    teacher = load_teacher(factory(lambda z: z, num_classes=9))
    with pytest.raises(TeacherError, match=r"\(3, 9\).*found \(3, 4\)"):
        teacher.logits(Inputs.single(random_images(3)))


def test_a_network_that_wants_another_size(tmp_path: Path) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    module = ModuleType("flat_factory_of_a_test")
    module.build = lambda: linear
    sys.modules["flat_factory_of_a_test"] = module
    try:
        with pytest.raises(TeacherError, match=r"fails on samples of 32 x 32 pixels.*resize="):
            load_teacher("python:flat_factory_of_a_test:build?crop=32")
        assert load_teacher("python:flat_factory_of_a_test:build?crop=16").num_classes == 4
    finally:
        del sys.modules["flat_factory_of_a_test"]


def test_a_factory_may_bring_its_preprocessing(factory: Any) -> None:
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resize=20, crop=18)
    for given in (preprocessing, preprocessing.to_dict()):
        assert load_teacher(factory(lambda z: z, preprocessing=given)).preprocessing == preprocessing
    teacher = load_teacher(factory(lambda z: z, preprocessing=preprocessing) + "?std=1,1,1")
    assert teacher.preprocessing == Preprocessing(mean=(0.5,) * 3, std=(1.0,) * 3, resize=20, crop=18)


def test_nan_is_passed_on_for_the_engine_to_name_the_image(factory: Any) -> None:
    teacher = load_teacher(factory(lambda z: z * float("nan")))
    assert teacher.logits(Inputs.single(random_images(2))).isnan().all()


def test_an_unknown_precision(weights: str) -> None:
    with pytest.raises(SpecError, match="fp32, bf16, fp16; found 'fp8'"):
        load_teacher(weights, precision="fp8")  # type: ignore[arg-type]


def test_batch_norms_as_arithmetic_give_the_same_logits() -> None:
    """What stacked members run on CUDA, where `torch.vmap` has no rule for a batch norm."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3),
        torch.nn.BatchNorm2d(5),
        torch.nn.Conv2d(5, 4, 3),
        torch.nn.BatchNorm2d(4, affine=False),
    ).double()
    for _ in range(3):
        model(torch.randn(8, 3, 9, 9, dtype=torch.float64))
    model.eval()
    images_BCHW = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected, state = model(images_BCHW), model.state_dict()
    replace_norms(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(model(images_BCHW), expected, rtol=1e-12, atol=1e-12)
