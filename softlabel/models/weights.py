"""Weights as a state dict under plain names, and their hash."""

import hashlib
import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from softlabel.models.checkpoint import read_checkpoint


def load_weights(path: str | os.PathLike[str], *, weights_key: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, or from a `torch.save` file without executing anything in it.

    A state dict inside a dict (`state_dict`, `model`, ...) is unwrapped, of several sets one is taken (see
    `read_checkpoint`); `module.` (data parallel) and `_orig_mod.` (compiled) are cut from the names.

    Raises:
        SpecError: there is no such file, or several sets of weights, none of which is meant.
        TeacherError: the file is damaged, holds something else, or would have to execute code to be read.
    """
    return plain_names(read_checkpoint(path, weights_key=weights_key).tensors)


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if "n_averaged" in weights and any(name.startswith("module.") for name in weights):
        weights = {name: value for name, value in weights.items() if name != "n_averaged"}  # swa_utils.AveragedModel
    for _ in range(8):  # the prefixes come in any order and number
        prefix = next((p for p in ("module.", "_orig_mod.") if all(n.startswith(p) for n in weights)), None)
        if prefix is None or not weights:
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's parameters and buffers, in the order of the names.

    Of a frozen TorchScript program, whose weights are constants of its graph, over these in the order of the graph too.
    The same weights have the same hash whatever file they came from and on whichever device they are.
    """
    digest = hashlib.sha256()
    for name, value in [*sorted(module.state_dict().items()), *_frozen(module)]:
        if not isinstance(value, Tensor):
            continue
        header = json.dumps([name, str(value.dtype).removeprefix("torch."), list(value.shape)])
        digest.update(len(header).to_bytes(4, "little") + header.encode())
        # numpy has no bfloat16; as bytes every dtype is the same.
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _frozen(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors that `torch.jit.freeze` has put into a program's graph."""
    if not isinstance(module, torch.jit.ScriptModule):
        return []
    graph: Any = module.inlined_graph  # held: its nodes live as long as it does
    constants = [
        node.t("value")
        for node in graph.findAllNodes("prim::Constant")
        if node.hasAttribute("value") and node.kindOf("value") == "t"
    ]
    dense = [value.to_dense() if value.layout is not torch.strided else value for value in constants]
    return [(f"graph.{number}", value) for number, value in enumerate(dense)]
