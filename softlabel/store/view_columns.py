"""Columns that describe the view of a row, derived from the view policy, and their checks.

B rows, W elements of a column in one row.

A policy is `{"name": ..., "steps": [{"op": ...}, ...]}`; without steps a view is the unchanged image and has no
columns. FORMAT.md defines the steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from softlabel.store.columns import Column, Columns

CROPS = ("crop-flip", "inception")  # steps that choose a box and whether to mirror
MIXES = ("mixup", "cutmix")  # steps that mix in another sample
BOX, FLIP, DIGEST = "view_box", "view_flip", "view_xxh3"
PARTNER, PARTNER_BOX, PARTNER_FLIP = "view_partner", "view_partner_box", "view_partner_flip"
WEIGHT, PASTE = "view_weight", "view_paste"


def view_columns(policy: Mapping[str, Any]) -> tuple[Column, ...]:
    """Return the view columns of a policy.

    Raises:
        ValueError: the policy is malformed.
    """
    steps = policy.get("steps", [])
    if not isinstance(steps, list | tuple) or not all(
        isinstance(step, Mapping) and isinstance(step.get("op"), str) for step in steps
    ):
        raise ValueError("views.policy.steps: expected a list of objects with an 'op'")
    if not steps:
        return ()
    crop = any(step["op"] in CROPS for step in steps)
    mixes = [step["op"] for step in steps if step["op"] in MIXES]
    columns = []
    if crop:
        columns += [Column(name=BOX, dtype="<i4", width=4), Column(name=FLIP, dtype="|u1", width=1)]
    if mixes:
        columns += [Column(name=PARTNER, dtype="<u8", width=2), Column(name=WEIGHT, dtype="<f4", width=1)]
        if crop:
            columns += [Column(name=PARTNER_BOX, dtype="<i4", width=4), Column(name=PARTNER_FLIP, dtype="|u1", width=1)]
        if "cutmix" in mixes:
            columns += [Column(name=PASTE, dtype="<i4", width=4)]
    return (*columns, Column(name=DIGEST, dtype="<u8", width=1))


def view_problem(columns: Columns) -> str | None:
    """Return the first problem of stored view columns (B, W), or None."""
    for name, array in columns.items():
        if name in (BOX, PARTNER_BOX):
            wrong_B = (array[:, 2:] < 1).any(axis=1)
        elif name in (FLIP, PARTNER_FLIP):
            wrong_B = (array > 1).any(axis=1)
        elif name == WEIGHT:
            wrong_B = ~((array >= 0) & (array <= 1)).all(axis=1)
        elif name == PASTE:
            wrong_B = (array < 0).any(axis=1)
        else:
            continue
        if wrong_B.any():
            return f"row {int(np.flatnonzero(wrong_B)[0])} of a block: `{name}` is out of range"
    return None
