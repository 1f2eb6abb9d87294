"""Teachers: a network with weights, the preprocessing that belongs to it, and a precision.

Legend: B batch, C classes, H and W height and width. Images are uint8 RGB until `normalize`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from softlabel.common.activation import Activation
from softlabel.common.device import out_of_memory
from softlabel.common.spec import Spec, literal, parse_spec
from softlabel.errors import DataError, SpecError, TeacherError
from softlabel.inputs.base import Inputs, InputTransform
from softlabel.inputs.chat import ChatKind
from softlabel.inputs.image_transform import Preprocessing
from softlabel.inputs.tensor import TensorTransform
from softlabel.inputs.text import TextKind, TextTransform
from softlabel.inputs.tokens import TokenTransform
from softlabel.inputs.transforms import describe_failure, transform_of
from softlabel.models import (
    LanguageModel,
    Program,
    build_network,
    class_names_of,
    logits_of,
    own_preprocessing,
    read_run,
    refuse_other_heads,
    refuse_precision,
    refuse_random,
    weights_sha256,
)
from softlabel.models.from_vllm import VllmLanguageModel
from softlabel.models.graph import GraphNetwork
from softlabel.models.options import FEATURE_OPTIONS, PREPROCESSING_OPTIONS
from softlabel.models.precision import PRECISIONS, Precision, computing, ieee_float32

_TOKENIZED = (TextKind.name, ChatKind.name)


@dataclass(slots=True)
class _Once:
    """Whether a check was made."""

    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A network that labels; one whose embedding alone is of interest has 0 classes.

    `sha256` is that of its weights (`models.weights_sha256`), or of a `Program`'s files; `class_names` are its own,
    where it has some; `graph` computes its logits where that was found to be faster.
    """

    spec: Spec
    model: nn.Module
    preprocessing: InputTransform
    num_classes: int
    precision: Precision
    device: torch.device
    sha256: str
    class_names: tuple[str, ...] | None = None
    graph: GraphNetwork | None = None
    _checked: _Once = field(default_factory=_Once, repr=False, compare=False)  # for probabilities

    def logits(self, inputs: Inputs) -> Tensor:
        """The network's answer to a batch that `preprocessing` has collated.

        Args:
            inputs: B samples, on any device.

        Returns:
            float32 (B, C) on the teacher's device; (B, 0) of a teacher without classes. Not checked for NaN: the engine
            does that, which knows the keys.

        Raises:
            TeacherError: the network gives something else, or it was set to training mode.
        """
        with torch.inference_mode():
            answer = self._answer(inputs, self.graph or self.model)
            if self.num_classes == 0:  # whose embedding alone is taken on the way
                return torch.zeros((len(inputs), 0), device=self.device)
            logits_BC = logits_of(self.spec.text, answer)
            expected = (len(inputs), self.num_classes)
            if tuple(logits_BC.shape) != expected:
                raise TeacherError(
                    f"{self.spec.text}: expected logits of shape {expected} (batch, classes), "
                    f"found {tuple(logits_BC.shape)}"
                )
            # No sample could be tried while it was loaded. A few logits may sum to 1 by chance, those of 4 rows do not.
            # Once: it waits for the device.
            if not self.preprocessing.fixes_size and len(inputs) >= 4 and not self._checked.done:
                _refuse_probabilities(self.spec.text, logits_BC)
                self._checked.done = True
            return logits_BC.float()

    @property
    def is_engine(self) -> bool:
        """Whether it knows the most probable tokens alone, and nothing after the last token of a document."""
        return isinstance(self.model, VllmLanguageModel)

    def hidden(self, inputs: Inputs) -> Tensor:
        """What goes into the last layer of a language model, for a batch that `preprocessing` has collated and cut.

        Args:
            inputs: B documents, at the length L of a bucket, on any device.

        Returns:
            (B, L, D) on the teacher's device, in the precision of the forward pass; `position_logits` takes some of it.
        """
        with torch.inference_mode():
            hidden_BLD: Tensor = self._answer(inputs, self._call_body)
            return hidden_BLD

    def _call_body(self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
        assert isinstance(self.model, LanguageModel)
        return self.model.hidden(input_ids, attention_mask)

    def position_logits(self, hidden_PD: Tensor) -> Tensor:
        """Logits float32 (P, V) of a language model at P positions of what `hidden` gave."""
        assert isinstance(self.model, LanguageModel)
        with torch.inference_mode(), computing(self.precision, self.device):
            return self.model.logits(hidden_PD).float()

    def _answer(self, inputs: Inputs, network: Callable[..., Any]) -> Any:
        # A frozen TorchScript program has no mode any more.
        if any(getattr(module, "training", False) for module in self.model.modules()):
            raise TeacherError(
                f"{self.spec.text}: expected a network in evaluation mode, found one in training mode: its batch norm "
                "would label by the rest of the batch; call model.eval()"
            )
        finished = self.preprocessing.finish(inputs.to(self.device))
        with computing(self.precision, self.device):
            try:
                return finished.call(network)
            except DataError:  # of an engine's answers: it is one line already
                raise
            except Exception as error:  # user code: what it raises is a fact about this teacher
                if out_of_memory(error):  # or about the batch: a smaller one may fit
                    raise
                why = describe_failure(self.preprocessing, inputs, error, network="teacher")
                raise TeacherError(f"{self.spec.text}: {why}") from error


def load_teacher(
    spec_text: str,
    *,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    num_classes: int | None = None,
    kind: str = Preprocessing.kind,
    activation: Activation = "softmax",
    features: bool = False,
) -> Teacher:
    """Build a teacher from its SPEC, in evaluation mode, and try it where its input's shape is known.

    Args:
        spec_text: the SPEC.
        device: that it computes on.
        precision: of its forward pass.
        num_classes: how many it has; absent: found out; 0: its answer is no logits.
        kind: of the samples that it will label: image, tensor, text or tokens.
        activation: what its outputs are the logits of; one single output is a sigmoid's.
        features: let the SPEC say where its embedding and maps of attention are taken.

    Raises:
        SpecError: a SPEC that cannot be understood, a file that is not there, or a teacher without weights.
        TeacherError: weights that cannot be read safely, or a network that does not give logits.
    """
    spec = parse_spec(spec_text)
    if precision not in PRECISIONS:
        raise SpecError(f"precision: expected {', '.join(PRECISIONS)}; found {precision!r}")
    taken = {name: spec.options[name] for name in FEATURE_OPTIONS if features and name in spec.options}
    spec = replace(spec, options={name: text for name, text in spec.options.items() if name not in taken})
    refuse_random(spec)
    network = build_network(spec, num_classes=num_classes or None)
    spec, model = network.spec, network.model.eval()
    if isinstance(model, Program):
        model.activation = activation
    for parameter in model.parameters():  # a TorchScript program has no requires_grad_ of its own
        parameter.requires_grad_(False)
    refuse_other_heads(spec, model, activation)
    if spec.kind == "run" and (trained := read_run(spec.name).activation) != activation:
        raise SpecError(
            f"{spec_text}: expected a run with outputs of a {activation}, found one trained with a {trained}; give "
            f"--activation {trained}"
        )
    refuse_precision(spec, model, precision)
    preprocessing = student_preprocessing(spec, model, kind)
    sha256 = model.sha256 if isinstance(model, Program | VllmLanguageModel) else weights_sha256(model)
    device = torch.device(device)
    model = model.to(device, memory_format=preprocessing.memory_format)  # type: ignore[call-overload]
    classes = num_classes if num_classes is not None else _count_classes(spec_text, model, preprocessing, device)
    if classes == 1 and activation == "softmax":
        raise SpecError(
            f"{spec_text}: expected logits of at least 2 classes, found a network with one output: its softmax is 1 "
            "for every sample; give --activation sigmoid if it is the logit of one, or return two logits"
        )
    teacher = Teacher(
        spec=replace(spec, options={**spec.options, **taken}),
        model=model,
        preprocessing=preprocessing,
        num_classes=classes,
        precision=precision,
        device=device,
        sha256=sha256,
        class_names=class_names_of(network.model),
    )
    if classes and not isinstance(model, LanguageModel) and (example := preprocessing.example(2)) is not None:
        _refuse_probabilities(spec_text, teacher.logits(example))
    return teacher


def _count_classes(spec: str, model: nn.Module, preprocessing: InputTransform, device: torch.device) -> int:
    """How many classes the network has: what it gives for one sample, or else its last linear layer."""
    if isinstance(model, LanguageModel):
        return model.vocabulary.size
    if (example := preprocessing.example(1)) is not None:
        with torch.inference_mode(), ieee_float32():
            try:
                output = preprocessing.finish(example.to(device)).call(model)
            except Exception as error:
                why = describe_failure(preprocessing, example, error, network="teacher")
                raise TeacherError(f"{spec}: {why}") from error
        return logits_of(spec, output).shape[1]
    if isinstance(model, Program) and (zeros := model.example()) is not None:  # whose shape the file says
        with torch.inference_mode():
            return logits_of(spec, Inputs.of(zeros).call(model)).shape[1]
    if isinstance(declared := getattr(model, "num_classes", None), int):
        return declared
    linear = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise TeacherError(f"{spec}: its class count is not known; give num_classes= in the SPEC, or crop=")
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
            "what goes into the softmax, or its logarithm; of an .onnx file, '?probabilities=true' takes that"
        )


