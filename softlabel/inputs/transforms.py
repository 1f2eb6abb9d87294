"""The transforms by the kind that they take."""

from collections.abc import Mapping
from typing import Any

from softlabel.errors import SpecError
from softlabel.inputs.base import InputKind, InputTransform
from softlabel.inputs.image_decode import IMAGES
from softlabel.inputs.image_transform import Preprocessing
from softlabel.inputs.tensor import TensorTransform
from softlabel.inputs.text import TEXTS, TextTransform

_TRANSFORMS: dict[str, type[Preprocessing] | type[TensorTransform] | type[TextTransform]] = {
    Preprocessing.kind: Preprocessing,
    TensorTransform.kind: TensorTransform,
    TextTransform.kind: TextTransform,
}


def transform_of(found: Mapping[str, Any]) -> InputTransform:
    """A transform as its `to_dict` gave it.

    Raises:
        SpecError: of a kind that is not known, or with other fields.
    """
    kind = found.get("kind", Preprocessing.kind)  # images were the only kind when these were first written
    if kind not in _TRANSFORMS:
        raise SpecError(f"preprocessing: expected kind {' or '.join(_TRANSFORMS)}, found {kind!r}")
    return _TRANSFORMS[kind].from_dict(found)


def default_transform(kind: InputKind) -> InputTransform:
    """What takes samples of a kind as they are: pixels as numbers from 0 to 1, arrays of numbers unchanged.

    Raises:
        SpecError: of texts, which only a tokenizer makes numbers of.
    """
    if kind is TEXTS:
        raise SpecError(
            "preprocessing: texts need a network's tokenizer; give preprocessing="
            "softlabel.models.teacher.student_preprocessing('text:FOLDER', kind='text')"
        )
    return Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) if kind is IMAGES else TensorTransform()
