"""From a SPEC to a network with weights, for teachers and students alike."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softlabel.common.spec import Spec, literal, parse_spec
from softlabel.errors import SpecError
from softlabel.inputs.base import InputTransform
from softlabel.inputs.chat import CHATS
from softlabel.inputs.image_transform import Preprocessing
from softlabel.inputs.tensor import TensorTransform
from softlabel.inputs.text import TextTransform
from softlabel.inputs.tokens import TokenTransform
from softlabel.inputs.transforms import KINDS, transform_of
from softlabel.inputs.vocabulary import Vocabulary, read_vocabulary
from softlabel.models import cifar
from softlabel.models.checkpoint import Checkpoint, read_checkpoint
from softlabel.models.factories import accepts, builder, call, classes_of
from softlabel.models.fitting import Fitted, fill, shown
from softlabel.models.from_export import ExportedProgram
from softlabel.models.from_hf import build_hf, hf_from_config, hf_preprocessing
from softlabel.models.from_lm import build_lm, check_vocabulary, lm_from_config, lm_transform, refuse_untrained
from softlabel.models.from_lm_python import OWN_OPTIONS, find_vocabulary, python_lm_transform, wrap_module
from softlabel.models.from_onnx import OnnxProgram
from softlabel.models.from_text import build_text, refuse_headless, text_from_config, text_transform, transform_of_run
from softlabel.models.from_timm import timm_preprocessing
from softlabel.models.from_torchvision import size_of_weights, torchvision_preprocessing, torchvision_weights
from softlabel.models.from_vllm import build_vllm
from softlabel.models.language_model import LanguageModel
from softlabel.models.options import PREPROCESSING_OPTIONS, WEIGHTS_KEY, refuse_others
from softlabel.models.program import Program
from softlabel.models.runs import network_of, read_run
from softlabel.models.weights import load_weights, plain_names

log = logging.getLogger("softlabel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network with its weights. `spec` names the set of weights that was taken, where the file has several."""

    spec: Spec
    model: nn.Module


def build_model(spec: Spec | str, *, num_classes: int | None = None, vocabulary: Vocabulary | None = None) -> nn.Module:
    """Build the network of a SPEC to train or to evaluate it, and load its checkpoint, see `build_network`."""
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    if spec.kind == "vllm":
        raise SpecError(f"{spec.text}: labels with 'softlabel generate' alone; give lm:{spec.name} here")
    return build_network(spec, num_classes=num_classes, vocabulary=vocabulary).model


def build_network(spec: Spec | str, *, num_classes: int | None = None, vocabulary: Vocabulary | None = None) -> Network:
    """Build the network of a SPEC and load its checkpoint, on the CPU, in training mode.

    Without `num_classes` (or an option of that name) the count is the checkpoint's, or else the builder's default. A
    checkpoint must have all of the network's tensors, in its shapes. What it has beside them is logged.

    Args:
        spec: the SPEC.
        num_classes: how many it must have.
        vocabulary: that a language model takes which has none of its own (``lm:python:`` without ``tokenizer=``).

    Raises:
        SpecError: an unknown name, an option that the builder refuses, a missing checkpoint or one of another network.
        TeacherError: a checkpoint that cannot be read safely.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    if spec.kind == "run":
        return Network(spec=spec, model=_build_run(spec, num_classes))
    if spec.kind == "hf":
        return Network(spec=spec, model=build_hf(spec, num_classes))
    if spec.kind == "text":
        return Network(spec=spec, model=build_text(spec, num_classes))
    if spec.kind == "lm":
        if spec.factory is not None:
            return _build_python_lm(spec, num_classes, vocabulary)
        return Network(spec=spec, model=build_lm(spec, num_classes))
    if spec.kind == "vllm":
        return Network(spec=spec, model=build_vllm(spec, num_classes))
    if spec.kind in ("pt2", "onnx"):
        return Network(spec=spec, model=ExportedProgram(spec) if spec.kind == "pt2" else OnnxProgram(spec))
    options = {k: literal(v) for k, v in spec.options.items() if k not in (*PREPROCESSING_OPTIONS, WEIGHTS_KEY)}
    wanted = spec.options.get(WEIGHTS_KEY)
    if wanted is not None and spec.checkpoint is None:
        raise SpecError(f"{spec.text}: {WEIGHTS_KEY} says which weights of a file are meant; give the file, NAME@FILE")
    make = builder(spec, options)
    found = read_checkpoint(spec.checkpoint, weights_key=wanted) if spec.checkpoint else None
    if num_classes is not None:
        if options.get("num_classes", num_classes) != num_classes:
            raise SpecError(
                f"{spec.text}: num_classes={options['num_classes']}, but {num_classes} classes are needed here"
            )
        options["num_classes"] = num_classes
    weights = {} if found is None else found.tensors if found.prefix else plain_names(found.tensors)
    options = {**_options_of_weights(spec, weights), **options}
    if found is not None and "num_classes" not in options and accepts(make, "num_classes"):
        options |= classes_of(spec, make, options, weights, prefix=found.prefix)
    if spec.kind == "python" and not accepts(make, "num_classes") and "num_classes" not in spec.options:
        options.pop("num_classes", None)  # a factory that knows its classes itself
    model = call(spec, make, options)
    if found is None:
        return Network(spec=spec, model=model)
    fitted = fill(spec, model, weights, prefix=found.prefix)
    return Network(spec=_naming_its_weights(spec, found, fitted), model=model)


def _options_of_weights(spec: Spec, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the builder's options that the weights of a file determine."""
    if spec.kind == "zoo":
        return cifar.options_of_weights(spec.name, weights)
    return dict(size_of_weights(spec, weights))