# ---- preprocessing of a SPEC ----


def student_preprocessing(
    spec: Spec | str, model: nn.Module | None = None, kind: str = Preprocessing.kind
) -> InputTransform:
    """The preprocessing that a SPEC stands for: its options over its kind's defaults.

    zoo: resize and crop to 32. torchvision: what `weights=` asks for, or else 256, 224. run: what it was trained with.
    timm, hf: what their own evaluation does. text, lm: its tokenizer. A .pt2 or .onnx file: what its metadata say, or
    else the size that it takes, and mean and std must be given. python: the `preprocessing` of `model` where it has one
    (an `InputTransform` or its dict), or else images of their own size, and arrays as they are.
    Mean and std of images are ImageNet's where nothing else says otherwise. `resize` or `crop` given alone sets both.

    Args:
        spec: the SPEC.
        model: the network.
        kind: of the samples: image, tensor, text or tokens.

    Raises:
        SpecError: another kind of samples, or options that make no sense.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    own = own_preprocessing(spec, model, kind)
    # Texts and chats become documents of the network's own tokens.
    takes = (own.kind, *(_TOKENIZED if isinstance(own, TokenTransform) else ()))
    if kind not in takes:
        raise SpecError(
            f"{spec.text}: takes samples of kind {own.kind}, and these are of kind {kind}; give a network of these"
        )
    fields = own.to_dict()
    given = {name: text for name, text in spec.options.items() if name in PREPROCESSING_OPTIONS}
    if isinstance(own, TensorTransform) and (odd := set(given) - {"mean", "std"}):
        raise SpecError(f"{spec.text}: {min(odd)}= is of images, and the samples are arrays of numbers; leave it out")
    if isinstance(own, TextTransform | TokenTransform):
        if given:
            raise SpecError(f"{spec.text}: {min(given)}= is of images, and the samples are texts; leave it out")
        return own
    # A single number stands for every channel: of a tensor by itself, of an image written out.
    alone = 1 if isinstance(own, TensorTransform) else int(spec.options.get("in_chans", 3))
    for name, text in given.items():
        fields |= _parse_option(spec, name, text, both={"resize", "crop"} <= set(given), alone=alone)
    try:
        found = transform_of(fields)
    except SpecError as error:
        raise SpecError(f"{spec.text}: {error}") from error
    channels = spec.options.get("in_chans")
    if isinstance(found, Preprocessing) and channels is not None and channels != str(len(found.mean)):
        raise SpecError(
            f"{spec.text}: expected mean= and std= of in_chans={channels} channels, found {len(found.mean)} numbers; "
            "give one for each channel, or one for all: ?mean=0&std=1 takes values as they are"
        )
    return found


def _parse_option(spec: Spec, name: str, text: str, *, both: bool, alone: int) -> dict[str, Any]:
    """The fields that an option of preprocessing sets."""
    if name in ("mean", "std"):
        return {name: _parse_numbers(spec, name, text, alone=alone)}
    value = text if name == "interpolation" else literal(text)
    if name in ("resize", "crop"):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise SpecError(f"{spec.text}: {name}: expected a whole number of pixels or none, found {text!r}")
        return {name: value} if both else {"resize": value, "crop": value}
    if name == "squash" and not isinstance(value, bool):
        raise SpecError(f"{spec.text}: squash: expected true or false, found {text!r}")
    return {name: value}


def _parse_numbers(spec: Spec, name: str, text: str, *, alone: int) -> list[float]:
    """One number for each channel; a number `alone` stands for so many channels, one in brackets for itself."""
    try:
        numbers = [float(x) for x in text.strip("[]()").split(",")]
    except ValueError:
        raise SpecError(
            f"{spec.text}: {name}: expected a number for each channel like 0.485,0.456,0.406; found {text!r}"
        ) from None
    return numbers * alone if len(numbers) == 1 and not text.startswith("[") else numbers
