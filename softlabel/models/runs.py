"""Run folders: a student that `softlabel train` left, which the SPEC ``run:FOLDER`` names."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from softlabel.common.activation import Activation
from softlabel.common.atomic_file import write_atomically
from softlabel.common.spec import Spec, parse_spec
from softlabel.errors import SpecError
from softlabel.inputs.tokenizer import TOKENIZER
from softlabel.models.from_hf import HuggingFaceClassifier
from softlabel.models.from_lm import TransformersLanguageModel
from softlabel.models.from_text import TextClassifier
from softlabel.models.language_model import LanguageModel
from softlabel.models.weights import plain_names


@dataclass(frozen=True, slots=True, kw_only=True)
class RunModel:
    """What `model.json` of a run folder says about the student beside it in `model.safetensors`.

    config: the architecture of a transformers student, so that the folder that it was read from may go. activation: of
    its outputs.
    """

    student: str
    num_classes: int
    preprocessing: Mapping[str, Any]
    config: Mapping[str, Any] | None = None
    activation: Activation = "softmax"


def network_of(run: RunModel) -> RunModel:
    """The run itself, or, of a student that started from another run, what that one says about its network.

    Raises:
        SpecError: the other run is not there any more.
    """
    while (spec := parse_spec(run.student)).kind == "run":
        run = read_run(spec.name)
    return run


def names_language_model(spec: Spec) -> bool:
    """Whether the network of a SPEC is a language model, or a run that trained one."""
    if spec.kind == "run":
        spec = parse_spec(network_of(read_run(spec.name)).student)
    return spec.kind in ("lm", "vllm")


def save_run(folder: str | os.PathLike[str], model: nn.Module, description: RunModel) -> None:
    """Write `model.safetensors` and `model.json` into a run folder, so that ``run:FOLDER`` is a SPEC."""
    folder = Path(folder)
    saved = model.network if isinstance(model, LanguageModel) else model
    state = {name: value.detach().cpu().contiguous() for name, value in saved.state_dict().items()}
    # safetensors refuses tensors that share memory, as tied weights do.
    state = {name: value.clone() for name, value in state.items()}
    write_atomically(folder / "model.safetensors", save(plain_names(state)))
    fields: dict[str, Any] = {
        "student": description.student,
        "num_classes": description.num_classes,
        "preprocessing": dict(description.preprocessing),
    }
    if description.activation != "softmax":
        fields["activation"] = description.activation
    config = description.config
    if isinstance(model, HuggingFaceClassifier | TransformersLanguageModel):
        config = model.config
    if config is not None:
        fields["config"] = dict(config)
    if isinstance(model, TextClassifier):
        write_atomically(folder / TOKENIZER, model.tokenizer.content)
    if isinstance(model, LanguageModel):
        # With the names of the network's own weights above, transformers reads the folder too.
        for name, content in model.files().items():
            write_atomically(folder / name, content)
    # Last: a folder with a model.json in it is a whole one.
    write_atomically(folder / "model.json", (json.dumps(fields, indent=2) + "\n").encode())


def read_run(folder: str | os.PathLike[str]) -> RunModel:
    """Read `model.json` of a run folder.

    Raises:
        SpecError: the folder is not that of a finished `softlabel train`.
    """
    path = Path(folder) / "model.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return RunModel(
            student=str(found["student"]),
            num_classes=int(found["num_classes"]),
            preprocessing=dict(found["preprocessing"]),
            config=dict(found["config"]) if "config" in found else None,
            activation="sigmoid" if found.get("activation") == "sigmoid" else "softmax",
        )
    except FileNotFoundError:
        raise SpecError(
            f"{folder}: expected the folder of a run of `softlabel train`, found no model.json in it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{path}: expected student, num_classes and preprocessing, found {error!r}") from error
