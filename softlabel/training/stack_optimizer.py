"""The step of the optimisers of all students of a stack at once.

The formulas are those of torch's SGD and AdamW, with a learning rate and a weight decay for each student; the state
tensors are views in the state of every student's own optimiser, so that its checkpoint is what it would be alone.

Legend: S students.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer


class StackOptimizer:
    """Optimisers that make their steps together.

    Args:
        leaves: the stacked parameters (S, ...), by name, with the gradients of a step.
        owners: the parameters of every student, which are views of these.
        optimizers: of the students, all of one kind, each with one group of parameters.
    """

    def __init__(
        self,
        leaves: Mapping[str, Tensor],
        owners: Mapping[str, Sequence[Tensor]],
        optimizers: Sequence[Optimizer],
    ) -> None:
        self._leaves, self._owners, self._optimizers = leaves, owners, optimizers
        self._state: dict[str, dict[str, Tensor]] = {}
        self._moved: list[str] = []  # those that had a gradient last
        self._numbers: dict[Any, Tensor] = {}  # of a step, on the device, by what they are
        self._brought: set[Any] = set()  # of these, by the last `prepare`
        self._after: dict[str, int] = {}  # of AdamW: which number of steps a parameter has had, of those that there are

    @staticmethod
    def takes(optimizers: Sequence[Optimizer]) -> bool:
        """Whether all are of one kind that is known here."""
        return {type(optimizer) for optimizer in optimizers} in ({SGD}, {AdamW})

    @torch.no_grad()
    def prepare(self) -> None:
        """Bring the numbers of the next step to the device, where a CUDA graph reads them.

        Before the backward pass of a graph the parameters that had a gradient last are taken to have one again.
        """
        self._moved = [name for name, leaf in self._leaves.items() if leaf.grad is not None] or self._moved
        groups = [optimizer.param_groups[0] for optimizer in self._optimizers]
        distinct: dict[tuple[float, ...], int] = {}
        self._brought.clear()
        for name in self._moved:
            leaf = self._leaves[name]
            if isinstance(self._optimizers[0], SGD):
                self._bring("rate", [-group["lr"] for group in groups], leaf)
                self._bring("decay", [group["weight_decay"] for group in groups], leaf)
                continue
            state = self._take_state(name, leaf)
            state["step"] += 1
            steps = tuple(state["step"].tolist())
            number = self._after[name] = distinct.setdefault(steps, len(distinct))
            beta1, beta2 = groups[0]["betas"]
            self._bring("kept", [1 - group["lr"] * group["weight_decay"] for group in groups], leaf)
            self._bring(("root", number), [(1 - beta2**step) ** 0.5 for step in steps], leaf)
            sizes = [-group["lr"] / (1 - beta1**step) for group, step in zip(groups, steps, strict=True)]
            self._bring(("size", number), sizes, leaf)

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient, by the numbers that `prepare` brought."""
        groups = [optimizer.param_groups[0] for optimizer in self._optimizers]
        for name, leaf in self._leaves.items():
            if leaf.grad is None:
                continue
            if isinstance(self._optimizers[0], SGD):
                self._step_sgd(name, leaf, leaf.grad, groups)
            else:
                self._step_adamw(name, leaf, leaf.grad, groups)

    def close(self) -> None:
        """Give every optimiser a state of its own."""
        for name in self._state:
            for optimizer, owner in zip(self._optimizers, self._owners[name], strict=True):
                optimizer.state[owner] = {key: value.clone() for key, value in optimizer.state[owner].items()}
        self._state.clear()

    def _step_sgd(self, name: str, leaf: Tensor, grad: Tensor, groups: Sequence[Mapping[str, Any]]) -> None:
        change, momentum = grad, groups[0]["momentum"]
        if any(group["weight_decay"] for group in groups):
            change = torch.addcmul(change, leaf, self._spread("decay", leaf))
        if momentum:
            buffer = self._take_state(name, leaf)["momentum_buffer"]
            buffer.mul_(momentum).add_(change)
            change = change.add(buffer, alpha=momentum) if groups[0]["nesterov"] else buffer
        leaf.addcmul_(change, self._spread("rate", leaf))

    def _step_adamw(self, name: str, leaf: Tensor, grad: Tensor, groups: Sequence[Mapping[str, Any]]) -> None:
        state = self._take_state(name, leaf)
        number, eps = self._after[name], groups[0]["eps"]
        beta1, beta2 = groups[0]["betas"]
        leaf.mul_(self._spread("kept", leaf))
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = self._spread(("root", number), leaf)
        scaled = state["exp_avg"] / (state["exp_avg_sq"].sqrt() / root).add_(eps)
        leaf.addcmul_(scaled, self._spread(("size", number), leaf))

    def _take_state(self, name: str, leaf: Tensor) -> dict[str, Tensor]:
        """The stacked state of a parameter; where students have none yet it begins with zeros, as torch's does."""
        if name not in self._state:
            fresh = {"momentum_buffer": torch.zeros_like(leaf[0])}
            if isinstance(self._optimizers[0], AdamW):
                fresh = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(leaf[0])}
                fresh["exp_avg_sq"] = torch.zeros_like(leaf[0])
            of_students = [
                optimizer.state[owner] if optimizer.state.get(owner) else fresh
                for optimizer, owner in zip(self._optimizers, self._owners[name], strict=True)
            ]
            whole = {key: torch.stack([state[key] for state in of_students]) for key in fresh}
            for number, (optimizer, owner) in enumerate(zip(self._optimizers, self._owners[name], strict=True)):
                optimizer.state[owner] = {key: value[number] for key, value in whole.items()}
            self._state[name] = whole
        return self._state[name]

    def _bring(self, what: Any, values: Sequence[float], leaf: Tensor) -> None:
        """Put one number a student on the device of a parameter, in its type; of parameters of one type it is one."""
        key = (what, leaf.dtype)
        if key in self._brought:
            return
        self._brought.add(key)
        new = torch.tensor(values, dtype=leaf.dtype)
        if key not in self._numbers:
            self._numbers[key] = new.to(leaf.device)
        else:
            self._numbers[key].copy_(new, non_blocking=True)

    def _spread(self, what: Any, leaf: Tensor) -> Tensor:
        """These numbers, (S, 1, ...), to be multiplied with a stacked parameter."""
        return self._numbers[what, leaf.dtype].view(-1, *[1] * (leaf.dim() - 1))
