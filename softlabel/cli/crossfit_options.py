"""Options of `crossfit`: those of `train` for a teacher of hard labels, and those of `generate` for its labels."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Union

import docstring_parser

from softlabel.generation.config import GenerateConfig
from softlabel.training.config import TrainConfig
from softlabel.training.fold_plan import TRAINING

_TEXTS = {
    "batch_size": "samples a step; labels are computed in batches of twice as many.",
    "seed": "of the folds, and of the teachers' weights, order and augmentation.",
    "precision": "of training, as in 'softlabel train'; labels are computed in fp32 unless bf16 or fp16 is given.",
    "augment": "crop-flip (pad by `crop_padding`, crop, mirror; the default of images), crop (without mirroring) or "
    "none, for the training of the teachers; their labels are those of the un-augmented samples.",
    "eval_data": "a SOURCE on which the accuracy of every teacher is measured; not the data of the folds.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """Base of the options about training, whose fields are those of `TrainConfig`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabellingOptions:
    """Base of the options about labels, whose fields are those of `GenerateConfig`."""

    temperature: float


B = TypeVar("B")


def pick_fields(base: type[B], config: type, names: Sequence[str], texts: Mapping[str, str]) -> type[B]:
    """Make a dataclass of some fields of another one, each with a single value."""
    hints = typing.get_type_hints(config)
    found = {
        one.arg_name: " ".join((one.description or "").split())
        for kind in reversed(config.__mro__)
        for one in docstring_parser.parse(inspect.getdoc(kind) or "").params
    }
    listed = "\n".join(f"    {one}: {texts.get(one, found[one])}" for one in names)
    own = {field.name: field for field in dataclasses.fields(config)}
    return dataclasses.make_dataclass(
        base.__name__,
        [(one, _drop_lists(hints[one]), own[one].default) for one in names],
        bases=(base,),
        namespace={"__doc__": f"Options.\n\nAttributes:\n{listed}"},
        frozen=True,
        slots=True,
        kw_only=True,
    )


def _drop_lists(hint: Any) -> Any:
    """Return the type of one value of an option that also takes several."""
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return hint
    parts = typing.get_args(hint)
    single = [part for part in parts if typing.get_origin(part) is not list]
    return Union[tuple(single)] if single != [type(None)] else hint  # noqa: UP007


OfTraining = pick_fields(TrainingOptions, TrainConfig, TRAINING, _TEXTS)
OfLabels = pick_fields(LabellingOptions, GenerateConfig, ("temperature", "format", "shard_rows"), {})
