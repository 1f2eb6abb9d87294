"""The transforms by the kind that they take."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from softlabel.errors import BadImageError, DataError, SpecError, one_line
from softlabel.inputs.base import InputKind, Inputs, InputTransform, Sample
from softlabel.inputs.chat import CHATS
from softlabel.inputs.image_decode import IMAGES
from softlabel.inputs.image_transform import Preprocessing
from softlabel.inputs.tensor import BANDS, TENSORS, TensorTransform
from softlabel.inputs.text import TEXTS, TextTransform
from softlabel.inputs.tokens import TOKENS, TokenTransform

_TRANSFORMS: dict[str, type[Preprocessing] | type[TensorTransform] | type[TextTransform] | type[TokenTransform]] = {
    Preprocessing.kind: Preprocessing,
    TensorTransform.kind: TensorTransform,
    TextTransform.kind: TextTransform,
    TokenTransform.kind: TokenTransform,
}

# By the name in a manifest.
KINDS: dict[str, InputKind] = {kind.name: kind for kind in (IMAGES, TENSORS, TEXTS, CHATS, TOKENS)}

# In errors of torch about tensors of another type.
_OF_TYPES = ("same dtype", "scalar type", "should be the same", "not implemented for '", "expected whole numbers")


def transform_of(found: Mapping[str, Any]) -> InputTransform:
    """A transform as its `to_dict` gave it.

    Raises:
        SpecError: of a kind that is not known, or with other fields.
    """
    kind = found.get("kind", Preprocessing.kind)  # images were the only kind when these were first written
    if kind not in _TRANSFORMS:
        raise SpecError(f"preprocessing: expected kind {' or '.join(_TRANSFORMS)}, found {kind!r}")
    return _TRANSFORMS[kind].from_dict(found)


def describe_failure(transform: InputTransform, inputs: Inputs, error: Exception, *, network: str) -> str:
    """Say in one line that a network raised an error on a batch, and what a user can do about it.

    Args:
        transform: the network's.
        inputs: the batch.
        error: what it raised.
        network: "teacher", "student" or "model".
    """
    size = " and ".join(map(transform.describe, inputs.shapes))
    found = f"{type(error).__name__}: {one_line(error)}"
    return f"the network fails on samples of {size}: {found}; {_find_remedy(transform, inputs, error, network)}"


def _find_remedy(transform: InputTransform, inputs: Inputs, error: Exception, network: str) -> str:
    reason = str(error)
    if "view size is not compatible" in reason:
        return "use .reshape or .flatten in the network instead of .view, which depends on the memory layout"
    if isinstance(transform, TensorTransform) and any(words in reason for words in _OF_TYPES):
        found = ", ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in inputs.form.values()}))
        whole = "; '?mean=0&std=1' in its SPEC makes them float32" if found == "int64" else ""
        return f"its samples are {found}: give the {network} samples of the type that it takes{whole}"
    if isinstance(transform, TensorTransform):
        if isinstance(error, TypeError) and "argument" in reason:
            names = ", ".join(inputs.tensors) if len(inputs.tensors) > 1 else "a single array"
            return f"its samples are {names}: name arrays like the arguments of the network's forward"
        return f"give the {network} samples of the shape that it takes"
    return transform.remedy.format(network=network)


def default_transform(kind: InputKind, samples: Iterable[Sample]) -> InputTransform:
    """What takes samples of a kind as they are: pixels as numbers from 0 to 1, arrays of numbers unchanged.

    Args:
        kind: the kind.
        samples: of the source, of which images of many bands are read until one says how many channels they have.

    Raises:
        SpecError: of texts, which only a tokenizer makes numbers of.
    """
    if kind in (CHATS, TOKENS):
        raise SpecError(
            f"preprocessing: {kind.noun} need a language model's vocabulary; give preprocessing= of lm:FOLDER"
        )
    if kind == TEXTS:
        raise SpecError(
            "preprocessing: texts need a network's tokenizer; give preprocessing="
            "softlabel.models.teacher.student_preprocessing('text:FOLDER', kind='text')"
        )
    if kind not in (IMAGES, BANDS):
        return TensorTransform()
    channels = 3 if kind == IMAGES else _count_channels(samples)
    return Preprocessing(mean=(0.0,) * channels, std=(1.0,) * channels)


def _count_channels(samples: Iterable[Sample]) -> int:
    for sample in samples:
        try:
            item, _ = BANDS.decode(sample)
        except BadImageError:
            continue
        assert isinstance(item, Tensor)
        return len(item)
    raise DataError("preprocessing: no sample can be read that says how many channels they have; give preprocessing=")
