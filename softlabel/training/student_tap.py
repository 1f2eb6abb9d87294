"""Where a student's embedding, or its maps of attention, are taken.

Legend: B batch, C classes, H and W height and width, K numbers of an embedding, S of all maps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softlabel.errors import UsageError
from softlabel.inputs.base import Inputs
from softlabel.models.taps import (
    OUTPUT,
    Pool,
    Side,
    choose_pool,
    find_last_linear,
    find_module,
    find_stages,
    has_channels_last,
    hooked,
    measure_map,
    pool,
    tensor_of,
)

Size = tuple[int, int]

# How far W h + b may lie from the answer of a student's trial pass, relative to its largest logit.
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentTap:
    """Takes one thing from a student in every pass.

    Attributes:
        modules: of its network, by name; one for an embedding.
        side: what enters the module, or what it gives.
        width: K, or S.
        pool: what an embedding is the mean over.
        sizes: of each map, to which larger ones are pooled; none for an embedding.
    """

    modules: tuple[str, ...]
    side: Side
    width: int
    pool: Pool = "none"
    sizes: tuple[Size, ...] = ()

    @contextmanager
    def watch(self, model: nn.Module, taken: list[Tensor]) -> Iterator[None]:
        """Append what a pass inside the block gives to `taken`: (B, K), or each map (B, H * W)."""
        found: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for place, name in enumerate(self.modules):
                stack.enter_context(hooked(model.get_submodule(name), self.side, self._keep(found, place)))
            yield
        taken.extend(found[place] for place in range(len(self.modules)))

    def _keep(self, found: dict[int, Tensor], place: int) -> Callable[[object], None]:
        def keep(value: object) -> None:
            values = tensor_of("student", value)
            found[place] = _shrink_map(values, self.sizes[place]) if self.sizes else pool(values, self.pool)

        return keep


def find_embedding(spec: str, model: nn.Module, inputs: Inputs, asked: str | None) -> StudentTap:
    """Where the embedding of a student is: what enters its last linear layer, or what a module gives.

    Args:
        spec: of the student, for messages.
        model: in any mode, which it keeps.
        inputs: a few samples, as the network takes them.
        asked: name of the module, or `OUTPUT`; None: the last linear layer.

    Raises:
        UsageError: there is none.
    """
    where = f"student {spec}: embedding"
    if asked is not None:
        name = "" if asked == OUTPUT else asked
        values, _ = _observe(where, model, inputs, name, "output")
        how = choose_pool(f"{where}: {asked}", values, len(inputs))
        return StudentTap(modules=(name,), side="output", width=pool(values, how).shape[1], pool=how)
    name, layer = find_last_linear(model)
    if layer is not None:
        hidden_BK, answer = _observe(where, model, inputs, name, "input")
        if hidden_BK.dim() == 2 and isinstance(answer, Tensor):
            with torch.no_grad():
                expected_BC = layer(hidden_BK)
            if expected_BC.shape == answer.shape:
                off = (expected_BC - answer).abs().max()
                if bool(off <= _TOLERANCE * (1 + answer.abs().max())):
                    return StudentTap(modules=(name,), side="input", width=hidden_BK.shape[1])
    found = "none" if layer is None else f"{name} with {layer.out_features} outputs"
    raise UsageError(
        f"{where}: expected a last linear layer whose outputs are the logits, found {found}; name a module in its "
        "SPEC, ?embedding=MODULE"
    )


def find_maps(spec: str, model: nn.Module, inputs: Inputs, asked: str | None, wanted: Sequence[Size]) -> StudentTap:
    """Where the maps of a student are that are compared with a teacher's of these sizes, one after another.

    Raises:
        UsageError: the student has others.
    """
    where = f"student {spec}: attention"
    if asked is None:
        with _still(model):
            stages = find_stages(model, lambda: inputs.call(model), len(inputs))
    else:
        stages = {}
        for name in filter(None, asked.split(",")):
            values, _ = _observe(where, model, inputs, name, "output")
            stages[name] = measure_map(f"{where}: {name}", values)
    if len(stages) != len(wanted):
        listed = ", ".join(f"{name} {height}x{width}" for name, (height, width) in stages.items()) or "none"
        sizes = ", ".join(f"{height}x{width}" for height, width in wanted)
        raise UsageError(
            f"{where}: expected {len(wanted)} maps, for the teacher's of {sizes}, found {listed}; name so many modules "
            "in its SPEC, ?attention=MODULE,MODULE"
        )
    pairs = zip(stages.values(), wanted, strict=True)
    sizes_of = tuple((min(h, high), min(w, wide)) for (h, w), (high, wide) in pairs)
    total = sum(height * width for height, width in sizes_of)
    return StudentTap(modules=tuple(stages), side="output", width=total, sizes=sizes_of)


def _shrink_map(features: Tensor, size: Size) -> Tensor:
    """The map of attention (B, H * W) of features that are averaged to this size before."""
    features = features.float()
    if has_channels_last(features):
        features = features.permute(0, 3, 1, 2)
    if tuple(features.shape[2:]) != size:
        features = F.adaptive_avg_pool2d(features, size)
    # Without squares in memory, which are as large as the features; a sum where a mean is divided by its norm anyway.
    features = features.permute(0, 2, 3, 1)
    return F.normalize(torch.linalg.vecdot(features, features).flatten(1), dim=1)


def _observe(where: str, model: nn.Module, inputs: Inputs, name: str, side: Side) -> tuple[Tensor, Any]:
    """What enters a module or what it gives, and the answer, in a pass that leaves the student as it is."""
    found: list[Tensor] = []
    watch = hooked(
        find_module(where, model, name), side, lambda value: found.append(tensor_of(f"{where}: {name}", value))
    )
    with watch, _still(model):
        answer = inputs.call(model)
    if len(found) != 1:
        raise UsageError(
            f"{where}: expected {name} to run once in a forward pass, found {len(found)} times; name another module"
        )
    return found[0], answer


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
