"""From a SPEC to a network with weights, for teachers and students alike.

Nothing that a checkpoint contains is executed: safetensors, or `torch.load(weights_only=True)`.
"""

import hashlib
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from softlabel import zoo
from softlabel.errors import SpecError, TeacherError
from softlabel.spec import Spec, literal, parse_spec

__all__ = ["RunModel", "Spec", "build_model", "load_weights", "parse_spec", "read_run", "save_run", "weights_sha256"]

# Options of a SPEC that say how images are prepared; they are not the builder's.
PREPROCESSING_OPTIONS = ("mean", "std", "resize", "crop", "interpolation")
# Under which name training scripts put the state dict into their checkpoint.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "model_ema")


def build_model(spec: Spec | str, *, num_classes: int | None = None) -> nn.Module:
    """Build the network of a SPEC and load its checkpoint, on the CPU, in training mode.

    Without `num_classes` (or an option of that name) the count is the checkpoint's, or else the builder's default. A
    checkpoint must fit the network exactly.

    Raises:
        SpecError: an unknown name, an option that the builder refuses, a missing checkpoint or one of another network.
        TeacherError: a checkpoint that cannot be read safely.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    if spec.kind == "run":
        return _build_run(spec, num_classes)
    options = {k: literal(v) for k, v in spec.options.items() if k not in PREPROCESSING_OPTIONS}
    builder = _builder(spec, options)
    weights = load_weights(spec.checkpoint) if spec.checkpoint else None
    if num_classes is not None:
        if options.get("num_classes", num_classes) != num_classes:
            raise SpecError(
                f"{spec.text}: num_classes={options['num_classes']}, but {num_classes} classes are needed here"
            )
        options["num_classes"] = num_classes
    if weights is not None and "num_classes" not in options and _accepts(builder, "num_classes"):
        options |= _classes_of(spec, builder, options, weights)
    if spec.kind == "python" and not _accepts(builder, "num_classes") and "num_classes" not in spec.options:
        options.pop("num_classes", None)  # a factory that knows its classes itself
    model = _call(spec, builder, options)
    if weights is not None:
        _fill(spec, model, weights)
    return model


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
            return _plain_names(load_file(path))
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
    return _plain_names(weights)


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


def _plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
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


# ---- builders ----


def _builder(spec: Spec, options: dict[str, Any]) -> Callable[..., nn.Module]:
    """The function that makes the network. torchvision's `weights` are resolved here, out of `options`."""
    if spec.kind == "zoo":
        if spec.name not in zoo.BUILDERS:
            raise SpecError(f"{spec.text}: expected one of {', '.join(zoo.BUILDERS)}; found {spec.name!r}")
        return zoo.BUILDERS[spec.name]
    if spec.kind == "torchvision":
        return _torchvision_builder(spec, options)
    return _python_builder(spec)


