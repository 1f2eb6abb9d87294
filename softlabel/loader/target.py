"""Rows of a store as what the loss takes, whatever they are encoded as.

Legend: B batch, C classes, M members.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.labels.combine import Combination, combine, normalized_weights, retemperable
from softlabel.loss.targets import DenseTarget, HeadTarget, Int8Target, SampledTarget, SigmoidTarget, Target, TopKTarget
from softlabel.store.columns import Columns
from softlabel.store.encodings import Encoding, Float16, Float32, Head, Int8, Sampled, TopK
from softlabel.store.manifest import Run
from softlabel.views.random import draw, uniforms

_MEMBER = 3001  # the number of a sample's stream that chooses its member

Tensors = Mapping[str, Any]


def make_target(
    run: Run,
    columns: Columns,
    *,
    extra: Columns | None = None,
    combination: Combination | None = None,
    members: NDArray[np.int64] | None = None,
) -> Target:
    """The target that columns of a store hold.

    Args:
        columns: of B rows, as `Store.take` gives them. The target shares their memory where it may be written to;
            arrays that are read-only (mapped files) are copied.
        extra: the arrays that the store shares (`Store.extra`), for an encoding that has some.
        combination: how the members of a store that keeps them become one teacher; None: their mean probability at the
            store's temperature. Only such a store takes one.
        members: int64 (B,), the member of each row, of rule ``random``; see `choose_members`.

    Raises:
        UsageError: a combination for a store that has combined its members already, or of another number of members; or
            rule ``random`` without `members`.
    """
    if run.kept:
        return _combined(run, columns, combination or Combination(rule="probs"), members)
    if combination is not None:
        raise UsageError(
            f"combine: the store holds the {run.combine.rule} average of its members, which cannot be combined again; "
            "generate with --combine keep to choose weights while training"
        )
    tensors = {column.name: _own(columns[column.name]) for column in run.label_columns}
    if run.activation == "sigmoid":
        return _sigmoid(run, tensors, extra)
    return _TARGETS.get(type(run.encoding), _decoded)(run, tensors, extra)


def _sigmoid(run: Run, columns: Tensors, extra: Columns | None) -> SigmoidTarget:
    if isinstance(run.encoding, Float16 | Float32):
        return SigmoidTarget(
            scaled_logits=columns["logits"], temperature=run.temperature, retemperable=_is_retemperable(run)
        )
    dense = _decoded(run, columns, extra)
    return SigmoidTarget(
        scaled_logits=dense.scaled_logits, temperature=dense.temperature, retemperable=dense.retemperable
    )


def _dense(run: Run, columns: Tensors, extra: Columns | None) -> DenseTarget:
    return DenseTarget(scaled_logits=columns["logits"], temperature=run.temperature, retemperable=_is_retemperable(run))


def _int8(run: Run, columns: Tensors, extra: Columns | None) -> Int8Target:
    columns = {**columns, "scale": columns["scale"][:, 0], "offset": columns["offset"][:, 0]}
    return Int8Target(**columns, temperature=run.temperature, retemperable=_is_retemperable(run))


def _topk(run: Run, columns: Tensors, extra: Columns | None) -> TopKTarget:
    known = run.encoding.declared or ()
    return TopKTarget(**columns, tail_temperatures=known, temperature=run.temperature, num_classes=run.num_classes)


def _sampled(run: Run, columns: Tensors, extra: Columns | None) -> SampledTarget:
    return SampledTarget(**columns, temperature=run.temperature, num_classes=run.num_classes)


def _head(run: Run, columns: Tensors, extra: Columns | None) -> HeadTarget:
    assert extra is not None, "a head store has its safetensors file"
    if "hidden_scale" in columns:
        columns = {**columns, "hidden_scale": columns["hidden_scale"][:, 0]}
    assert isinstance(run.encoding, Head)
    arrays = {name: _own(extra[name]) for name in ("weight", "bias")}
    return HeadTarget(**columns, **arrays, softcap=run.encoding.softcap)


def _decoded(run: Run, columns: Tensors, extra: Columns | None) -> DenseTarget:
    """Of an encoding that the loss has no form of its own for."""
    arrays = {name: column.numpy() for name, column in columns.items()}
    logits_BC = run.encoding.decode(arrays, num_classes=run.num_classes, temperature=run.temperature, extra=extra)
    return _dense(run, {"logits": torch.from_numpy(logits_BC)}, None)


# The form in which the loss takes the rows of an encoding; of any other, `_decoded`.
_TARGETS: dict[type[Encoding], Callable[[Run, Tensors, Columns | None], Target]] = {
    Float32: _dense,
    Float16: _dense,
    Int8: _int8,
    TopK: _topk,
    Sampled: _sampled,
    Head: _head,
}


def _is_retemperable(run: Run) -> bool:
    exact = retemperable(run.combine.rule, len(run.members))
    return exact and not (run.encoding.sparse or run.encoding.drawn)


def choose_members(
    combination: Combination | None, run: Run, keys: Sequence[str], *, seed: int, epoch: int
) -> NDArray[np.int64] | None:
    """The member of each sample in an epoch, int64 (B,), from (seed, key, epoch) alone; None for other rules than
    ``random``."""
    if combination is None or combination.rule != "random":
        return None
    weights_M = np.array(normalized_weights(combination.weights, len(run.members)))
    shares_B = uniforms(draw(keys, seed=seed, view=epoch), _MEMBER, 1)[:, 0]
    chosen_B = np.searchsorted(weights_M.cumsum(), shares_B, side="right")
    # Rounding may leave the last sum below 1.
    members_B: NDArray[np.int64] = np.minimum(chosen_B, np.flatnonzero(weights_M)[-1]).astype(np.int64)
    return members_B


def _combined(
    run: Run, columns: Columns, combination: Combination, members_B: NDArray[np.int64] | None
) -> DenseTarget | SigmoidTarget:
    members = len(run.members)
    weights = normalized_weights(combination.weights, members)
    kind = DenseTarget if run.activation == "softmax" else SigmoidTarget
    temperature = run.temperature if combination.temperature is None else combination.temperature
    scaled_logits_BMC = torch.from_numpy(
        run.encoding.decode(
            {column.name: columns[column.name] for column in run.label_columns},
            num_classes=run.num_classes,
            temperature=run.temperature,
            members=members,
            kept=True,
        )
    )
    if combination.rule == "random":
        if members_B is None:
            raise UsageError(
                "combine: random takes one member for each sample and epoch, which SoftLabelLoader alone knows; use "
                "logits or probs"
            )
        chosen_BC = scaled_logits_BMC[torch.arange(len(members_B)), torch.from_numpy(members_B)]
        return kind(scaled_logits=chosen_BC, temperature=run.temperature, retemperable=True)
    combined_BC = combine(
        list(scaled_logits_BMC.unbind(dim=1)),
        rule=combination.rule,
        temperature=temperature / run.temperature,
        weights=weights,
        activation=run.activation,
    )
    used = sum(weight > 0 for weight in weights)
    return kind(scaled_logits=combined_BC, temperature=temperature, retemperable=retemperable(combination.rule, used))


def _own(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else np.array(array))
