"""An exponential moving average of a student's weights, which is often better than the weights themselves."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """The moving average of a model: parameters and floating-point buffers, such as those of a batch norm.

    The decay of the n-th update is min(decay, (1 + n) / (10 + n)), so that a short run is not an average of noise.

    Args:
        model: whose weights are averaged; on its device already.
        decay: how much of the average stays at an update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After a step of the optimiser."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, theirs = self.model.state_dict(), model.state_dict()
        # By parameter: one that has two names, as tied embeddings have, is averaged once.
        own = {id(value): name for name, value in self.model.state_dict(keep_vars=True).items()}.values()
        floating = [name for name in own if mine[name].is_floating_point()]
        averages: list[Tensor] = [mine[name] for name in floating]
        torch._foreach_lerp_(averages, [theirs[name] for name in floating], 1 - decay)
        for name in set(own) - set(floating):
            mine[name].copy_(theirs[name])

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