def _build_python_lm(spec: Spec, num_classes: int | None, given: Vocabulary | None) -> Network:
    vocabulary = find_vocabulary(spec, given)
    options = {k: literal(v) for k, v in spec.options.items() if k not in (*OWN_OPTIONS, WEIGHTS_KEY)}
    make = builder(spec, options)
    if accepts(make, "vocab_size"):
        options = {"vocab_size": vocabulary.size, **options}
    module = call(spec, make, options)
    if spec.checkpoint is not None:
        found = read_checkpoint(spec.checkpoint, weights_key=spec.options.get(WEIGHTS_KEY))
        weights = found.tensors if found.prefix else plain_names(found.tensors)
        spec = _naming_its_weights(spec, found, fill(spec, module, weights, prefix=found.prefix))
    return Network(spec=spec, model=wrap_module(spec, module, vocabulary, num_classes))


def _naming_its_weights(spec: Spec, found: Checkpoint, fitted: Fitted) -> Spec:
    """Say which weights were taken out of several, and what was left out of the file; the SPEC that says it as well."""
    if fitted.left_out:
        log.info(
            "%s: %d tensors of the checkpoint are no part of the network and were left out: %s",
            spec.text,
            len(fitted.left_out),
            shown(fitted.left_out),
        )
    others = (*found.others, *(one.rstrip(".") for one in fitted.other_prefixes))
    if not others or WEIGHTS_KEY in spec.options:
        return spec
    taken = ".".join(part for part in (found.key, fitted.prefix.rstrip(".")) if part)
    log.info(
        "%s: the checkpoint has several sets of weights: took %s, left out %s; '?%s=' in the SPEC chooses another",
        spec.text,
        taken or "those at its top",
        ", ".join(other or "those at its top" for other in others),
        WEIGHTS_KEY,
    )
    return replace(spec, options={**spec.options, WEIGHTS_KEY: taken}) if taken else spec


def _build_run(spec: Spec, num_classes: int | None) -> nn.Module:
    run = read_run(spec.name)
    refuse_others(spec)
    if num_classes not in (None, run.num_classes):
        raise SpecError(f"{spec.text}: the run has {run.num_classes} classes, but {num_classes} are needed here")
    run = network_of(run)
    student = parse_spec(run.student)
    weights = load_weights(Path(spec.name) / "model.safetensors")
    # Its own weights replace those that it started from, which may be gone by now.
    model: nn.Module
    if student.kind == "text" and run.config is not None:
        model = text_from_config(spec, run.config, run.num_classes)
    elif student.kind == "lm" and student.factory is None and run.config is not None:
        model = lm_from_config(spec, run.config, run.num_classes)
    elif student.kind == "hf" and run.config is not None:
        model = hf_from_config(spec, run.config, run.num_classes)
    else:
        replaced = ("weights", "pretrained", "tokenizer" if student.kind == "lm" else WEIGHTS_KEY, WEIGHTS_KEY)
        options = {k: v for k, v in student.options.items() if k not in replaced}
        options |= {k: str(v) for k, v in _options_of_weights(student, weights).items() if k not in options}
        bare = Spec(kind=student.kind, name=student.name, options=options)
        vocabulary = read_vocabulary(spec.name) if student.kind == "lm" else None
        model = build_model(bare, num_classes=run.num_classes, vocabulary=vocabulary)
    fill(spec, model.network if isinstance(model, LanguageModel) else model, weights)
    return model


