"""The function behind a SPEC that makes a network, and the call of it."""

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from softlabel.common.spec import Spec
from softlabel.errors import SpecError
from softlabel.models import cifar
from softlabel.models.fitting import fit_names
from softlabel.models.from_timm import timm_builder
from softlabel.models.from_torchvision import torchvision_builder


def builder(spec: Spec, options: dict[str, Any]) -> Callable[..., nn.Module]:
    """The function that makes the network. torchvision's `weights` are resolved here, out of `options`."""
    if spec.kind == "zoo":
        if spec.name not in cifar.BUILDERS:
            raise SpecError(f"{spec.text}: expected one of {', '.join(cifar.BUILDERS)}; found {spec.name!r}")
        return cifar.BUILDERS[spec.name]
    if spec.kind == "torchvision":
        return torchvision_builder(spec, options)
    if spec.kind == "timm":
        return timm_builder(spec, options)
    return _python_builder(spec)


def _python_builder(spec: Spec) -> Callable[..., nn.Module]:
    assert spec.factory is not None
    where, _, attribute = spec.factory.rpartition(":")
    if not where or not attribute:
        raise SpecError(
            f"{spec.text}: expected package.module:factory or file.py:factory after 'python:', found no factory"
        )
    try:
        target: Any = _import_file(where) if where.endswith(".py") else _import_module(where)
        for part in attribute.split("."):
            target = getattr(target, part)
    except Exception as error:  # it is the user's code: whatever it raises is a fact about the SPEC
        raise SpecError(
            f"{spec.text}: cannot import it: {error}; is it installed, or in the current folder?"
        ) from error
    if not callable(target):
        raise SpecError(
            f"{spec.text}: expected a function or class that returns a module, found {type(target).__name__}"
        )
    return target  # type: ignore[no-any-return]


def _import_module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        # As `python -m` does: a console script would not find the module that lies beside the user.
        sys.path.append(os.getcwd())
    return importlib.import_module(name)


def _import_file(path: str) -> ModuleType:
    """The module of a file, under a name of its own, executed once in a process."""
    file = Path(path).expanduser().resolve()
    name = f"softlabel_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None
    assert found.loader is not None
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # as `python file.py` does: it may import what lies beside it
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # its classes can be pickled within this process
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def accepts(builder: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def call(spec: Spec, builder: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    try:
        model = builder(**options)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{spec.text}: its builder refuses the options {options}: {error}") from error
    except OSError as error:  # torchvision fetches weights= on first use
        raise SpecError(f"{spec.text}: cannot get the weights: {error}; download them and give NAME@FILE") from error
    except Exception as error:
        if spec.factory is None and spec.kind != "timm":
            raise
        whose = "timm" if spec.factory is None else "its factory"
        raise SpecError(f"{spec.text}: {whose} fails: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SpecError(f"{spec.text}: expected a torch.nn.Module from the factory, found {type(model).__name__}")
    return model


def classes_of(
    spec: Spec,
    builder: Callable[..., nn.Module],
    options: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    prefix: str | None = None,
) -> dict[str, int]:
    """The checkpoint's class count, as the builder's option: where only the first axis of the heads differs."""
    try:
        with torch.device("meta"), _SkipRandomNumbers():
            shapes = {k: tuple(v.shape) for k, v in call(spec, builder, options).state_dict().items()}
    except (RuntimeError, NotImplementedError, SpecError):
        if spec.kind != "timm":
            return {}  # a factory that computes with its weights, or insists on num_classes: the real call will say it
        # Some of timm's networks compute while they are built, which the meta device cannot.
        shapes = {k: tuple(v.shape) for k, v in call(spec, builder, options).state_dict().items()}
    fitted = fit_names(spec.text, shapes, weights, prefix=prefix)
    weights = weights if fitted is None else fitted.weights
    heads = [(tuple(w.shape), shapes[k]) for k, w in weights.items() if k in shapes and tuple(w.shape) != shapes[k]]
    counts = {found[0] for found, built in heads if found and built and found[1:] == built[1:]}
    if len(counts) == 1 and all(found[1:] == built[1:] for found, built in heads):
        return {"num_classes": counts.pop()}
    return {}


class _SkipRandomNumbers(TorchFunctionMode):
    """Leaves tensors without memory as they are: torch would import its compiler, a second, to draw nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _DRAWS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


_DRAWS: set[Any] = {torch.Tensor.normal_, torch.Tensor.uniform_}
