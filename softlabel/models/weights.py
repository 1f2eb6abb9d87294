"""Weights: read from files without executing anything in them, named by their hash, fitted into a network."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from softlabel.errors import SpecError, TeacherError
from softlabel.spec import Spec

# Under which name training scripts put the state dict into their checkpoint.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "model_ema")


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file, or from a `torch.save` file without executing anything in it.

    A state dict inside a dict (`state_dict`, `model`, ...) is unwrapped; `module.` (data parallel) and `_orig_mod.`
    (compiled) are cut from the names.

    Raises:
        SpecError: there is no such file.
        TeacherError: the file is damaged, holds something else, or would have to execute code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise SpecError(f"{path}: expected a checkpoint, found {'a folder' if path.is_dir() else 'no such file'}")
    if path.suffix == ".safetensors":
        try:
            return plain_names(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise TeacherError(f"{path}: expected a safetensors file, found: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged or malicious file provokes: it was not executed, and is not used
        raise TeacherError(_refused(path, error)) from error
    weights = _unwrap(found)
    if weights is None:
        raise TeacherError(
            f"{path}: expected a state dict (names to tensors), alone or under one of {', '.join(_WRAPPERS)}; "
            f"found {_describe(found)}. Save it with torch.save(model.state_dict(), path)"
        )
    return plain_names(weights)


def _refused(path: Path, error: Exception) -> str:
    """torch's own message advises to switch the protection off: keep its reason and give a safe remedy."""
    text = " ".join(str(error).split())
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"{path}: refused, because it holds more than tensors ({found[1].rstrip('.')}) and reading it could "
            "execute code. Ask for the weights as safetensors, or, if you trust its author, load it yourself and save "
            "model.state_dict() alone"
        )
    if "TorchScript" in text:
        return f"{path}: expected weights, found a TorchScript program; save torch.jit.load(path).state_dict() instead"
    reason = text.rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0][:200]
    return f"{path}: expected a PyTorch checkpoint, found a file that is damaged or something else ({reason})"


def _describe(found: object) -> str:
    if isinstance(found, Mapping):
        return f"a dict with {', '.join(map(str, list(found)[:8])) or 'nothing in it'}"
    return f"a {type(found).__name__}"


def _unwrap(found: object) -> dict[str, Tensor] | None:
    if not isinstance(found, Mapping):
        return None
    for name in _WRAPPERS:
        inner = found.get(name)
        if isinstance(inner, Mapping) and (weights := _unwrap(inner)):
            return weights
    if found and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        return dict(found)
    return None


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

    The same weights have the same hash whatever file they came from and on whichever device they are.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        header = json.dumps([name, str(value.dtype).removeprefix("torch."), list(value.shape)])
        digest.update(len(header).to_bytes(4, "little") + header.encode())
        # numpy has no bfloat16; as bytes every dtype is the same.
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def fill(spec: Spec, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load the weights, or say in one line what does not fit."""
    expected = model.state_dict()
    # Checkpoints from before PyTorch 0.4.1 have no such counters, and nothing is computed from them in eval mode.
    missing = [k for k in expected if k not in weights and not k.endswith("num_batches_tracked")]
    unknown = [k for k in weights if k not in expected]
    shapes = [
        f"{k} {tuple(weights[k].shape)} where {tuple(v.shape)} is needed"
        for k, v in expected.items()
        if k in weights and weights[k].shape != v.shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
        if names
    ]
    if problems:
        raise SpecError(
            f"{spec.text}: the checkpoint's tensors do not fit the network: {'; '.join(problems)}. "
            "Is it the same architecture and class count?"
        )
    model.load_state_dict(weights, strict=False)
