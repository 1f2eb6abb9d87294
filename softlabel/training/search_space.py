"""What `tune` searches: the loss of the soft term, its temperature, both weights, and the learning rate."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from softlabel.errors import UsageError
from softlabel.training.losses import LossName

# Options that are ranges -> whether they are drawn evenly in their logarithm.
RANGES = {"lr": True, "temperature": True, "soft_weight": True, "hard_weight": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`; one number where they are equal.

    Attributes:
        log: whether they are drawn evenly in their logarithm.
    """

    low: float
    high: float
    log: bool

    def has(self, value: float) -> bool:
        return self.low <= value <= self.high


def parse_range(name: str, text: str) -> Range:
    """Parse ``LO:HI`` or one number.

    Args:
        name: of the option, one of `RANGES`.
        text: what was given.

    Raises:
        UsageError: it is neither, or lies outside of what the option takes.
    """
    log = RANGES[name]
    ends = text.split(":")
    try:
        low, high = (float(ends[0]), float(ends[-1])) if len(ends) <= 2 else (math.nan, math.nan)
    except ValueError:
        low = high = math.nan
    single_zero = low == high == 0 and name != "temperature"
    if not (0 <= low <= high < math.inf) or (log and low == 0 and not single_zero):
        least = "above 0" if log else "of at least 0"
        raise UsageError(f"{name}: expected LO:HI or a number, {least} and LO below HI, found {text!r}")
    return Range(low=low, high=high, log=log)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """See the module.

    Attributes:
        losses: names of losses.
        ranges: option -> its numbers, for every option of `RANGES`.
    """

    losses: tuple[LossName, ...]
    ranges: Mapping[str, Range]

    def has(self, settings: Mapping[str, Any]) -> bool:
        """Whether settings of a student lie within; an absent temperature does."""
        given = {name: settings[name] for name in RANGES if settings[name] is not None}
        return settings["loss"] in self.losses and all(self.ranges[name].has(value) for name, value in given.items())

    def to_dict(self) -> dict[str, Any]:
        return {"loss": list(self.losses), **{name: asdict(one) for name, one in self.ranges.items()}}
