"""Columns that describe the view of a row, derived from the view policy, and their checks.

B rows, W elements of a column in one row.

A policy is `{"name": ..., "steps": [{"op": ...}, ...]}`; without steps a view is the unchanged image and has no
columns. FORMAT.md defines the steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from softlabel.store.columns import Column, Columns

CROPS = ("crop-flip", "inception")  # steps that choose a box and whether to mirror
MIXES = ("mixup", "cutmix")  # steps that mix in another sample
PAIR = "noise-pair"  # the step that shows noisy copies beside a view
BOX, FLIP, DIGEST = "view_box", "view_flip", "view_xxh3"
PARTNER, PARTNER_BOX, PARTNER_FLIP = "view_partner", "view_partner_box", "view_partner_flip"
WEIGHT, PASTE = "view_weight", "view_paste"
PAIR_DIGESTS = "view_pair_xxh3"
# Half the difference of the teacher's logits of two noisy copies, one direction after another.
DIFFERENCE: Final = "difference"


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewPolicy:
    """Number of views per sample, and the augmentation that draws them from (seed, key, view)."""

    count: int = 1
    policy: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def directions(self) -> int:
        """How many pairs of noisy copies are labelled beside each view."""
        return count_directions(self.policy)


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
    columns.append(Column(name=DIGEST, dtype="<u8", width=1))
    if directions := count_directions(policy):
        columns.append(Column(name=PAIR_DIGESTS, dtype="<u8", width=2 * directions))
    return tuple(columns)


def count_directions(policy: Mapping[str, Any]) -> int:
    """Return how many pairs of noisy copies a view has.

    Raises:
        ValueError: the step is malformed.
    """
    for step in policy.get("steps", []):
        if step["op"] == PAIR:
            directions = step.get("directions")
            if not isinstance(directions, int) or isinstance(directions, bool) or not 1 <= directions <= 64:
                raise ValueError(f"views.policy.steps: noise-pair: expected 1 to 64 directions, found {directions!r}")
            return directions
    return 0


def check_pairs(activation: str, rule: str, members: int, *, labels: bool) -> None:
    """Raises ValueError where a run has no difference of logits, by its activation, combine rule, number of members,
    and whether its rows have labels."""
    if not labels:
        raise ValueError("noise-pair: expected a teacher with logits, found one of embeddings or attention alone")
    if activation != "softmax":
        raise ValueError("noise-pair: expected one softmax over the classes, found independent sigmoids")
    if rule == "keep" or (rule == "probs" and members > 1):
        found = "members that are kept apart" if rule == "keep" else "an average of probabilities"
        raise ValueError(f"noise-pair: expected an average of logits, found {found}; give --combine logits")


def view_problem(columns: Columns) -> str | None:
    """Return the first problem of stored columns (B, W) of views and what goes with them, or None."""
    for name, array in columns.items():
        if name in (BOX, PARTNER_BOX):
            wrong_B = (array[:, 2:] < 1).any(axis=1)
        elif name in (FLIP, PARTNER_FLIP):
            wrong_B = (array > 1).any(axis=1)
        elif name == WEIGHT:
            wrong_B = ~((array >= 0) & (array <= 1)).all(axis=1)
        elif name == PASTE:
            wrong_B = (array < 0).any(axis=1)
        elif name == DIFFERENCE:
            wrong_B = ~np.isfinite(array).all(axis=1)
        else:
            continue
        if wrong_B.any():
            return f"row {int(np.flatnonzero(wrong_B)[0])} of a block: `{name}` is out of range"
    return None
