"""``timm:NAME``: networks of timm (pytorch-image-models), and the preprocessing that they were trained with."""

import logging
import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn

from softlabel.common.spec import Spec, literal
from softlabel.errors import SpecError
from softlabel.inputs.image_transform import INTERPOLATIONS, Preprocessing
from softlabel.models.options import says_everything

log = logging.getLogger("softlabel")


def timm_builder(spec: Spec, options: dict[str, Any]) -> Callable[..., nn.Module]:
    """`timm.create_model` for this name; nothing is downloaded unless ``pretrained=true`` asks for it.

    Raises:
        SpecError: timm is not installed, or has no such network.
    """
    timm = _timm(spec)
    if ":" in spec.name or not timm.is_model(spec.name):
        close = get_close_matches(spec.name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; timm.list_models() names them all"
        raise SpecError(f"{spec.text}: timm has no model {spec.name!r}{hint}")
    if spec.checkpoint and options.get("pretrained"):
        raise SpecError(f"{spec.text}: give either a checkpoint after '@' or pretrained=true, not both")
    if "checkpoint_path" in options:
        raise SpecError(f"{spec.text}: expected the checkpoint after '@', found checkpoint_path=")

    def create(**kwargs: Any) -> nn.Module:
        model: nn.Module = timm.create_model(spec.name, **kwargs)
        return model

    return create


def timm_preprocessing(spec: Spec, model: nn.Module | None) -> Preprocessing:
    """What timm's own evaluation does for this network (`timm.data.resolve_model_data_config`).

    Raises:
        SpecError: a crop, an interpolation or an input that cannot be expressed.
    """
    if says_everything(spec):
        return Preprocessing()
    timm = _timm(spec)
    from timm.data import resolve_data_config

    size = literal(spec.options.get("img_size", "null"))
    config: Any = model.pretrained_cfg if model is not None else timm.get_pretrained_cfg(spec.name).to_dict()
    # Weights have the sizes of timm's own evaluation: `test_input_size` and `test_crop_pct`, where they say any. A
    # network that begins at random has those that it is to be trained with.
    evaluated = bool(spec.checkpoint) or literal(spec.options.get("pretrained", "null")) not in (None, False)
    asked = {"img_size": size} if isinstance(size, int) else {}
    found = resolve_data_config(asked, pretrained_cfg=config, use_test_size=evaluated)
    channels, height, width = found["input_size"]
    problems = {
        f"{channels} channels": channels != 3,
        f"an input of {width} x {height}": height != width,
        f"crop mode {found['crop_mode']}": found["crop_mode"] not in ("center", "squash"),
        f"interpolation {found['interpolation']}": found["interpolation"] not in INTERPOLATIONS,
    }
    if wrong := [what for what, is_so in problems.items() if is_so]:
        raise SpecError(
            f"{spec.text}: timm prepares its images with {', '.join(wrong)}, which softlabel cannot; if another way "
            "does, say it with mean=, std=, resize=, crop= and interpolation="
        )
    prepared = Preprocessing(
        mean=tuple(map(float, found["mean"])),
        std=tuple(map(float, found["std"])),
        resize=math.floor(height / found["crop_pct"]),
        crop=height,
        interpolation=found["interpolation"],
        squash=found["crop_mode"] == "squash",
    )
    if spec.checkpoint and (left := prepared.describe_others(spec.options)):
        log.info(
            "%s: what the SPEC leaves open is prepared as for timm's weights %s: %s",
            spec.text,
            ".".join(filter(None, (str(config.get("architecture") or spec.name), str(config.get("tag") or "")))),
            left,
        )
    return prepared


def _timm(spec: Spec) -> Any:
    try:
        import timm
    except ImportError as error:
        raise SpecError(f"{spec.text}: needs timm ({error}); pip install 'softlabel[timm]'") from error
    return timm
