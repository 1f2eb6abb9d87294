"""Checkpoint files: read without executing anything in them, and the set of weights in them that is meant."""

import argparse
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from softlabel.common.file_type import describe_content
from softlabel.errors import SpecError, TeacherError, one_line

log = logging.getLogger("softlabel")

# Under which name training scripts put the state dict into their checkpoint, the usual ones first.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
_AVERAGED = re.compile(r"(^|[._-])ema([._-]|$)", re.IGNORECASE)
_DEPTH = 4  # of dicts in dicts that are looked into


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One set of weights of a file.

    Attributes:
        tensors: its state dict, as it is in the file.
        key: where it lay in the file: names of dicts, joined by dots; empty: the file is the state dict.
        others: where the file's other sets lie.
        prefix: what `weights_key` says of the names inside the set; None: nothing.
    """

    tensors: dict[str, Tensor]
    key: str
    others: tuple[str, ...]
    prefix: str | None = None


def read_checkpoint(path: str | os.PathLike[str], *, weights_key: str | None = None) -> Checkpoint:
    """Read the weights of a safetensors file or a `torch.save` file. The content decides which it is, not the name.

    Of several sets the exponential moving average (EMA) is taken, as timm does, or else the one under the usual name.

    Args:
        path: the file.
        weights_key: where the wanted set lies: names of dicts, joined by dots, or what the names of its tensors begin
            with.

    Raises:
        SpecError: there is no such file, it has no such set, or several without one that is meant.
        TeacherError: the file is damaged, holds something else, or would have to execute code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise SpecError(f"{path}: expected a checkpoint, found {'a folder' if path.is_dir() else 'no such file'}")
    found = _load(path)
    if nameless := list(_nameless(found)):
        log.warning(
            "warning: %s: holds an average of the weights without their names (%s), which cannot be taken; save the "
            "state dict of the network with the averaged weights in it",
            path,
            ", ".join(nameless),
        )
    sets = dict(_sets(found))
    if not sets:
        raise TeacherError(
            f"{path}: expected a state dict (names to tensors), alone or under one of {', '.join(_WRAPPERS)}; "
            f"found {_describe(found)}. Save it with torch.save(model.state_dict(), path)"
        )
    key, prefix = _chosen(path, sets, weights_key)
    return Checkpoint(tensors=sets[key], key=key, others=tuple(one for one in sets if one != key), prefix=prefix)


def is_averaged(name: str) -> bool:
    """Whether a name of weights says that they are an exponential moving average."""
    return _AVERAGED.search(name) is not None


def _load(path: Path) -> object:
    what = describe_content(path)
    if what == "a safetensors file":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise TeacherError(f"{path}: expected a safetensors file, found: {error}") from error
    if what is not None:
        raise TeacherError(f"{path}: expected a checkpoint of weights, found {what}")
    if path.suffix == ".safetensors" and not _is_torch(path):
        raise TeacherError(f"{path}: expected a safetensors file, found a file that is damaged or something else")
    try:
        # What training scripts keep beside their weights: the namespace of their command line holds plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged or malicious file provokes: it was not executed, and is not used
        raise TeacherError(_refused(path, error)) from error


def _is_torch(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(2)
    return start in (b"PK", b"\x80\x02")


def _refused(path: Path, error: Exception) -> str:
    """torch's own message advises to switch the protection off: keep its reason and give a safe remedy."""
    text = one_line(error, limit=None)
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


def _sets(found: object, key: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every state dict in what was loaded, under its key."""
    if not isinstance(found, Mapping):
        return
    named = {name: value for name, value in found.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    # Counters and scales of optimizers and averages are tensors, too; a network has a matrix somewhere.
    if any(value.dim() >= 2 for value in tensors.values()) or (
        tensors and len(tensors) == len(found) and (not key or key.rpartition(".")[2] in _WRAPPERS)
    ):
        yield key, tensors
    elif depth:
        for name, value in named.items():
            yield from _sets(value, f"{key}.{name}" if key else name, depth - 1)


def _nameless(found: object, key: str = "", depth: int = _DEPTH) -> Iterator[str]:
    """Where lists of weights lie that an average goes by, as `torch_ema` writes them."""
    if isinstance(found, Mapping) and depth:
        for name, value in found.items():
            yield from _nameless(value, f"{key}.{name}" if key else str(name), depth - 1)
    elif (
        isinstance(found, list | tuple)
        and is_averaged(key)
        and any(isinstance(value, Tensor) and value.dim() >= 2 for value in found)
    ):
        yield key


def _chosen(path: Path, sets: Mapping[str, object], wanted: str | None) -> tuple[str, str | None]:
    """The key of the set that is meant, and the prefix that `wanted` leaves."""
    if wanted is not None:
        if wanted in sets:
            return wanted, None
        outer = max((key for key in sets if key and wanted.startswith(f"{key}.")), key=len, default=None)
        key = outer if outer is not None else _usual(list(sets))
        if key is not None:
            prefix = (wanted if outer is None else wanted.removeprefix(f"{outer}.")).rstrip(".") + "."
            if any(name.startswith(prefix) for name in sets[key]):  # type: ignore[attr-defined]
                return key, prefix
        raise SpecError(f"{path}: weights_key: expected {_listed(sets)}, found {wanted!r}")
    averaged = [key for key in sets if is_averaged(key)]
    taken = _usual(averaged) if averaged else _usual(list(sets))
    if taken is None:
        raise SpecError(f"{path}: holds several sets of weights; say which with ?weights_key= ({_listed(sets)})")
    return taken, None


def _usual(keys: list[str]) -> str | None:
    if len(keys) == 1:
        return keys[0]
    usual = [key for key in keys if key.partition(".")[0] in _WRAPPERS]
    ranked = sorted(usual, key=lambda key: (_WRAPPERS.index(key.partition(".")[0]), key.count(".")))
    return ranked[0] if ranked else None


def _listed(sets: Mapping[str, object]) -> str:
    named = [key for key in sets if key]
    return " or ".join(map(repr, named[:8])) if named else "a prefix of its tensors' names"
