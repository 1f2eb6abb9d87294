"""What callers hand to a loss, brought to rows: array-likes to tensors, (B, L, C) to (B * L, C), and all of it checked.

N rows, C classes, B sequences of L positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.loss.rows import Settings
from softlabel.loss.targets import Target, as_target, flatten_target

__all__ = [
    "GREATEST_TEMPERATURE",
    "REDUCTIONS",
    "ArrayLike",
    "LossInputs",
    "as_tensor",
    "check_choice",
    "check_labels",
    "check_logits",
    "check_number",
    "check_temperature",
    "check_weight",
    "loss_inputs",
    "make_settings",
    "may_look",
    "transforming",
    "widened",
]


class Array(Protocol):
    """What numpy and its like can read."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any: ...


ArrayLike = Tensor | Array | Sequence[Any]

# The divergence falls with the square of the temperature and is multiplied by it again: of a sum that float32 rounds at
# 1e-7, a hundredth is left at a temperature of 300. float64 carries it this far.
FLOAT32_TEMPERATURE = 50.0
GREATEST_TEMPERATURE = 1e5
TAILS = ("ghost", "uniform", "renormalize")
REDUCTIONS = ("mean", "sum", "none")
_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Rows: target of N rows, labels int64 (N,), weight (N,), soft_mask bool (N,); `shape` is that of the rows as they
    were given, (N,) or (B, L)."""

    target: Target
    labels: Tensor | None
    weight: Tensor | None
    soft_mask: Tensor | None
    shape: torch.Size


def loss_inputs(
    target: Target | ArrayLike,
    labels: ArrayLike | None,
    weight: ArrayLike | None,
    soft_mask: ArrayLike | None,
    *,
    shape: torch.Size,
    classes: int,
    device: torch.device,
    ignore_index: int,
) -> LossInputs:
    """What belongs to student logits (*shape, classes) on `device`, checked.

    Raises:
        MismatchError: what does not fit together.
        UsageError: a weight or a label that makes no sense.
    """
    if not isinstance(target, Target):
        target = as_tensor("target", target, device)
        if target.dim() == len(shape) + 1 and target.dim() > 2 and target.shape[:-1] != shape:
            raise MismatchError(
                f"target: expected shape {(*shape, classes)} as the student's logits, found {tuple(target.shape)}"
            )
    target = flatten_target(as_target(target), shape)
    if target.num_classes != classes:
        raise MismatchError(
            f"student logits: expected {target.num_classes} classes as in the target, found {classes}; "
            f"give the student {target.num_classes} outputs"
        )
    rows = shape.numel()
    if len(target) != rows:
        raise MismatchError(f"target: expected {rows} rows as in the student's logits, found {len(target)}")
    each: dict[str, Tensor | None] = {}
    for name, given in (("labels", labels), ("weight", weight), ("soft_mask", soft_mask)):
        tensor = None if given is None else as_tensor(name, given, device)
        if tensor is not None and tensor.shape != shape:
            raise MismatchError(f"{name}: expected shape {tuple(shape)}, one value a row, found {tuple(tensor.shape)}")
        each[name] = tensor if tensor is None or len(shape) == 1 else tensor.reshape(-1)
    if each["labels"] is not None:
        check_labels(each["labels"], classes, ignore_index, shape)
        each["labels"] = each["labels"].long()  # small types cannot hold every ignore_index
    if each["weight"] is not None:
        check_weight(each["weight"], shape)
    mask = each["soft_mask"]
    if mask is not None and mask.dtype != torch.bool:
        raise MismatchError(f"soft_mask: expected bool, found {mask.dtype}")
    return LossInputs(
        target=target,
        labels=each["labels"],
        weight=each["weight"],
        soft_mask=mask,
        shape=shape,
    )


def check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
        found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise MismatchError(f"student logits: expected a floating-point tensor (N, C) or (B, L, C), found {found}")


def as_tensor(name: str, given: Any, device: torch.device) -> Tensor:
    """A tensor stays where it is; anything else becomes one on the device of the logits."""
    if isinstance(given, Tensor):
        return given
    if not hasattr(given, "__array__") and not isinstance(given, list | tuple):
        raise MismatchError(f"{name}: expected a tensor, an array or a list, found {type(given).__name__}")
    try:
        return torch.tensor(given, device=device)  # a copy: memory maps must not be written to
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise MismatchError(f"{name}: expected a tensor, an array or a list of numbers: {reason}") from None


def transforming() -> bool:
    """Whether `torch.func` (grad, vjp, jvp, vmap) is at work, whose tensors have no numbers to look at."""
    return torch._C._are_functorch_transforms_active()


def may_look(tensor: Tensor) -> bool:
    # On a device looking would wait for all of its work; a compiler's and a transform's tensors have no numbers.
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not transforming()


def check_labels(labels_N: Tensor, classes: int, ignore_index: int, shape: torch.Size | None = None) -> None:
    """Raises MismatchError for other than integers; UsageError, on the CPU, naming a row whose label is no class."""
    if labels_N.dtype not in _LABEL_DTYPES:
        raise MismatchError(f"labels: expected int64 class numbers, found {labels_N.dtype}")
    if not may_look(labels_N) or not labels_N.numel():
        return
    least, most = labels_N.aminmax()
    if int(least) >= 0 and int(most) < classes:
        return
    wrong_N = ((labels_N < 0) | (labels_N >= classes)) & (labels_N != ignore_index)
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0, 0])
        raise UsageError(
            f"labels: expected a class from 0 to {classes - 1}, or {ignore_index} for none, found {int(labels_N[row])} "
            f"in row {_place(row, shape)}"
        )


def check_weight(weight_N: Tensor, shape: torch.Size | None = None) -> None:
    """Raises UsageError, on the CPU, naming a row whose weight is negative, infinite or NaN."""
    if not may_look(weight_N) or not weight_N.numel() or weight_N.dtype == torch.bool:
        return
    least, most = weight_N.detach().aminmax()
    if float(least) >= 0 and float(most) < math.inf:
        return
    row = int((~((weight_N >= 0) & (weight_N < math.inf))).nonzero()[0, 0])
    raise UsageError(
        f"weight: expected numbers of at least 0, found {float(weight_N[row]):g} in row {_place(row, shape)}"
    )


def _place(row: int, shape: torch.Size | None) -> str:
    if shape is None or len(shape) < 2:
        return str(row)
    return str(tuple(int(number) for number in torch.unravel_index(torch.tensor(row), shape)))


def make_settings(
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float,
    ignore_index: int,
    tail: str,
) -> Settings:
    """The numbers of a loss, checked; `factor`, which depends on the target, is 1 still."""
    check_temperature(temperature)
    check_number("soft_weight", soft_weight)
    check_number("hard_weight", hard_weight)
    if not 0 <= label_smoothing <= 1:
        raise UsageError(f"label_smoothing: expected a number from 0 to 1, found {label_smoothing}")
    check_choice("tail", tail, TAILS)
    return Settings(
        temperature=float(temperature),
        soft_weight=float(soft_weight),
        hard_weight=float(hard_weight),
        label_smoothing=float(label_smoothing),
        ignore_index=ignore_index,
        tail=tail,
        factor=1.0,
    )


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{name}: expected one of {', '.join(known)}, found {value!r}")


def check_number(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UsageError(f"{name}: expected a number of at least 0, found {value}")


def check_temperature(temperature: float) -> None:
    """Raises UsageError for what is no temperature, and above `GREATEST_TEMPERATURE`, where rounding hides the loss."""
    if not 0 < temperature <= GREATEST_TEMPERATURE:
        remedy = "; mse_logits / 2 is what the loss becomes beyond it" if temperature > GREATEST_TEMPERATURE else ""
        raise UsageError(
            f"temperature: expected a number above 0, at most {GREATEST_TEMPERATURE:g}, found {temperature}{remedy}"
        )


def widened(logits_NC: Tensor, temperature: float) -> Tensor:
    """float64 logits where float32 would lose the loss in rounding; autograd takes the gradient back."""
    return logits_NC.double() if temperature > FLOAT32_TEMPERATURE else logits_NC
