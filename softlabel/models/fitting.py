"""Which tensors of a checkpoint are a network's, under whatever prefix a training script has put before their names."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from softlabel.common.spec import Spec
from softlabel.errors import SpecError
from softlabel.models.checkpoint import is_averaged

# What a checkpoint may have that a network has not: heads that were only trained with, and the counters of profilers.
_LEFT_OVER = re.compile(r"(^|\.)total_(ops|params)$|^aux\w*\.", re.IGNORECASE)
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The tensors of a network among those of a checkpoint.

    Attributes:
        weights: under the network's own names.
        prefix: what stood before them.
        left_out: names that are no part of the network.
        other_prefixes: under which the network could be found as well.
    """

    weights: dict[str, Tensor]
    prefix: str
    left_out: tuple[str, ...]
    other_prefixes: tuple[str, ...] = ()


def fit_names(
    subject: str, expected: Iterable[str], weights: Mapping[str, Tensor], *, prefix: str | None = None
) -> Fitted | None:
    """Find the tensors that a network expects; None where no prefix has all of them.

    Args:
        subject: what an error is about.
        expected: names of the network's parameters and buffers.
        weights: the checkpoint's.
        prefix: the only one to be tried; None: any.

    Raises:
        SpecError: they are there under several prefixes, none of which is meant.
    """
    every = list(expected)
    # Checkpoints from before PyTorch 0.4.1 have no such counters, and nothing is computed from them in eval mode.
    needed = [name for name in every if not name.endswith("num_batches_tracked")]
    if prefix is None and all(name in weights for name in needed):
        known = set(every)
        unknown = [name for name in weights if name not in known]
        if not all(map(_LEFT_OVER.search, unknown)):
            return None
        own = {name: value for name, value in weights.items() if name in known}
        return Fitted(weights=own, prefix="", left_out=tuple(unknown))
    found = [prefix] if prefix is not None else _prefixes(needed, weights)
    fitting = [one for one in found if (fitted := _under(one, every, needed, weights)) is not None]
    if not fitting:
        return None
    averaged = [one for one in fitting if is_averaged(one)]
    if len(averaged or fitting) > 1:
        named = " or ".join(f"weights_key={one.rstrip('.')}" for one in fitting)
        raise SpecError(f"{subject}: the checkpoint has several such networks; say which with ?{named}")
    (taken,) = averaged or fitting
    fitted = _under(taken, every, needed, weights)
    assert fitted is not None
    others = tuple(one for one in fitting if one != taken)
    # The other copies of the network are named as such, not tensor by tensor.
    left_out = tuple(name for name in fitted.left_out if not name.startswith(others or ("\0",)))
    if prefix is None and len(left_out) > len(fitted.weights):
        return None  # a small part of something larger: that it is meant has to be said
    return Fitted(weights=fitted.weights, prefix=taken, left_out=left_out, other_prefixes=others)


def _prefixes(needed: Collection[str], weights: Mapping[str, Tensor]) -> list[str]:
    """What stands before the first of the needed names, wherever it is the end of a name."""
    first = next(iter(needed), None)
    if first is None:
        return []
    return [name.removesuffix(first) for name in weights if name.endswith(f".{first}")]


def _under(prefix: str, every: Iterable[str], needed: Iterable[str], weights: Mapping[str, Tensor]) -> Fitted | None:
    if any(prefix + name not in weights for name in needed):
        return None
    own = {name: weights[prefix + name] for name in every if prefix + name in weights}
    rest = [name for name in weights if name.removeprefix(prefix) not in own or not name.startswith(prefix)]
    inside = [name.removeprefix(prefix) for name in rest if name.startswith(prefix)]
    if not all(map(_LEFT_OVER.search, inside)):
        return None  # a larger network, of which this one is a part by name alone
    return Fitted(weights=own, prefix=prefix, left_out=tuple(rest))


def fill(spec: Spec, model: nn.Module, weights: Mapping[str, Tensor], *, prefix: str | None = None) -> Fitted:
    """Load the weights, or say in one line what does not fit.

    Raises:
        SpecError: tensors are missing, unknown or of another shape.
    """
    expected = model.state_dict()
    fitted = fit_names(spec.text, expected, weights, prefix=prefix)
    if fitted is not None:
        found, problems = fitted.weights, []
    else:
        found = {name.removeprefix(prefix or ""): value for name, value in weights.items()}
        missing = [k for k in expected if k not in found and not k.endswith("num_batches_tracked")]
        unknown = [k for k in found if k not in expected]
        problems = [(missing, "missing"), (unknown, "unknown")]
    shapes = [
        f"{k} {tuple(found[k].shape)} where {tuple(v.shape)} is needed"
        for k, v in expected.items()
        if k in found and found[k].shape != v.shape
    ]
    if differences := [
        f"{len(names)} {what} ({shown(names)})" for names, what in (*problems, (shapes, "of another shape")) if names
    ]:
        raise SpecError(
            f"{spec.text}: the checkpoint's tensors do not fit the network: {'; '.join(differences)}. "
            f"Is it the same architecture and class count?{_elsewhere(expected, weights) if prefix is None else ''}"
        )
    assert fitted is not None
    model.load_state_dict(fitted.weights, strict=False)
    return fitted


def _elsewhere(expected: Collection[str], weights: Mapping[str, Tensor]) -> str:
    """The prefixes under which the network might be meant."""
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    there = [one for one in _prefixes(needed, weights) if all(one + name in weights for name in needed)]
    named = " or ".join(f"?weights_key={one.rstrip('.')}" for one in there[:_SHOWN])
    return f" Tensors of its names are under {named}" if named else ""


def shown(names: Collection[str]) -> str:
    """The first few of many names."""
    first = ", ".join(list(names)[:_SHOWN])
    return f"{first}, ..." if len(names) > _SHOWN else first
