"""torchvision transforms by name, built without executing user code and seeded per sample.

Legend: H and W pixels.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from softlabel.errors import UsageError

if TYPE_CHECKING:  # imported where it is needed, see `softlabel.inputs.image_transform.resize_pixels`
    from torchvision.transforms import v2

# Transforms of torchvision.transforms.v2 that a view cannot use, and why.
_REFUSED = {
    "Transform": "is not a transform of its own",
    "Lambda": "takes a function",
    "MixUp": "mixes a batch; use mixup",
    "CutMix": "mixes a batch; use cutmix",
    "Normalize": "belongs to each teacher and student, after the view",
    "LinearTransformation": "belongs to each teacher and student, after the view",
    "ToDtype": "changes the type of the pixels",
    "ConvertImageDtype": "changes the type of the pixels",
    "ToTensor": "changes the type of the pixels",
    "ToPILImage": "changes the type of the pixels",
    "FiveCrop": "gives several images",
    "TenCrop": "gives several images",
    "UniformTemporalSubsample": "is for videos",
}
# Transforms that give images of all sizes one size.
_FIXES_SIZE = ("RandomResizedCrop", "RandomCrop", "CenterCrop")


def transform_of(name: str, arguments: Mapping[str, Any]) -> "v2.Transform":
    """Build the transform of a name in torchvision.transforms.v2.

    Raises:
        UsageError: the name is unknown or refused, or the arguments are wrong.
    """
    from torchvision.transforms import v2

    kind = getattr(v2, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not (inspect.isclass(kind) and issubclass(kind, v2.Transform)):
        raise UsageError(
            "augment: expected center, crop-flip, inception, trivial, randaugment, mixup, cutmix, noise-pair, or the "
            f"name of a transform in torchvision.transforms.v2, found {name!r}"
        )
    if name in _REFUSED:
        raise UsageError(f"augment: {name} {_REFUSED[name]} and cannot be part of a view")
    known = set(inspect.signature(kind).parameters)
    if odd := set(arguments) - known:
        raise UsageError(f"augment: {name} has no argument {sorted(odd)[0]!r}; it has {', '.join(sorted(known))}")
    try:
        made: v2.Transform = kind(**{one: _parse_value(name, one, value) for one, value in arguments.items()})
    except UsageError:
        raise
    except Exception as error:  # torchvision's own checks: TypeError, ValueError, KeyError, ...
        raise UsageError(f"augment: {name} does not take {dict(arguments)}: {error}") from None
    return made


def named(entry: Any) -> tuple[str, dict[str, Any]]:
    """Parse a step, ``Name`` or ``{Name: {argument: value}}``, into (name, arguments).

    Raises:
        UsageError: the step has another form.
    """
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, arguments),) = entry.items()
        if isinstance(name, str) and (arguments is None or isinstance(arguments, Mapping)):
            return name, {str(one): value for one, value in (arguments or {}).items()}
    raise UsageError(f"augment: expected 'Name' or 'Name: {{argument: value}}' for a step, found {entry!r}")


def _parse_value(name: str, argument: str, value: Any) -> Any:
    from torchvision.transforms import v2

    if argument == "interpolation" and isinstance(value, str):
        return v2.InterpolationMode(value)
    if argument == "policy" and isinstance(value, str):
        return v2.AutoAugmentPolicy(value)
    if argument in ("transforms", "transform"):
        if not isinstance(value, list | tuple):
            raise UsageError(f"augment: {name}: expected a list of transforms, found {value!r}")
        return [transform_of(*named(one)) for one in value]
    return tuple(value) if isinstance(value, list) else value


def fixes_size(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a transform gives all images one size."""
    if name == "Resize":
        return isinstance(arguments.get("size"), list | tuple) and len(arguments["size"]) == 2
    return name in _FIXES_SIZE


def run(transforms: "Sequence[v2.Transform]", image_CHW: Tensor, seed: int) -> Tensor:
    """Apply transforms, with all their random numbers derived from `seed`.

    Args:
        transforms: in order.
        image_CHW: uint8 (3, H, W).
        seed: 0 to 2^63 - 1.

    Returns:
        uint8 (3, H', W').

    Raises:
        ValueError: a transform failed, or its result is not a uint8 RGB image.
    """
    with _SeededMode(seed):
        # Kernels may round differently for another memory layout.
        seen = image_CHW.contiguous()
        for transform in transforms:
            try:
                seen = transform(seen)
            except Exception as error:
                raise ValueError(f"{type(transform).__name__}: {error}") from error
    if not isinstance(seen, Tensor) or seen.dtype != torch.uint8 or seen.dim() != 3 or seen.shape[0] != 3:
        found = f"{seen.dtype} {tuple(seen.shape)}" if isinstance(seen, Tensor) else type(seen).__name__
        raise ValueError(f"expected uint8 pixels (3, H, W) after {type(transforms[-1]).__name__}, found {found}")
    return seen


class _SeededMode(TorchFunctionMode):
    """Draws all of torch's random numbers in the block from its own generator.

    Another thread may draw from torch's global generator, which would make the numbers depend on timing.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _LIKE:
            like, *rest = args
            options = {"dtype": like.dtype, "device": like.device, **options}
            options.pop("memory_format", None)
            return _LIKE[func](*rest, like.shape, generator=self._generator, **options)
        if func in _RANDOM:
            options["generator"] = self._generator
        return func(*args, **options)


_RANDOM: set[Any] = {
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.multinomial,
    torch.normal,
    torch.bernoulli,
    torch.poisson,
    torch._sample_dirichlet,
    *(
        getattr(torch.Tensor, name)
        for name in ("uniform_", "normal_", "random_", "bernoulli_", "exponential_", "geometric_", "log_normal_")
    ),
    torch.Tensor.cauchy_,
    torch.Tensor.multinomial,
    torch.Tensor.bernoulli,
}
_LIKE: dict[Any, Callable[..., Tensor]] = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
