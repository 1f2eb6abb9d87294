"""Rows of a store as what the loss takes, whatever they are encoded as.

Legend: B batch, C classes, M members.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.labels.combine import Combination, combine, normalized_weights, retemperable
from softlabel.loss.targets import DenseTarget, HeadTarget, Int8Target, SampledTarget, Target, TopKTarget
from softlabel.store.decode import decode
from softlabel.store.manifest import Run

Columns = Mapping[str, NDArray[Any]]


def as_target(
    run: Run, columns: Columns, *, extra: Columns | None = None, combination: Combination | None = None
) -> Target:
    """The target that columns of a store hold.

    Args:
        columns: of B rows, as `Store.take` gives them. The target shares their memory where it may be written to;
            arrays that are read-only (mapped files) are copied.
        extra: the arrays that the store shares (`Store.extra`), for encoding ``head``.
        combination: how the members of a store that keeps them become one teacher; None: their mean probability at the
            store's temperature. Only such a store takes one.

    Raises:
        UsageError: a combination for a store that has combined its members already, or of another number of members.
    """
    if run.kept:
        return _combined(run, columns, combination or Combination(rule="probs"))
    if combination is not None:
        raise UsageError(
            f"combine: the store holds the {run.combine.rule} average of its members, which cannot be combined again; "
            "generate with --combine keep to choose weights while training"
        )
    exact = retemperable(run.combine.rule, len(run.members))
    temperature = run.temperature
    match run.encoding.name:
        case "float32" | "float16":
            return DenseTarget(scaled_logits=_own(columns["logits"]), temperature=temperature, retemperable=exact)
        case "int8":
            return Int8Target(
                q=_own(columns["q"]),
                scale=_own(columns["scale"])[:, 0],
                offset=_own(columns["offset"])[:, 0],
                top_index=_own(columns["top_index"]),
                top_value=_own(columns["top_value"]),
                temperature=temperature,
                retemperable=exact,
            )
        case "topk":
            return TopKTarget(
                index=_own(columns["index"]),
                value=_own(columns["value"]),
                tail=_own(columns["tail"]),
                tail_temperatures=run.encoding.temperatures,
                temperature=temperature,
                num_classes=run.num_classes,
            )
        case "sampled":
            return SampledTarget(
                index=_own(columns["index"]),
                weight=_own(columns["weight"]),
                temperature=temperature,
                num_classes=run.num_classes,
            )
        case "head":
            assert extra is not None, "a head store has its safetensors file"
            scale = columns.get("hidden_scale")
            return HeadTarget(
                hidden=_own(columns["hidden"]),
                hidden_scale=None if scale is None else _own(scale)[:, 0],
                weight=_own(extra["weight"]),
                bias=_own(extra["bias"]),
            )


def _combined(run: Run, columns: Columns, combination: Combination) -> DenseTarget:
    members = len(run.members)
    weights = normalized_weights(combination.weights, members)
    temperature = run.temperature if combination.temperature is None else combination.temperature
    scaled_logits_BMC = torch.from_numpy(
        decode(
            run.encoding,
            columns,
            num_classes=run.num_classes,
            temperature=run.temperature,
            members=members,
            kept=True,
        )
    )
    combined_BC = combine(
        list(scaled_logits_BMC.unbind(dim=1)),
        rule=combination.rule,
        temperature=temperature / run.temperature,
        weights=weights,
    )
    used = sum(weight > 0 for weight in weights)
    return DenseTarget(
        scaled_logits=combined_BC, temperature=temperature, retemperable=retemperable(combination.rule, used)
    )


def _own(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else np.array(array))
