"""Options of a SPEC: which a builder takes, and what their values are."""

from collections.abc import Iterable
from dataclasses import replace

from softlabel.common.spec import Spec, literal
from softlabel.errors import SpecError

# How images are prepared; they are not the builder's.
PREPROCESSING_OPTIONS = ("mean", "std", "resize", "crop", "interpolation", "squash")
# Where a teacher's embedding and its maps of attention are taken; they are no option of the network.
FEATURE_OPTIONS = ("embedding", "attention")
# Which set of weights of a checkpoint is meant.
WEIGHTS_KEY = "weights_key"


def refuse_others(spec: Spec, known: Iterable[str] = ()) -> None:
    """Raises SpecError for an option that is neither of `known` nor about preprocessing."""
    expected = (*known, *PREPROCESSING_OPTIONS)
    if unknown := [name for name in spec.options if name not in expected]:
        raise SpecError(f"{spec.text}: expected no option but {', '.join(expected)}, found {unknown[0]!r}")


def without_options(spec: Spec, names: Iterable[str]) -> Spec:
    """The SPEC without some of its options."""
    options = {name: value for name, value in spec.options.items() if name not in set(names)}
    return replace(spec, options=options)


def says_everything(spec: Spec) -> bool:
    """Whether the options leave nothing of the preprocessing open."""
    return {"mean", "std", "resize", "crop", "interpolation"} <= set(spec.options)


def parse_count(spec: Spec, name: str, *, least: int = 1) -> int | None:
    """The whole number that an option has; None without it. Raises SpecError for anything else."""
    value = literal(spec.options.get(name, "null"))
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        above = "above 0" if least == 1 else f"of at least {least}"
        raise SpecError(f"{spec.text}: {name}: expected a whole number {above}, found {spec.options[name]!r}")
    return value


def parse_buckets(spec: Spec) -> tuple[int, ...]:
    """The lengths of ``buckets=``, none without it. Raises SpecError where they are no numbers."""
    text = spec.options.get("buckets", "")
    try:
        return tuple(int(one) for one in text.split(",")) if text else ()
    except ValueError:
        raise SpecError(f"{spec.text}: buckets: expected lengths such as 16,32,64, found {text!r}") from None
