"""Teachers: a network with weights, the preprocessing that belongs to it, and a precision.

Legend: B batch, C classes, H and W height and width. Images are uint8 RGB until `normalize`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softlabel.common.device import out_of_memory
from softlabel.common.spec import Spec, literal, parse_spec
from softlabel.errors import SpecError, TeacherError, one_line
from softlabel.inputs.base import Inputs, InputTransform
from softlabel.inputs.image_transform import Preprocessing
from softlabel.models import (
    Program,
    build_network,
    class_names_of,
    logits_of,
    own_preprocessing,
    refuse_other_heads,
    refuse_precision,
    refuse_random,
    weights_sha256,
)
from softlabel.models.precision import PRECISIONS, Precision, computing, ieee_float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A network that labels. `sha256` is that of its weights (`models.weights_sha256`), or of a `Program`'s files;
    `class_names` are its own, where it has some."""

    spec: Spec
    model: nn.Module
    preprocessing: InputTransform
    num_classes: int
    precision: Precision
    device: torch.device
    sha256: str
    class_names: tuple[str, ...] | None = None

    def logits(self, inputs: Inputs) -> Tensor:
        """The network's answer to a batch that `preprocessing` has collated.

        Args:
            inputs: B samples, on any device.

        Returns:
            float32 (B, C) on the teacher's device. Not checked for NaN: the engine does that, which knows the keys.

        Raises:
            TeacherError: the network gives something else, or somebody has set it to training mode.
        """
        # A frozen TorchScript program has no mode any more.
        if any(getattr(module, "training", False) for module in self.model.modules()):
            raise TeacherError(
                f"{self.spec.text}: expected a network in evaluation mode, found one in training mode: its batch norm "
                "would label by the rest of the batch; call model.eval()"
            )
        with torch.inference_mode():
            finished = self.preprocessing.finish(inputs.to(self.device))
            with computing(self.precision, self.device):
                try:
                    output = finished.call(self.model)
                except Exception as error:  # somebody's network: what it raises is a fact about this teacher
                    if out_of_memory(error):  # or about the batch: a smaller one may fit
                        raise
                    raise self._failed(inputs, error) from error
            logits_BC = logits_of(self.spec.text, output)
            expected = (len(inputs), self.num_classes)
            if tuple(logits_BC.shape) != expected:
                raise TeacherError(
                    f"{self.spec.text}: expected logits of shape {expected} (batch, classes), "
                    f"found {tuple(logits_BC.shape)}"
                )
            if not self.preprocessing.fixes_size:  # no sample could be tried while it was loaded
                _refuse_probabilities(self.spec.text, logits_BC)
            return logits_BC.float()

    def _failed(self, inputs: Inputs, error: Exception) -> TeacherError:
        size = " and ".join(map(self.preprocessing.describe, inputs.shapes))
        return TeacherError(
            f"{self.spec.text}: the network fails on samples of {size}: {type(error).__name__}: {one_line(error)}; "
            f"{self.preprocessing.remedy.format(network='teacher')}"
        )


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
    refuse_random(spec)
    network = build_network(spec, num_classes=num_classes)
    spec, model = network.spec, network.model.eval()
    for parameter in model.parameters():  # a TorchScript program has no requires_grad_ of its own
        parameter.requires_grad_(False)
    refuse_other_heads(spec, model)
    refuse_precision(spec, model, precision)
    preprocessing = _preprocessing(spec, model)
    sha256 = model.sha256 if isinstance(model, Program) else weights_sha256(model)
    device = torch.device(device)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    classes = num_classes if num_classes is not None else _count_classes(spec_text, model, preprocessing, device)
    if classes < 2:
        raise TeacherError(
            f"{spec_text}: expected logits of at least 2 classes, found a network with one output: its softmax is 1 "
            "for every image; return two logits, such as (0, z) for the logit z of a sigmoid"
        )
    teacher = Teacher(
        spec=spec,
        model=model,
        preprocessing=preprocessing,
        num_classes=classes,
        precision=precision,
        device=device,
        sha256=sha256,
        class_names=class_names_of(network.model),
    )
    if (example := preprocessing.example(2)) is not None:
        _refuse_probabilities(spec_text, teacher.logits(example))
    return teacher


def _count_classes(spec: str, model: nn.Module, preprocessing: Preprocessing, device: torch.device) -> int:
    """How many classes the network has: what it gives for one sample, or else its last linear layer."""
    if (example := preprocessing.example(1)) is not None:
        with torch.inference_mode(), ieee_float32():
            try:
                output = preprocessing.finish(example.to(device)).call(model)
            except Exception as error:
                size = " and ".join(map(preprocessing.describe, example.shapes))
                raise TeacherError(
                    f"{spec}: the network fails on a sample of {size}: {error}; "
                    f"{preprocessing.remedy.format(network='teacher')}"
                ) from error
        return logits_of(spec, output).shape[1]
    if isinstance(declared := getattr(model, "num_classes", None), int):
        return declared
    linear = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise TeacherError(f"{spec}: cannot tell its class count; give num_classes= in the SPEC, or crop=")
    return linear[-1]


def _refuse_probabilities(spec: str, logits_BC: Tensor) -> None:
    """A network that ends in a softmax would be softened a second time, and flattened."""
    if (
        logits_BC.shape[1] > 1
        and bool((logits_BC >= 0).all())
        and any(bool(((logits_BC.sum(dim=1) / total - 1).abs() < 1e-2).all()) for total in (1, 100))
    ):
        total = "1" if float(logits_BC[0].sum()) < 10 else "100"
        raise TeacherError(
            f"{spec}: expected logits, found probabilities (not negative, every row sums to {total}); return "
            "what goes into the softmax, or its logarithm"
        )


# ---- preprocessing of a SPEC ----


def student_preprocessing(spec: Spec | str, model: nn.Module | None = None) -> Preprocessing:
    """The preprocessing that a SPEC stands for: its options over its kind's defaults.

    zoo: resize and crop to 32. torchvision: what `weights=` asks for, or else 256, 224. run: what it was trained
    with. timm, hf: what their own evaluation does. A .pt2 or .onnx file: what its metadata say, or else the size that
    it takes, and mean and std must be given. python: the `preprocessing` of `model` where it has one (a
    `Preprocessing` or its dict), or else no change of size.
    Mean and std are ImageNet's where nothing else says otherwise. `resize` or `crop` given alone sets both.

    Raises:
        SpecError: options that make no sense.
    """
    return _preprocessing(parse_spec(spec) if isinstance(spec, str) else spec, model)


def _preprocessing(spec: Spec, model: nn.Module | None) -> Preprocessing:
    fields = own_preprocessing(spec, model).to_dict()
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
        elif name == "squash":
            if not isinstance(literal(text), bool):
                raise SpecError(f"{spec.text}: squash: expected true or false, found {text!r}")
            fields[name] = literal(text)
    try:
        return Preprocessing.from_dict(fields)
    except SpecError as error:
        raise SpecError(f"{spec.text}: {error}") from error


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