def refuse_random(spec: Spec) -> None:
    """Raises SpecError for a network without weights, which would label with random numbers.

    A python: factory may load its own, a run: or a file has them.
    """
    if spec.kind == "text":
        refuse_headless(spec)
    if spec.kind == "lm" and spec.factory is None:
        refuse_untrained(spec)
    asked = {"torchvision": "weights=DEFAULT", "timm": "pretrained=true"}.get(spec.kind)
    option = literal(spec.options.get("pretrained", "null"))
    if spec.kind == "hf" and option is False:
        raise SpecError(f"{spec.text}: expected weights, found pretrained=false: random weights label nothing")
    found = torchvision_weights(spec) is not None or (spec.kind == "timm" and option not in (None, False))
    if spec.kind in ("zoo", "torchvision", "timm") and not spec.checkpoint and not found:
        named = f", or ask for those of {spec.kind} with ?{asked} (a download)" if asked else ""
        raise SpecError(
            f"{spec.text}: expected weights, found none: a network with random weights labels nothing. "
            f"Give a checkpoint, {spec.kind}:{spec.name}@FILE{named}"
        )


def own_preprocessing(spec: Spec, model: nn.Module | None, kind: str = Preprocessing.kind) -> InputTransform:
    """The preprocessing that belongs to a network for samples of a kind, before the options of its SPEC change it.

    Raises:
        SpecError: it is not known, or cannot be expressed.
    """
    if spec.kind == "run":
        recorded = transform_of(read_run(spec.name).preprocessing)
        if isinstance(recorded, TokenTransform):
            check_vocabulary(spec, recorded)
        return transform_of_run(spec, recorded) if isinstance(recorded, TextTransform) else recorded
    if spec.kind == "text":
        return text_transform(spec)
    if spec.kind in ("lm", "vllm"):
        return lm_transform(spec) if spec.factory is None else python_lm_transform(spec, model)
    if kind in (TokenTransform.kind, CHATS.name) and spec.kind != "python":
        raise SpecError(
            f"{spec.text}: takes images, and the samples are {KINDS[kind].noun}; give a language model, lm:FOLDER"
        )
    if kind == TextTransform.kind and spec.kind != "python":
        raise SpecError(f"{spec.text}: takes images, and the samples are texts; give a network of these, text:FOLDER")
    if kind == TensorTransform.kind and spec.kind not in ("python", "pt2", "onnx"):
        raise SpecError(
            f"{spec.text}: takes images, and the samples are arrays of numbers; give a network that takes these, as "
            "python:MODULE:FACTORY, or a .onnx or .pt2 file"
        )
    if spec.kind == "zoo":
        return Preprocessing(resize=32, crop=32)
    if spec.kind == "timm":
        return timm_preprocessing(spec, model)
    if spec.kind == "hf":
        return hf_preprocessing(spec)
    if spec.kind in ("pt2", "onnx"):
        program = model if isinstance(model, Program) else build_model(spec)
        assert isinstance(program, Program)
        return program.prepare_for(kind)
    if spec.kind == "python":
        found = getattr(model, "preprocessing", None)
        if isinstance(found, InputTransform):
            return found
        if isinstance(found, Mapping):
            return transform_of(found)
        if kind == TextTransform.kind:
            raise SpecError(
                f"{spec.text}: does not say how it takes texts; let the network have a TextTransform as its "
                "`preprocessing`"
            )
        return TensorTransform() if kind == TensorTransform.kind else Preprocessing()
    return torchvision_preprocessing(spec, model)
