"""A network as a graph of tensor operations that computes the same with less: batch norms folded, or compiled.

The graph is a function of its inputs alone: it keeps no state, several threads may call it at once, and the network
that it was taken from stays as it is.

Legend: B batch, C classes, R rows of a pass.
"""

import logging
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from softlabel.inputs.base import Inputs
from softlabel.models.program import logits_of

Engine = Literal["eager", "folded", "compiled"]

_CONVOLUTIONS = {getattr(torch.ops.aten, name).default for name in ("conv1d", "conv2d", "conv3d")} | {
    getattr(torch.ops.aten, name).padding for name in ("conv1d", "conv2d", "conv3d")
}
_BATCH_NORM = torch.ops.aten.batch_norm.default


class _Compute(Protocol):
    def __call__(self, *tensors: Tensor) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphNetwork:
    """Computes logits in passes of a constant number of rows; called as the network is.

    Attributes:
        engine: how the graph is computed.
        rows: of a pass.
        folded: number of batch norms that are part of a convolution now.
    """

    engine: Engine
    rows: int
    folded: int
    _names: tuple[str, ...]
    _shapes: tuple[tuple[int, ...], ...]
    _strides: tuple[tuple[int, ...], ...]
    _compute: _Compute

    def __call__(self, *single: Tensor, **named: Tensor) -> Tensor:
        """Logits (B, C) of any number of samples; the last pass is filled up with zeros."""
        tensors = dict(zip(self._names, single, strict=True)) if single else {name: named[name] for name in self._names}
        batch = Inputs(tensors)
        if (found := batch.shapes) != self._shapes:
            raise ValueError(f"expected samples of the shapes {self._shapes} that its graph has, found {found}")
        parts = [self._run(batch[start : start + self.rows]) for start in range(0, len(batch), self.rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, part: Inputs) -> Tensor:
        tensors = part.padded(self.rows).tensors.values()
        laid_out = [_lay_out(tensor, strides) for tensor, strides in zip(tensors, self._strides, strict=True)]
        found = self._compute(*laid_out)
        logits_RC: Tensor = found if isinstance(found, Tensor) else found[0]
        return logits_RC[: len(part)]


def make_graph_network(
    subject: str, model: nn.Module, example: Inputs, engine: Literal["folded", "compiled"]
) -> GraphNetwork:
    """Take the graph of a network for inputs of one shape, in float32, and make it faster; the network is not changed.

    Args:
        subject: the teacher, for messages.
        model: in evaluation mode.
        example: R samples after preprocessing; passes have as many rows, in the same memory layout.
        engine: folded: batch norms are part of the convolutions before them. compiled: by inductor with constant
            weights, for the present number of threads; needs a C++ compiler.

    Raises:
        Exception: whatever torch raises for a network whose computation is no graph, or without a compiler.
    """
    names, tensors = tuple(example.tensors), tuple(example.tensors.values())
    with torch.no_grad(), _without_remarks():
        program = torch.export.export(_Logits(subject, model, names), tensors, strict=False)
        graph: Any = program.module(check_guards=False)
        folded = _fold_norms(graph)
    compute = graph.forward if engine == "folded" else _compile(graph, tensors)
    return GraphNetwork(
        engine=engine,
        rows=len(example),
        folded=folded,
        _names=names,
        _shapes=example.shapes,
        _strides=tuple(tensor.stride() for tensor in tensors),
        _compute=compute,
    )


class _Logits(nn.Module):
    """A network that takes its inputs in order and returns its logits alone."""

    def __init__(self, subject: str, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.subject, self.model, self.names = subject, model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return logits_of(self.subject, Inputs(dict(zip(self.names, tensors, strict=True))).call(self.model))


def _compile(graph: GraphModule, tensors: Sequence[Tensor]) -> _Compute:
    # In this process: another one would outlive a run that is killed. Freezing is looked up in the settings themselves.
    options = {"freezing": True, "compile_threads": 1}
    with torch.inference_mode(), _without_remarks(), torch._inductor.config.patch(options):
        compiled: _Compute = torch._inductor.compile(graph, list(tensors))
    return compiled


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Hold back torch's remarks on what it has not found, such as a CUDA runtime."""
    log = logging.getLogger("torch")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _lay_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor with these strides, which a compiled graph depends on."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _fold_norms(graph: GraphModule) -> int:
    """Make batch norms part of the convolution that they follow; return how many."""
    count = 0
    for norm in list(graph.graph.nodes):
        if norm.op == "call_function" and norm.target is _BATCH_NORM and _fold(graph, norm, count):
            count += 1
    if count:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return count


def _fold(graph: GraphModule, norm: Node, number: int) -> bool:
    convolution, *state, is_training, _, epsilon, _ = norm.args
    if not isinstance(convolution, Node) or convolution.target not in _CONVOLUTIONS or is_training:
        return False
    # Used elsewhere too, the convolution's own answer is needed; a weight that is computed is not known here.
    weight, bias = convolution.args[1], convolution.args[2] if len(convolution.args) > 2 else None
    constants = [_find_constant(graph, node) for node in (weight, bias, *state)]
    kernel, shift, scale_C, offset_C, mean_C, variance_C = (constant for _, constant in constants)
    is_known = all(known for known, _ in constants) and None not in (kernel, mean_C, variance_C)
    if len(convolution.users) > 1 or convolution.kwargs or not is_known:
        return False
    fused = fuse_conv_bn_weights(kernel, shift, mean_C, variance_C, epsilon, scale_C, offset_C)  # type: ignore[arg-type]
    names = [f"_folded_{number}_{name}" for name in ("weight", "bias")]
    for name, tensor in zip(names, fused, strict=True):
        graph.register_buffer(name, tensor.detach())
    with graph.graph.inserting_before(convolution):
        nodes = [graph.graph.get_attr(name) for name in names]
    convolution.args = (convolution.args[0], *nodes, *convolution.args[3:])
    norm.replace_all_uses_with(convolution)
    graph.graph.erase_node(norm)
    return True


def _find_constant(graph: GraphModule, node: Any) -> tuple[bool, Tensor | None]:
    """Whether a node is a weight or absent, and the weight."""
    if node is None:
        return True, None
    if not isinstance(node, Node) or node.op != "get_attr":
        return False, None
    return True, operator.attrgetter(str(node.target))(graph)
