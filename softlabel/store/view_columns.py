"""What a row says of its view: the columns that follow from a view policy, and what may not be in them.

B rows, W elements of a column in one row.

A policy is `{"name": ..., "steps": [{"op": ...}, ...]}`; without steps a view is the image as it is, and its row says
nothing. What the steps mean is in FORMAT.md; this file only knows which of them leave something to be written down.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from softlabel.store.columns import Column, Columns

CROPS = ("crop-flip", "inception")  # steps that choose a box, and whether to mirror it
MIXES = ("mixup", "cutmix")  # steps that take in another sample
BOX, FLIP, PARTNER, WEIGHT, PASTE, DIGEST = (
    "view_box",
    "view_flip",
    "view_partner",
    "view_weight",
    "view_paste",
    "view_xxh3",
)
PARTNER_BOX, PARTNER_FLIP = "view_partner_box", "view_partner_flip"


def view_columns(policy: Mapping[str, Any]) -> tuple[Column, ...]:
    """The columns of the views of a policy. ValueError when it is not one."""
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
    """What is wrong with stored view columns, None when nothing."""
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
