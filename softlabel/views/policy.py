"""View policies: parsed from a user's text, and as a store keeps them.

A policy is a list of steps: at most one crop (`crop-flip`, `inception`), then torchvision transforms by name, then at
most one mixing step (`mixup`, `cutmix`) or `noise-pair`, which shows noisy copies beside the view. `center` has no
steps: the view is the unchanged image.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from softlabel.common.spec import literal, split_options
from softlabel.errors import UsageError, one_line
from softlabel.store.view_columns import PAIR, ViewPolicy
from softlabel.views.boxes import CropFlipStep, CropStep, InceptionStep
from softlabel.views.mix_ops import MixStep
from softlabel.views.noise_pair import NoisePairStep
from softlabel.views.torchvision_ops import fixes_size, named, transform_of

if TYPE_CHECKING:
    from torchvision.transforms import v2

CENTER = "center"
_FILES = (".yaml", ".yml", ".json")
_ALIASES = {"trivial": "TrivialAugmentWide", "randaugment": "RandAugment"}
_ALPHA = {"mixup": 0.2, "cutmix": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A policy ready for use.

    Attributes:
        crop: the cropping step; None: the whole image.
        transforms: torchvision transforms, in order.
        mix: the mixing step, or None.
        pair: the noisy copies that are shown beside each view, or None.
        fixed: whether views of images of all sizes have one size.
    """

    crop: CropStep | None
    transforms: "tuple[v2.Transform, ...]"
    mix: MixStep | None
    pair: NoisePairStep | None
    fixed: bool

    @classmethod
    def of(cls, policy: Mapping[str, Any]) -> "Policy | None":
        """Build the policy of a store (`Run.views.policy`); None if views are the unchanged images.

        Raises:
            UsageError: a step is unknown or in the wrong place.
        """
        crop: CropStep | None = None
        mix: MixStep | None = None
        pair: NoisePairStep | None = None
        transforms: list[v2.Transform] = []
        fixed = False
        for step in policy.get("steps", ()):
            op, rest = step["op"], {name: value for name, value in step.items() if name != "op"}
            if mix is not None or pair is not None:
                last = PAIR if mix is None else mix.kind
                raise UsageError(f"augment: expected {last} as the last step, found {op} after it")
            if op in _MAKE_CROP:
                if crop is not None or transforms:
                    raise UsageError(f"augment: expected {op} as the first step and the only one that crops")
                crop = _MAKE_CROP[op](rest)
                fixed = crop.fixed
            elif op in _ALPHA:
                mix = _make_mix(op, rest)
            elif op == PAIR:
                pair = _make_pair(rest)
            else:
                arguments = rest.get("arguments", {})
                if not isinstance(arguments, Mapping):
                    raise UsageError(f"augment: {op}: expected arguments by name, found {arguments!r}")
                transforms.append(transform_of(op, arguments))
                fixed = fixed or fixes_size(op, arguments)
        if crop is None and mix is None and pair is None and not transforms:
            return None
        return cls(crop=crop, transforms=tuple(transforms), mix=mix, pair=pair, fixed=fixed)


def parse_policy(text: str) -> dict[str, Any]:
    """Parse the text of `--augment` into the form that a store keeps.

    Args:
        text: a preset with options (``inception?size=160``), several joined by ``+`` (``crop-flip+mixup``), or a YAML
            file with a list of presets and names of transforms in torchvision.transforms.v2.

    Raises:
        UsageError: a step is unknown or in the wrong place.
    """
    if text.endswith(_FILES):
        entries = _read_file(text)
    else:
        entries = [_parse_preset(part) for part in text.split("+")]
    steps = [_complete_step(*named(entry)) for entry in entries]
    if [step["op"] for step in steps] == [CENTER]:
        return {"name": CENTER}
    if any(step["op"] == CENTER for step in steps) or not steps:
        raise UsageError(f"augment: expected center alone or steps, found {text!r}; center is the unchanged image")
    found: dict[str, Any] = {"name": "+".join(step["op"] for step in steps), "steps": steps}
    Policy.of(found)  # checks the order of steps
    return found


