"""Teachers: a network with weights, the preprocessing that belongs to it, and a precision.

Legend: B batch, C classes, H and W height and width. Images are uint8 RGB until `normalize`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from softlabel.errors import BadImageError, SpecError, TeacherError
from softlabel.models import Spec, build_model, parse_spec, read_run, torchvision_weights, weights_sha256
from softlabel.spec import literal

__all__ = [
    "PRECISIONS",
    "Precision",
    "Preprocessing",
    "Teacher",
    "load_teacher",
    "student_preprocessing",
]

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# Where PIL itself begins to speak of a decompression bomb: a 20000 x 2 image resized to 224 would take 1.5 GB.
_MOST_PIXELS = 2**30 // 4 // 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How an image of any size becomes a network's input.

    Attributes:
        mean, std: of the three channels, for values in [0, 1].
        resize: length of the shorter side after resizing; None leaves the size.
        crop: side of the square cut from the middle; None leaves the size.
        interpolation: nearest, nearest-exact, bilinear or bicubic (the last two with antialiasing).
    """

    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise SpecError(f"mean and std: expected three numbers each, found {self.mean} and {self.std}")
        if not all(map(math.isfinite, self.mean)) or not all(math.isfinite(s) and s > 0 for s in self.std):
            raise SpecError(f"mean and std: expected finite numbers, std above 0, found {self.mean} and {self.std}")
        if self.interpolation not in _INTERPOLATIONS:
            raise SpecError(f"interpolation: expected {', '.join(_INTERPOLATIONS)}; found {self.interpolation!r}")
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and size < 1:
                raise SpecError(f"{name}: expected a number of pixels of at least 1, or none; found {size}")
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise SpecError(f"crop={self.crop} does not fit into resize={self.resize}; make resize at least as large")

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it; `from_dict` is the inverse."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
            "crop": self.crop,
            "interpolation": self.interpolation,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Preprocessing":
        """Raises SpecError where a field is missing or of another kind."""
        try:
            return cls(
                mean=tuple(float(x) for x in found["mean"]),
                std=tuple(float(x) for x in found["std"]),
                resize=None if found["resize"] is None else int(found["resize"]),
                crop=None if found["crop"] is None else int(found["crop"]),
                interpolation=str(found["interpolation"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(
                f"preprocessing: expected mean, std, resize, crop, interpolation; found {error!r}"
            ) from error

    @property
    def fixes_size(self) -> bool:
        """True where images of every size come out with the same one."""
        return self.crop is not None

    def geometry(self, image_CHW: Tensor) -> Tensor:
        """Resize the shorter side (antialiased), then cut the middle: uint8 (3, H, W) to uint8.

        An image that has the size already is returned as it is.

        Raises:
            BadImageError: an image too small for the crop, or so thin that resizing it would fill the memory.
        """
        height, width = image_CHW.shape[-2:]
        short, long = min(height, width), max(height, width)
        if self.resize is not None and short != self.resize:
            if self.resize * int(self.resize * long / short) > _MOST_PIXELS:
                raise BadImageError(
                    f"{width} x {height} pixels: too thin, resizing its shorter side to {self.resize} would make "
                    f"the longer one {int(self.resize * long / short)}"
                )
            mode = InterpolationMode(self.interpolation)
            image_CHW = transforms.resize(image_CHW, [self.resize], interpolation=mode, antialias=True)
            height, width = image_CHW.shape[-2:]
        if self.crop is not None and (height, width) != (self.crop, self.crop):
            if min(height, width) < self.crop:
                raise BadImageError(
                    f"{width} x {height} pixels: smaller than crop={self.crop}; give resize={self.crop} as well"
                )
            image_CHW = transforms.center_crop(image_CHW, [self.crop, self.crop])
        return image_CHW

    def normalize(self, images_BCHW: Tensor) -> Tensor:
        """``(x / 255 - mean) / std``: uint8 (B, 3, H, W) to float32 of the same shape, device and memory layout."""
        mean_C11, std_C11 = _constants(self.mean, self.std, images_BCHW.device)
        return images_BCHW.to(torch.float32).div_(255).sub_(mean_C11).div_(std_C11)


@lru_cache(maxsize=64)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std on the device: copying them there for every batch would make the host wait for it."""
    with torch.inference_mode(False):
        return (
            torch.tensor(mean, dtype=torch.float32, device=device)[:, None, None],
            torch.tensor(std, dtype=torch.float32, device=device)[:, None, None],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A network that labels. `sha256` is that of its weights (`models.weights_sha256`)."""

    spec: Spec
    model: nn.Module
    preprocessing: Preprocessing
    num_classes: int
    precision: Precision
    device: torch.device
    sha256: str

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """The network's answer to a batch that has been through `preprocessing.geometry`.

        Args:
            images_BCHW: uint8 (B, 3, H, W), on any device.

        Returns:
            float32 (B, C) on the teacher's device. Not checked for NaN: the engine does that, which knows the keys.

        Raises:
            TeacherError: the network gives something else, or somebody has set it to training mode.
        """
        assert images_BCHW.dtype == torch.uint8, images_BCHW.dtype
        assert images_BCHW.dim() == 4, images_BCHW.shape
        if any(module.training for module in self.model.modules()):
            raise TeacherError(
                f"{self.spec.text}: expected a network in evaluation mode, found one in training mode: its batch norm "
                "would label by the rest of the batch; call model.eval()"
            )
        with torch.inference_mode():
            images_BCHW = images_BCHW.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            inputs_BCHW = self.preprocessing.normalize(images_BCHW)
            dtype = PRECISIONS[self.precision]
            lower = dtype != torch.float32
            with _true_float32(not lower), torch.autocast(self.device.type, dtype=dtype, enabled=lower):
                try:
                    output = self.model(inputs_BCHW)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # somebody's network: what it raises is a fact about this teacher
                    size = f"{images_BCHW.shape[3]} x {images_BCHW.shape[2]}"
                    raise TeacherError(
                        f"{self.spec.text}: the network fails on images of {size}: {type(error).__name__}: {error}; "
                        "give the size that it needs with resize= and crop="
                    ) from error
            logits_BC = _logits_of(self.spec.text, output)
            expected = (len(images_BCHW), self.num_classes)
            if tuple(logits_BC.shape) != expected:
                raise TeacherError(
                    f"{self.spec.text}: expected logits of shape {expected} (batch, classes), "
                    f"found {tuple(logits_BC.shape)}"
                )
            return logits_BC.float()


@contextmanager
def _true_float32(wanted: bool) -> Iterator[None]:
    """fp32 means it: cuDNN's convolutions would otherwise round their inputs to TF32's 10 bits on newer GPUs."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and not wanted
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _logits_of(spec: str, output: object) -> Tensor:
    """The tensor of logits in what a network returns: itself, or its `logits`, as Hugging Face models have it."""
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TeacherError(
            f"{spec}: expected a tensor of logits (batch, classes), found {type(output).__name__}; wrap the "
            "network in one that returns its logits alone"
        )
    if output.dim() != 2 or not output.is_floating_point():
        raise TeacherError(
            f"{spec}: expected float logits of shape (batch, classes), found {output.dtype} {tuple(output.shape)}"
        )
    return output


def load_teacher(
    spec_text: str,
    *,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    num_classes: int | None = None,
) -> Teacher:
    """Build a teacher from its SPEC, in evaluation mode, and try it on one grey image where its input size is known.

    Raises:
        SpecError: a SPEC that cannot be understood, a file that is not there, or a teacher without weights.
        TeacherError: weights that cannot be read safely, or a network that does not give logits.
    """
    spec = parse_spec(spec_text)
    if precision not in PRECISIONS:
        raise SpecError(f"precision: expected {', '.join(PRECISIONS)}; found {precision!r}")
    # A python: factory may load its own weights, a run: has them; the others would label with random numbers.
    if spec.kind in ("zoo", "torchvision") and not spec.checkpoint and torchvision_weights(spec) is None:
        named = ", or ask for torchvision's with ?weights=DEFAULT (a download)" if spec.kind == "torchvision" else ""
        raise SpecError(
            f"{spec_text}: expected weights, found none: a teacher with random weights labels nothing. "
            f"Give a checkpoint, {spec.kind}:{spec.name}@FILE{named}"
        )
    model = build_model(spec, num_classes=num_classes).eval().requires_grad_(False)
    preprocessing = _preprocessing(spec, model)
    sha256 = weights_sha256(model)
    device = torch.device(device)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    classes = num_classes if num_classes is not None else _count_classes(spec_text, model, preprocessing, device)
    teacher = Teacher(
        spec=spec,
        model=model,
        preprocessing=preprocessing,
        num_classes=classes,
        precision=precision,
        device=device,
        sha256=sha256,
    )
    side = preprocessing.crop
    if side is not None:
        _refuse_probabilities(teacher, side)
    return teacher


def _count_classes(spec: str, model: nn.Module, preprocessing: Preprocessing, device: torch.device) -> int:
    """How many classes the network has: what it gives for one image, or else its last linear layer."""
    if preprocessing.crop is not None:
        side = preprocessing.crop
        grey_BCHW = torch.full((1, 3, side, side), 128, dtype=torch.uint8, device=device)
        with torch.inference_mode():
            try:
                output = model(preprocessing.normalize(grey_BCHW))
            except Exception as error:
                raise TeacherError(
                    f"{spec}: the network fails on a {side} x {side} image: {error}; give the size that it needs with "
                    "resize= and crop="
                ) from error
        return _logits_of(spec, output).shape[1]
    if isinstance(declared := getattr(model, "num_classes", None), int):
        return declared
    linear = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise TeacherError(f"{spec}: cannot tell its class count; give num_classes= in the SPEC, or crop=")
    return linear[-1]


def _refuse_probabilities(teacher: Teacher, side: int) -> None:
    """A network that ends in a softmax would be softened a second time, and flattened."""
    images_BCHW = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    images_BCHW[1, :, : side // 2] = 255
    logits_BC = teacher.logits(images_BCHW)
    if (
        teacher.num_classes > 1
        and bool((logits_BC >= 0).all())
        and bool(((logits_BC.sum(dim=1) - 1).abs() < 1e-2).all())
    ):
        raise TeacherError(
            f"{teacher.spec.text}: expected logits, found probabilities (not negative, every row sums to 1); return "
            "what goes into the softmax, or its logarithm"
        )


# ---- preprocessing of a SPEC ----


def student_preprocessing(spec: Spec | str, model: nn.Module | None = None) -> Preprocessing:
    """The preprocessing that a SPEC stands for: its options over its kind's defaults.

    zoo: resize and crop to 32. torchvision: what `weights=` asks for, or else 256, 224. run: what it was trained
    with. python: the `preprocessing` of `model` where it has one (a `Preprocessing` or its dict), or else no change
    of size.
    Mean and std are ImageNet's where nothing else says otherwise. `resize` or `crop` given alone sets both.

    Raises:
        SpecError: options that make no sense.
    """
    return _preprocessing(parse_spec(spec) if isinstance(spec, str) else spec, model)


def _preprocessing(spec: Spec, model: nn.Module | None) -> Preprocessing:
    fields = _defaults(spec, model).to_dict()
    sizes = {"resize", "crop"} & set(spec.options)
    for name, text in spec.options.items():
        if name in ("mean", "std"):
            fields[name] = _three_numbers(spec, name, text)
        elif name in ("resize", "crop"):
            value = literal(text)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise SpecError(f"{spec.text}: {name}: expected a whole number of pixels or none, found {text!r}")
            fields |= {name: value} if len(sizes) == 2 else {"resize": value, "crop": value}
        elif name == "interpolation":
            fields[name] = text
    try:
        return Preprocessing.from_dict(fields)
    except SpecError as error:
        raise SpecError(f"{spec.text}: {error}") from error


def _defaults(spec: Spec, model: nn.Module | None) -> Preprocessing:
    if spec.kind == "zoo":
        return Preprocessing(resize=32, crop=32)
    if spec.kind == "run":
        return Preprocessing.from_dict(read_run(spec.name).preprocessing)
    if spec.kind == "python":
        found = getattr(model, "preprocessing", None)
        if isinstance(found, Preprocessing):
            return found
        return Preprocessing.from_dict(found) if isinstance(found, Mapping) else Preprocessing()
    weights = torchvision_weights(spec)
    if weights is None:
        return Preprocessing(resize=256, crop=224)
    preset = weights.transforms()
    return Preprocessing(
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
    )


def _three_numbers(spec: Spec, name: str, text: str) -> list[float]:
    try:
        numbers = [float(x) for x in text.strip("[]()").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise SpecError(f"{spec.text}: {name}: expected three numbers like 0.485,0.456,0.406; found {text!r}")
    return numbers
