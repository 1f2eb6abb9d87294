"""Options of a SPEC that say how images are prepared; they are not the builder's."""

from collections.abc import Iterable

from softlabel.common.spec import Spec
from softlabel.errors import SpecError

PREPROCESSING_OPTIONS = ("mean", "std", "resize", "crop", "interpolation", "squash")
# Which set of weights of a checkpoint is meant.
WEIGHTS_KEY = "weights_key"


def refuse_others(spec: Spec, known: Iterable[str] = ()) -> None:
    """Raises SpecError for an option that is neither of `known` nor about preprocessing."""
    expected = (*known, *PREPROCESSING_OPTIONS)
    if unknown := [name for name in spec.options if name not in expected]:
        raise SpecError(f"{spec.text}: expected no option but {', '.join(expected)}, found {unknown[0]!r}")


def says_everything(spec: Spec) -> bool:
    """Whether the options leave nothing of the preprocessing open."""
    return {"mean", "std", "resize", "crop", "interpolation"} <= set(spec.options)
