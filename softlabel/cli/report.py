"""Print the plan and the summary of commands that run teachers, and what rows have beside logits."""

import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softlabel.generation.preflight.check import Preflight
    from softlabel.generation.progress import Pace
    from softlabel.generation.run import GenerateSummary
    from softlabel.store.manifest import Run

_MEAN = "the mean of the members' probabilities"
_SLOW = 0.3  # share of the time from which an activity other than the teachers is reported


def print_preflight(out: str, found: "Preflight", *, cluster: bool = False) -> None:
    """Print the plan before labelling; with `cluster`, the estimate is for one process."""
    views = f" ({found.views} views each)" if found.views > 1 else ""
    classes = f"{found.classes:,} classes" if found.classes else "no labels"
    print(f"{out}: {found.images:,} {found.noun}{views}, {found.teachers} teacher(s), {classes}")
    print(
        f"  about {duration(found.seconds)}{' for one process like this' if cluster else ''}: "
        f"{found.images_per_second:,.0f} {found.noun}/s on a sample of {found.sampled:,}, "
        f"the teachers alone {found.bare_rate:,.0f}"
    )
    free = "free space is not known" if found.free_bytes is None else f"{size(found.free_bytes)} are free"
    print(f"  about {size(found.store_bytes)} in {found.shards:,} shards; {free}")
    if found.classes == 0:
        print(f"  embeddings or attention alone, {found.offer.row_bytes:,} bytes a row")
        sys.stdout.flush()
        return
    cost, unit = found.offer.fidelity, found.answer
    over = "" if unit == "row" else f", over {found.offer.measured:,} positions"
    print(
        f"  encoding {found.offer.name}: {found.offer.row_bytes:,} bytes a {unit}, "
        + (
            "loses what the engine leaves out"
            if cost is None
            else f"loses {cost.mean_t:.1e} nats in the mean, {cost.worst_t:.1e} at worst{over}"
        )
    )
    if found.alignment is not None:
        print(f"  next token's NLL under {_MEAN if found.kept else 'these labels'}: {found.alignment}: aligned")
    elif unit == "position":
        print("  whether labels are at their positions was not checked: no sampled document has 3 tokens")
    elif found.accuracy is not None:
        each = ", ".join(f"{one.accuracy:.4f}" for one in found.diagnoses)
        alone = f" (the teachers alone: {each})" if len(found.diagnoses) > 1 else ""
        what = _MEAN if found.kept else "the labels"
        print(f"  accuracy of {what} on {found.labelled:,} of the sampled {found.noun}: {found.accuracy:.4f}{alone}")
    if found.bad:
        first = found.bad[0]
        print(f"  {len(found.bad):,} of the sampled {found.noun} cannot be decoded; {first.key!r}: {first.reason}")
    sys.stdout.flush()  # so that a log file has it before the run


def describe_features(run: "Run") -> list[tuple[str, str]]:
    """Return lines about what rows have beside logits; none where they have nothing."""
    from softlabel.store.view_columns import PAIR

    lines = []
    for step in run.views.policy.get("steps", ()):
        if step["op"] == PAIR:
            size = 2 * step["directions"] * run.num_classes
            noise = "direction" if step["directions"] == 1 else "directions"
            what = f"of logits, along {step['directions']} {noise} of noise of {step['step']} grey levels"
            lines.append(("difference", f"{what}, {size:,} bytes a row"))
    if run.features is not None and (found := run.features.embedding) is not None:
        each = ", ".join(
            f"{'input of ' if tap.side == 'input' else ''}{tap.module or 'the answer'}"
            + ("" if tap.pool == "none" else f", mean over {tap.pool.removeprefix('last-')}")
            for tap in found.taps
        )
        made = "" if found.projection is None else f", projected by random signs of seed {found.projection}"
        made += f", {sum(column.row_bytes for column in found.columns(run.members_stored)):,} bytes a row"
        lines.append(("embedding", f"{found.width:,} numbers in {found.type}, of {each}{made}"))
    if (maps := run.attention) is not None:
        sizes = ", ".join(f"{height}x{width}" for height, width in zip(maps.heights, maps.widths, strict=True))
        lines.append(("attention", f"maps of {sizes}, of {'; '.join(', '.join(one) for one in maps.modules)}"))
        lines.append(("", f"{sum(column.row_bytes for column in maps.columns(run.members_stored)):,} bytes a row"))
    return lines


def print_summary(summary: "GenerateSummary", *, data: str | None = None, encoding: str | None = None) -> None:
    """Print the result of a run, the next command for `data`, if given, and what would be faster than `encoding`, if it
    was an option.
    """
    if not summary.shards_written:
        print(f"{summary.path}: already complete, {summary.total_rows:,} rows; nothing to do")
        return
    print(f"{summary.path}: complete, {summary.total_rows:,} rows, {size(summary.total_bytes)}")
    bare = summary.pace.against_bare if summary.pace is not None else None
    against = "" if bare is None else f", {bare:.0%} of the teachers alone"
    print(
        f"  {summary.images:,} {summary.noun} labelled in {summary.seconds:.1f} s: {summary.images_per_second:,.0f} "
        f"{summary.noun}/s"
        f"{against}; {summary.shards_written} shards written"
    )
    if summary.teacher_accuracy is not None:
        what = "next tokens" if summary.noun == "documents" else "these labels where a hard label exists"
        rule = f", by {_MEAN}" if summary.kept else ""
        print(f"  accuracy of {what}{rule}: {summary.teacher_accuracy:.4f}")
    if summary.total_bad:
        print(f"  {summary.total_bad:,} bad {summary.noun} were skipped; 'softlabel inspect {summary.path}' lists them")
    if summary.pace is not None and (hint := _suggest_change(summary.pace, summary.noun, encoding)):
        print(f"  {hint}")
    if data is not None:
        named = shlex.join(["--data", data, "--labels", summary.path])
        student = "lm:FOLDER --pack LENGTH" if summary.noun == "documents" else "SPEC"
        print(f"  next: softlabel train {named} --student {student} --out RUN")


def _suggest_change(pace: "Pace", noun: str, encoding: str | None) -> str | None:
    """Return a suggestion if something other than the teachers took the time."""
    if (share := pace.share("waiting")) >= _SLOW:
        smaller = ", or images that are smaller or already shrunk" if noun == "images" else ""
        return f"waiting for data {share:.0%} of the time: more --workers{smaller}"
    if (share := pace.share("writing")) >= _SLOW:
        smaller = "" if encoding is None else ", or a smaller --encoding"
        return f"waiting for the writer {share:.0%} of the time: a faster disk{smaller}"
    if (share := pace.share("encoding")) >= _SLOW:
        faster = "" if encoding in (None, "float16") else ": --encoding float16 is the fastest"
        return f"encoding took {share:.0%} of the time{faster}"
    return None


def duration(seconds: float) -> str:
    """Return a duration as text."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def size(count: float) -> str:
    """Return a number of bytes as text."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
