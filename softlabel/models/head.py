"""A teacher's last linear layer, for the encoding that stores what goes into it.

Where a network ends in logits = W h + b with a width D below the number of classes C, the D numbers of h are a smaller
and, at every temperature, exact description of the logits; W and b are stored once.

Legend: B batch, C classes, D width of the layer's input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from softlabel.errors import UsageError
from softlabel.inputs.base import Inputs
from softlabel.models import LanguageModel
from softlabel.models.taps import find_last_linear
from softlabel.models.teacher import Teacher

# How far W h + b may lie from the output, relative to the batch's largest logit: another order of sums, or the
# output's own rounding.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}


@dataclass(frozen=True, slots=True)
class Head:
    """The last linear layer of a teacher: weight (C, D) and bias (C,), both divided by the teacher's calibration.

    Of a language model without the rows that no token has, and times the scale of its logits. `softcap` is the cap on
    the logits, divided likewise.
    """

    teacher: Teacher
    layer: nn.Linear
    calibration: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, teacher: Teacher, calibration: float = 1.0) -> "Head":
        """Raises UsageError where a teacher has no linear layer that could give its logits."""
        if isinstance(teacher.model, LanguageModel):
            model, layer = teacher.model, teacher.model.last_layer
            if not isinstance(layer, nn.Linear):
                found = "logits alone" if layer is None else type(layer).__name__
                raise UsageError(
                    f"encoding head: {teacher.spec.text}: expected logits that are the answer of a linear layer, found "
                    f"{found}; use another --encoding"
                )
            softcap = None if model.softcap is None else model.softcap / calibration
            return cls(teacher=teacher, layer=layer, calibration=calibration, scale=model.logit_scale, softcap=softcap)
        _, layer = find_last_linear(teacher.model)
        if layer is None or layer.out_features != teacher.num_classes:
            found = f"one with {layer.out_features} outputs" if layer is not None else "none"
            raise UsageError(
                f"encoding head: {teacher.spec.text}: expected a last linear layer with {teacher.num_classes} outputs, "
                f"found {found}; use another --encoding"
            )
        return cls(teacher=teacher, layer=layer, calibration=calibration)

    @property
    def width(self) -> int:
        return self.layer.in_features

    @property
    def weight(self) -> Tensor:
        return self._take(self.layer.weight)

    @property
    def bias(self) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        return self._take(weight.new_zeros(len(weight)) if bias is None else bias)

    def _take(self, rows: Tensor) -> Tensor:
        return rows.detach()[: self.teacher.num_classes].float() * self.scale / self.calibration

    def safetensors(self) -> bytes:
        """The file that the store shares: `weight` (C, D) and `bias` (C,), float32, or of a language model in the half
        precision that its weights were saved in, where nothing is lost by that."""
        tensors = {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        if isinstance(self.teacher.model, LanguageModel):
            tensors = {name: _narrow(tensor) for name, tensor in tensors.items()}
        return save(tensors)

    def logits(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(logits float32 (B, C), hidden float32 (B, D)) of a batch.

        The forward pass, capturing the input of the last linear layer.

        Raises:
            UsageError: the layer ran more than once, or not on (B, D).
        """
        with self._capture_hidden() as captured:
            logits_BC = self.teacher.logits(inputs)
        if len(captured) != 1 or captured[0].shape != (len(logits_BC), self.width):
            self.refuse()
        return logits_BC, captured[0].float()

    def explains(self, logits_BC: Tensor, hidden_BD: Tensor) -> Tensor:
        """Whether W h + b is what the teacher answered: bool (1,), on the device, so that the host need not wait."""
        with torch.inference_mode():
            found_BC = F.linear(hidden_BD, self.weight, self.bias)
            if self.softcap is not None:
                found_BC = self.softcap * torch.tanh(found_BC / self.softcap)
            found_BC = found_BC * self.calibration
            off = (found_BC - logits_BC).abs().amax()
            return (off <= TOLERANCE[self.teacher.precision] * (1 + logits_BC.abs().amax())).reshape(1)

    def refuse(self) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(
            f"encoding head: {self.teacher.spec.text}: the output is not that of its last linear layer; "
            "use another --encoding"
        )

    @contextmanager
    def _capture_hidden(self) -> Iterator[list[Tensor]]:
        captured: list[Tensor] = []

        def capture(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            captured.append(inputs[0])

        handle = self.layer.register_forward_pre_hook(capture)
        try:
            yield captured
        finally:
            handle.remove()


def _narrow(tensor: Tensor) -> Tensor:
    """The same numbers in half precision, where it has them all."""
    for dtype in (torch.bfloat16, torch.float16):
        half = tensor.to(dtype)
        if torch.equal(half.float(), tensor):
            return half
    return tensor
