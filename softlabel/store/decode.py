"""Stored columns -> scaled logits, in numpy; and what may not be in a column.

B rows, C classes, M members, R = B * M, K kept classes, S draws, D hidden width, E temperatures with a known tail.
"""

from collections.abc import Mapping

import numpy as np

from softlabel.store.columns import Array, Columns, Encoding

_MINUS_INF = 0xFC00  # the bits of float16


def decode(
    encoding: Encoding,
    columns: Columns,
    *,
    num_classes: int,
    temperature: float,
    members: int = 1,
    kept: bool = False,
    extra: Mapping[str, Array] | None = None,
) -> Array:
    """Scaled logits, float32, up to a constant per row: (B, C), or (B, M, C) when members are `kept` apart.

    temperature: the store's. extra: the arrays of the store's safetensors file (`head`).
    Where an encoding leaves something out: top-k spreads the tail evenly, unsampled classes are -inf.
    """
    flat = _by_member(columns, members)
    match encoding.name:
        case "float32" | "float16":
            logits_RC = flat["logits"].astype(np.float32)
        case "int8":
            logits_RC = flat["q"] * flat["scale"] + flat["offset"]
            np.put_along_axis(logits_RC, flat["top_index"].astype(np.int64), flat["top_value"].astype(np.float32), 1)
        case "topk":
            logits_RC = _topk(encoding, flat, num_classes, temperature)
        case "sampled":
            weights_RC = np.zeros((len(flat["index"]), num_classes), np.float64)
            rows = np.arange(len(weights_RC))[:, None]
            np.add.at(weights_RC, (rows, flat["index"].astype(np.int64)), flat["weight"])
            with np.errstate(divide="ignore"):
                logits_RC = np.log(weights_RC).astype(np.float32)
        case "head":
            assert extra is not None, "a head store needs its safetensors file"
            hidden_RD = flat["hidden"].astype(np.float32) * flat.get("hidden_scale", np.float32(1))
            logits_RC = (hidden_RD @ extra["weight"].T.astype(np.float32) + extra["bias"]) / np.float32(temperature)
    return logits_RC.reshape(-1, members, num_classes) if kept else logits_RC


def _by_member(columns: Columns, members: int) -> dict[str, Array]:
    """Columns (B, M * W) as (R, W)."""
    return {name: array.reshape(len(array) * members, array.shape[1] // members) for name, array in columns.items()}


def _topk(encoding: Encoding, flat: dict[str, Array], num_classes: int, temperature: float) -> Array:
    left_out = num_classes - encoding.kept(num_classes)
    tail_R = flat["tail"][:, tail_position(encoding, temperature)]
    logits_RC = np.repeat((tail_R - np.log(max(1, left_out)))[:, None], num_classes, axis=1).astype(np.float32)
    np.put_along_axis(logits_RC, flat["index"].astype(np.int64), flat["value"].astype(np.float32), 1)
    return logits_RC


def tail_position(encoding: Encoding, temperature: float) -> int:
    """Which of the declared temperatures this is. KeyError when it was not declared."""
    for position, known in enumerate(encoding.temperatures):
        if abs(known - temperature) <= 1e-6 * temperature:
            return position
    raise KeyError(temperature)


def problem(encoding: Encoding, columns: Columns, *, num_classes: int, members: int = 1) -> str | None:
    """What is wrong with stored values, None when nothing. -inf is a masked class; NaN and +inf are always wrong."""
    flat = _by_member(columns, members)
    if not any(len(array) for array in flat.values()):
        return None
    if encoding.name == "float16":
        return _float16_problem(flat["logits"], members)
    for name, array in flat.items():
        if array.dtype.kind == "f":
            masked = name in ("logits", "top_value", "value", "tail")
            wrong = (np.isnan(array) | (array == np.inf) | (False if masked else array == -np.inf)).any(axis=1)
            if wrong.any():
                return f"row {int(wrong.argmax()) // members} of a block: `{name}` is not finite"
        elif name.endswith("index"):
            wrong = (array.astype(np.int64) >= num_classes).any(axis=1) | (array.astype(np.int64) < 0).any(axis=1)
            if wrong.any():
                return f"row {int(wrong.argmax()) // members} of a block: `{name}` is not a class"
    leader = {"float32": "logits", "int8": "top_value", "topk": "value"}.get(encoding.name)
    if leader is not None and (wrong := flat[leader].max(axis=1) != 0).any():
        return f"row {int(wrong.argmax()) // members} of a block: the maximum of `{leader}` is not 0"
    if encoding.name == "sampled":
        if (wrong := (flat["weight"] < 0).any(axis=1) | ~(flat["weight"] > 0).any(axis=1)).any():
            return f"row {int(wrong.argmax()) // members} of a block: `weight` is negative or all 0"
    elif "index" in flat or "top_index" in flat:
        index = np.sort(flat["index"] if "index" in flat else flat["top_index"], axis=1)
        if (wrong := (index[:, 1:] == index[:, :-1]).any(axis=1)).any():
            return f"row {int(wrong.argmax()) // members} of a block: a class occurs twice"
    return None


def float16_clean(logits_RC: Array) -> bool:
    """Whether 0 is the maximum of every row and nothing is NaN."""
    # By their bits, which is much faster: 0 is the greatest int16 of a float16 that is not positive, and NaN with a
    # sign the greatest uint16. Flat where it can be: the processor then compares 32 numbers at once.
    bits = logits_RC.reshape(-1).view(np.int16)
    tops_R = np.maximum.reduceat(bits, np.arange(0, len(bits), logits_RC.shape[1]))
    return not tops_R.any() and bool(bits.view(np.uint16).max() <= _MINUS_INF)


def _float16_problem(logits_RC: Array, members: int) -> str | None:
    if float16_clean(logits_RC):
        return None
    wrong_R = (logits_RC.view(np.int16).max(axis=1) != 0) | np.isnan(logits_RC).any(axis=1)
    row = int(np.flatnonzero(wrong_R)[0])
    found = logits_RC[row].max()  # a row of masked classes only has -inf
    return f"row {row // members} of a block: the maximum of `logits` is {found}, expected 0"