def _torchvision_builder(spec: Spec, options: dict[str, Any]) -> Callable[..., nn.Module]:
    from torchvision import models

    names = models.list_models(module=models)
    if spec.name not in names:
        close = get_close_matches(spec.name, names, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else f": {', '.join(names)}"
        raise SpecError(f"{spec.text}: torchvision has no image classification model {spec.name!r}{hint}")
    if spec.checkpoint and options.get("weights") is not None:
        raise SpecError(f"{spec.text}: give either a checkpoint after '@' or weights=, not both")
    if options.get("weights") is not None:
        options["weights"] = torchvision_weights(spec)
    builder: Callable[..., nn.Module] = models.get_model_builder(spec.name)
    return builder


def torchvision_weights(spec: Spec) -> Any:
    """The entry of torchvision's list of weights that ``?weights=`` names (None when it is not given).

    Raises:
        SpecError: there are no such weights for this network.
    """
    from torchvision import models

    wanted = spec.options.get("weights")
    if spec.kind != "torchvision" or wanted is None or literal(wanted) is None:
        return None
    entries = models.get_model_weights(spec.name)
    name = wanted.rpartition(".")[2]
    if name not in entries.__members__:
        raise SpecError(
            f"{spec.text}: expected weights={' or '.join([*entries.__members__, 'DEFAULT'])}, found {wanted!r}"
        )
    return entries[name]


def _python_builder(spec: Spec) -> Callable[..., nn.Module]:
    module_name, colon, attribute = spec.name.partition(":")
    if not colon or not attribute:
        raise SpecError(f"{spec.text}: expected python:package.module:factory, found no factory")
    if os.getcwd() not in sys.path:
        # As `python -m` does: a console script would not find the module that lies beside the user.
        sys.path.append(os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
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


def _accepts(builder: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _call(spec: Spec, builder: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    try:
        model = builder(**options)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{spec.text}: its builder refuses the options {options}: {error}") from error
    except OSError as error:  # torchvision fetches weights= on first use
        raise SpecError(f"{spec.text}: cannot get the weights: {error}; download them and give NAME@FILE") from error
    except Exception as error:
        if spec.kind != "python":
            raise
        raise SpecError(f"{spec.text}: its factory fails: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SpecError(f"{spec.text}: expected a torch.nn.Module from the factory, found {type(model).__name__}")
    return model


def _classes_of(
    spec: Spec, builder: Callable[..., nn.Module], options: dict[str, Any], weights: dict[str, Tensor]
) -> dict[str, int]:
    """The checkpoint's class count, as the builder's option: where only the first axis of the heads differs."""
    try:
        with torch.device("meta"):
            shapes = {k: tuple(v.shape) for k, v in _call(spec, builder, options).state_dict().items()}
    except (RuntimeError, NotImplementedError, SpecError):
        return {}  # a factory that computes with its weights, or insists on num_classes: the real call will say it
    heads = [(tuple(w.shape), shapes[k]) for k, w in weights.items() if k in shapes and tuple(w.shape) != shapes[k]]
    counts = {found[0] for found, built in heads if found and built and found[1:] == built[1:]}
    if len(counts) == 1 and all(found[1:] == built[1:] for found, built in heads):
        return {"num_classes": counts.pop()}
    return {}


def _fill(spec: Spec, model: nn.Module, weights: dict[str, Tensor]) -> None:
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


# ---- run folders ----


@dataclass(frozen=True, slots=True, kw_only=True)
class RunModel:
    """What `model.json` of a run folder says about the student beside it in `model.safetensors`."""

    student: str
    num_classes: int
    preprocessing: Mapping[str, Any]


def save_run(folder: str | os.PathLike[str], model: nn.Module, description: RunModel) -> None:
    """Write `model.safetensors` and `model.json` into a run folder, so that ``run:FOLDER`` is a SPEC."""
    folder = Path(folder)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # safetensors refuses tensors that share memory, as tied weights do.
    state = {name: value.clone() for name, value in state.items()}
    _publish(folder / "model.safetensors", save(_plain_names(state)))
    fields = {
        "student": description.student,
        "num_classes": description.num_classes,
        "preprocessing": dict(description.preprocessing),
    }
    # Last: a folder with a model.json in it is a whole one.
    _publish(folder / "model.json", (json.dumps(fields, indent=2) + "\n").encode())


def _publish(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_run(folder: str | os.PathLike[str]) -> RunModel:
    """Read `model.json` of a run folder.

    Raises:
        SpecError: the folder is not that of a finished `softlabel train`.
    """
    path = Path(folder) / "model.json"
    try:
        found = json.loads(path.read_text())
        return RunModel(
            student=str(found["student"]),
            num_classes=int(found["num_classes"]),
            preprocessing=dict(found["preprocessing"]),
        )
    except FileNotFoundError:
        raise SpecError(
            f"{folder}: expected the folder of a run of `softlabel train`, found no model.json in it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{path}: expected student, num_classes and preprocessing, found {error!r}") from error


def _build_run(spec: Spec, num_classes: int | None) -> nn.Module:
    run = read_run(spec.name)
    if unknown := sorted(set(spec.options) - set(PREPROCESSING_OPTIONS)):
        raise SpecError(f"{spec.text}: expected no option but {', '.join(PREPROCESSING_OPTIONS)}, found {unknown[0]!r}")
    if num_classes not in (None, run.num_classes):
        raise SpecError(f"{spec.text}: the run has {run.num_classes} classes, but {num_classes} are needed here")
    student = parse_spec(run.student)
    if student.kind == "run":
        inner = read_run(student.name)  # a student that started from another run
        student = parse_spec(inner.student)
    # Its own weights replace those that it started from, which may be gone by now.
    options = {k: v for k, v in student.options.items() if k != "weights"}
    bare = Spec(kind=student.kind, name=student.name, options=options)
    model = build_model(bare, num_classes=run.num_classes)
    _fill(spec, model, load_weights(Path(spec.name) / "model.safetensors"))
    return model
