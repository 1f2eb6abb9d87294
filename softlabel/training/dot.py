"""DOT (Zhao et al. 2023, "DOT: A Distillation-Oriented Trainer"): SGD with a momentum for each of two gradients, that
of the hard term and that of all others.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

DELTA = 0.075  # of the reference code for CIFAR-100


class Dot(torch.optim.Optimizer):
    """v_hard = (m - delta) v_hard + g_hard + decay w, v_soft = (m + delta) v_soft + g_soft, w -= lr (v_hard + v_soft).

    A step takes the gradient of the whole loss from the parameters, as others do; the hard term's share of it comes
    from `add_hard` before.

    Args:
        parameters: that it changes.
        lr: the learning rate.
        momentum: m.
        weight_decay: the decay.
        delta: by how much the momentum of the soft terms is above m, and that of the hard term below it.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        delta: float = DELTA,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "delta": delta})
        self._hard: list[Tensor] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that it changes."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def hard(self) -> Sequence[Tensor]:
        """The hard term's gradients of this step, in the order of `parameters`; they may be changed in place."""
        if self._hard is None:
            self._hard = [torch.zeros_like(parameter) for parameter in self.parameters]
        return self._hard

    def add_hard(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the hard term's gradients of a part of a batch, in the order of `parameters`."""
        for total, gradient in zip(self.hard, gradients, strict=True):
            if gradient is not None:
                total += gradient

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        of = {id(parameter): gradient for parameter, gradient in zip(self.parameters, self.hard, strict=True)}
        for group in self.param_groups:
            momentum, delta = group["momentum"], group["delta"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                hard, state = of[id(parameter)], self.state[parameter]
                for name, gradient, factor in (
                    ("hard_momentum", hard + group["weight_decay"] * parameter, momentum - delta),
                    ("soft_momentum", parameter.grad - hard, momentum + delta),
                ):
                    state[name] = gradient if name not in state else state[name].mul_(factor).add_(gradient)
                parameter -= group["lr"] * (state["hard_momentum"] + state["soft_momentum"])
        self._hard = None