def view_policy(augment: str, *, count: int, seed: int) -> ViewPolicy:
    """Return the policy of `count` views of every sample (see `parse_policy` for `augment`).

    Raises:
        UsageError: as `parse_policy`, or all views would be the same.
    """
    if not 1 <= count < 1 << 31:
        raise UsageError(f"views: expected at least 1, found {count}")
    policy = parse_policy(augment)
    if count > 1 and "steps" not in policy:
        raise UsageError(
            f"views: center is the unchanged image, {count} views of it would be the same label {count} times; choose "
            "an augmentation, for example --augment crop-flip"
        )
    return ViewPolicy(count=count, policy=policy, seed=seed)


def _read_file(path: str) -> list[Any]:
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"augment: {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"augment: {path} is not YAML: {one_line(error)}") from None
    if not isinstance(found, list):
        raise UsageError(
            f"augment: {path}: expected a list of steps, found {type(found).__name__}; for example '- inception: "
            "{size: 160}' and '- TrivialAugmentWide' on a line each"
        )
    return found


def _parse_preset(text: str) -> dict[str, dict[str, Any]]:
    name, options = split_options(text, subject=text)
    return {name: {option: literal(value) for option, value in options.items()}}


def _complete_step(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a step with all its parameters explicit: defaults may change later, stores must not."""
    if name == CENTER and not arguments:
        return {"op": CENTER}
    if name in _MAKE_CROP:
        return {"op": name, **_to_json(asdict(_MAKE_CROP[name](arguments)))}
    if name in _ALPHA:
        return {"op": name, "alpha": _make_mix(name, {"alpha": _ALPHA[name], **arguments}).alpha}
    if name == PAIR:
        return {"op": name, **asdict(_make_pair(arguments))}
    if name == "randaugment":
        arguments = {"num_ops": 2, "magnitude": 9, **arguments}
    name = _ALIASES.get(name, name)
    transform_of(name, arguments)
    return {"op": name, **({"arguments": _to_json(arguments)} if arguments else {})}


def _make_crop_flip(arguments: Mapping[str, Any]) -> CropStep:
    return CropFlipStep(**_check_options(CropFlipStep, "crop-flip", arguments))


def _make_inception(arguments: Mapping[str, Any]) -> CropStep:
    pairs = {name: _parse_pair(name, arguments[name]) for name in ("scale", "ratio") if name in arguments}
    return InceptionStep(**_check_options(InceptionStep, "inception", {**arguments, **pairs}))


_MAKE_CROP: dict[str, Callable[[Mapping[str, Any]], CropStep]] = {
    "crop-flip": _make_crop_flip,
    "inception": _make_inception,
}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "padding": int,
    "size": int,
    "flip": bool,
    "interpolation": str,
    "alpha": (int, float),
    "step": int,
    "directions": int,
}


def _make_pair(arguments: Mapping[str, Any]) -> NoisePairStep:
    return NoisePairStep(**_check_options(NoisePairStep, PAIR, arguments))


def _make_mix(name: str, arguments: Mapping[str, Any]) -> MixStep:
    return MixStep(kind=name, **_check_options(MixStep, name, arguments))  # type: ignore[arg-type]


def _check_options(kind: Any, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    known = [one for one in kind.__dataclass_fields__ if one != "kind"]
    for argument, value in arguments.items():
        if argument not in known:
            raise UsageError(f"augment: {name} has no option {argument!r}; it has {', '.join(known)}")
        wanted = _KINDS.get(argument, object)
        if not isinstance(value, wanted) or (wanted is not bool and wanted is not object and isinstance(value, bool)):
            raise UsageError(f"augment: {name}: {argument} cannot be {value!r}")
    return dict(arguments)


def _parse_pair(name: str, value: Any) -> tuple[float, float]:
    numbers = [one for one in value if isinstance(one, int | float)] if isinstance(value, list | tuple) else []
    if len(numbers) != 2 or len(value) != 2 or not all(map(math.isfinite, numbers)):
        raise UsageError(f"augment: expected two numbers for {name}, such as [0.08, 1.0], found {value!r}")
    return float(numbers[0]), float(numbers[1])


def _to_json(value: Any) -> Any:
    """Return the value in JSON types."""
    if isinstance(value, Mapping):
        return {str(name): _to_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(one) for one in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise UsageError(f"augment: expected numbers, texts and lists as arguments, found {value!r}")
