"""The optimiser of a student, and the form of it whose step a CUDA graph can hold: its learning rate is a tensor, and
its step one kernel that needs no number from the host.
"""

from typing import Any

import torch
from torch import nn

from softlabel.training.dot import Dot
from softlabel.training.grid import StudentConfig


def build_optimizer(
    config: StudentConfig, parameters: list[nn.Parameter], *, capturable: bool = False
) -> torch.optim.Optimizer:
    """The optimiser that the settings name, without a state.

    Args:
        config: of the student.
        parameters: that it changes.
        capturable: in the form of which a CUDA graph can hold a step.
    """
    if config.optimizer == "dot":
        return Dot(parameters, lr=config.lr, momentum=config.shared.momentum, weight_decay=config.weight_decay)
    form: dict[str, Any] = {"lr": config.lr}
    if capturable:
        form = {"lr": torch.tensor(config.lr, device=parameters[0].device), "fused": True}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=config.weight_decay, **form)
    return torch.optim.SGD(
        parameters,
        momentum=config.shared.momentum,
        nesterov=config.shared.nesterov and config.shared.momentum > 0,
        weight_decay=config.weight_decay,
        **form,
    )


def rebuild_optimizer(
    config: StudentConfig, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, *, capturable: bool
) -> torch.optim.Optimizer:
    """The same optimiser in the other form, with the tensors of its state."""
    made = build_optimizer(config, parameters, capturable=capturable)
    for parameter, state in optimizer.state.items():
        place = parameter.device if capturable else torch.device("cpu")
        made.state[parameter] = {name: value.to(place) if name == "step" else value for name, value in state.items()}
    return made


def describe_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`state_dict`, which does not depend on the form."""
    found = optimizer.state_dict()
    if not any(isinstance(group["lr"], torch.Tensor) for group in found["param_groups"]):
        return found
    groups = [{**group, "lr": float(group["lr"]), "fused": None} for group in found["param_groups"]]
    state = {
        number: {name: value.cpu() if name == "step" else value for name, value in one.items()}
        for number, one in found["state"].items()
    }
    return {"state": state, "param_groups": groups}
