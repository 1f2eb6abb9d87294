"""Numbers and names as a reader of the page sees them."""

import math
from collections.abc import Sequence

from softlabel.common.plain_text import show_plainly
from softlabel.report.student_figures import Compared

MISSING = "–"


def format_count(value: float | None) -> str:
    """A whole number with thousands separated: 50,000."""
    return MISSING if value is None else f"{value:,.0f}"


def format_share(value: float | None) -> str:
    """A share as a percentage with three digits: 91.2%, 0.12%; what is above 0 or below 1 is never shown as these."""
    if value is None or not math.isfinite(value):
        return MISSING
    if 0 < abs(value) < 0.00005:
        return "<0.01%"
    if 0.9995 <= value < 1:
        return f"{min(value * 100, 99.99):.2f}%"
    size = abs(value)
    digits = 0 if value in (0.0, 1.0) else 2 if size < 0.01 else 1
    return f"{value * 100:.{digits}f}%"


def format_number(value: float | None) -> str:
    """Three significant digits: 0.0312, 3.5e-07, 12.3."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e5:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def format_bytes(value: float) -> str:
    """Bytes in the largest unit below: 52.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def count_of(value: int, one: str, several: str = "") -> str:
    """A count with its noun: 1 image, 50,000 images."""
    return f"{value:,} {one if value == 1 else several or one + 's'}"


def name_class(names: Sequence[str] | None, number: int) -> str:
    """The name of a class, or its number where it has none."""
    known = names[number] if names and 0 <= number < len(names) else ""
    return show_plainly(known) or f"class {number}"


def describe_samples(shown: int, found: Compared, *, noun: str = "samples") -> str:
    """Samples that a student was measured on, and how many of all of them it was trained on.

    Args:
        shown: how many a figure is from.
    """
    trained, samples = found.trained_on, found.samples
    if trained is None:
        return f"{shown:,} {noun} (whether it was trained on them is not known)"
    if not trained:
        return f"{shown:,} held-out {noun}"
    same = "were in"
    if found.by_keys:
        same = "have keys of" if found.by_keys == trained else "were in, or have keys of,"
    if trained < samples:
        return f"{shown:,} {noun} ({trained:,} of {samples:,} {same} its training data)"
    if found.by_keys:
        return f"{shown:,} {noun} with the same keys as its training data"
    return f"{shown:,} {noun} that it was trained on"


def shorten(text: str, length: int) -> str:
    """Cut a text to a number of characters, with an ellipsis in the middle: names often differ at their ends."""
    plain = " ".join(text.split()) or "(empty)"
    if len(plain) <= length:
        return plain
    tail = (length - 1) // 3
    return f"{plain[: length - 1 - tail]}…{plain[len(plain) - tail :]}"
