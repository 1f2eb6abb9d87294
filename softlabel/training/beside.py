"""What is trained beside a student for a loss on its embedding: projectors, and what contrasts have to remember.

A student stays a plain network. `Watched` runs it, takes its embedding on the way, and hands that to a `Beside`, whose
weights are part of the checkpoint, and of a file of their own beside the finished student's.

Legend: B batch, C classes, D width of the teacher's embedding, E of contrasted ones, K width of the student's, N
samples, S numbers of a map.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softlabel.training.embedding_losses import ProjectorName

CONTRAST_WIDTH, MOMENTUM, TEMPERATURE = 128, 0.5, 0.07  # of CRD, as published

Outputs = tuple[Tensor, ...]


class Beside(nn.Module):
    """What a loss compares with the teacher's embedding: the student's own, unless a subclass says otherwise."""

    def forward(self, taken_BK: Tensor, teacher_BD: Tensor | None) -> Outputs:
        """What is compared, float32, of what was taken from the student; `teacher_BD` where it is projected too."""
        return (taken_BK,)

    def answer(self, logits_BC: Any, outputs: Outputs) -> Any:
        """The logits of the student."""
        return logits_BC

    def finish_step(self, model: nn.Module) -> None:
        """What comes after a step of the optimiser."""


class Projected(Beside):
    """A student's embedding brought to the teacher's width."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, taken_BK: Tensor, teacher_BD: Tensor | None) -> Outputs:
        return (self.projector(taken_BK),)


class ReusedHead(Projected):
    """A student that answers by the teacher's last layer (Chen et al. 2022, SimKD).

    Its own last layer is not trained: after each step it is made the product of the teacher's and the projector,
    W_t (P h + p) + b_t = (W_t P) h + (W_t p + b_t), by which the student is a plain network.

    Args:
        projector: linear.
        layer: the student's last one, K to C.
        weight, bias: the teacher's, (C, D) and (C,).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, projector: nn.Linear, layer: str, weight: Tensor, bias: Tensor) -> None:
        super().__init__(projector)
        self._layer = layer
        # Of the store, which has them already.
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def answer(self, logits_BC: Any, outputs: Outputs) -> Tensor:
        return F.linear(outputs[0], self.weight, self.bias)

    @torch.no_grad()
    def finish_step(self, model: nn.Module) -> None:
        layer, projector = model.get_submodule(self._layer), self.projector
        assert isinstance(layer, nn.Linear)
        assert isinstance(projector, nn.Linear)
        layer.weight.copy_(self.weight @ projector.weight)
        layer.bias.copy_(self.weight @ projector.bias + self.bias)


class Contrasted(Beside):
    """Linear embeddings of both, of norm 1, and a memory of the student's (Tian et al. 2020, CRD).

    The teacher's memory is the store: its stored vectors under the embedding as it is now, without any momentum.

    Args:
        width: K.
        teacher_width: D.
        samples: N of the source.
    """

    bank: Tensor
    scales: Tensor

    def __init__(self, width: int, teacher_width: int, samples: int) -> None:
        super().__init__()
        self.student = nn.Linear(width, CONTRAST_WIDTH)
        self.teacher = nn.Linear(teacher_width, CONTRAST_WIDTH)
        reach = (CONTRAST_WIDTH / 3) ** -0.5
        self.register_buffer("bank", torch.empty(samples, CONTRAST_WIDTH).uniform_(-reach, reach))
        # Z of both directions, found at the first step; 0: not yet.
        self.register_buffer("scales", torch.zeros(2))
        self._remembered: tuple[Tensor, Tensor] | None = None
        self._is_scaled = False

    @property
    def is_scaled(self) -> bool:
        """Whether Z is known; the device is asked until it is."""
        self._is_scaled = self._is_scaled or bool((self.scales > 0).all())
        return self._is_scaled

    def keep_scales(self, scales: Tensor) -> None:
        """Let Z of both directions be these from here on, where it is not known yet."""
        if not self._is_scaled:
            self.scales.copy_(scales)

    def forward(self, taken_BK: Tensor, teacher_BD: Tensor | None) -> Outputs:
        assert teacher_BD is not None
        return F.normalize(self.student(taken_BK), dim=1), self.embed_teacher(teacher_BD)

    def embed_teacher(self, teacher_BD: Tensor) -> Tensor:
        """(B, E), of norm 1."""
        return F.normalize(self.teacher(teacher_BD), dim=1)

    def remember(self, samples_B: Tensor, student_BE: Tensor) -> None:
        """Take these embeddings into the memory once the step is made."""
        self._remembered = samples_B, student_BE

    @torch.no_grad()
    def finish_step(self, model: nn.Module) -> None:
        if self._remembered is not None:
            samples_B, student_BE = self._remembered
            mixed_BE = self.bank[samples_B] * MOMENTUM + student_BE * (1 - MOMENTUM)
            self.bank[samples_B] = F.normalize(mixed_BE, dim=1)
            self._remembered = None


class Watched(nn.Module):
    """A student and what is trained beside it, in one call, as DistributedDataParallel wants it.

    Args:
        model: the student.
        beside: see `Beside`.
        watch: takes the student's embedding (B, K), or its maps (B, S), float32, in every pass inside the block.
    """

    def __init__(self, model: nn.Module, beside: Beside, watch: Callable[[nn.Module, list[Tensor]], Any]) -> None:
        super().__init__()
        self.model, self.beside, self._watch = model, beside, watch

    def forward(self, teacher_BD: Tensor | None, *given: Any, **named: Any) -> tuple[Any, Outputs]:
        taken: list[Tensor] = []
        with self._watch(self.model, taken):
            answer = self.model(*given, **named)
        with torch.autocast(taken[0].device.type, enabled=False):
            outputs = self.beside(torch.cat([one.float() for one in taken], dim=1), teacher_BD)
            return self.beside.answer(answer, outputs), outputs


def make_projector(kind: ProjectorName, width: int, teacher_width: int) -> nn.Module:
    """A linear layer, or two with a ReLU between them, of the teacher's width."""
    if kind == "linear":
        return nn.Linear(width, teacher_width)
    return nn.Sequential(nn.Linear(width, teacher_width), nn.ReLU(), nn.Linear(teacher_width, teacher_width))
