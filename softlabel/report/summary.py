"""Six sentences that sum a report up: how good the labels are, how many hard labels look wrong, how sharp the labels
are, what the encoding costs, what is missing or double, and what the students got."""

import math
import shlex
from typing import Literal

from softlabel.report.figures import About, Absent, Agreement, Coverage, EncodingCost, Noise, Sharpness
from softlabel.report.measure import StoreFigures
from softlabel.report.number_text import describe_samples, format_bytes, format_share, name_class
from softlabel.report.report import Sentence
from softlabel.report.student_figures import Comparison, Students

Level = Literal["good", "look", "act"]
# From which share on something is worth a look, and has to be done.
_WRONG = 0.01, 0.05
STRONG = 0.8  # accuracy of labels below which the teachers err more often than hard labels do
_LOST = 1e-3, 1e-2  # nats
_LARGE = 100e9  # bytes of a store in full size that a smaller encoding is worth a look for


def summarize(figures: StoreFigures | Absent, students: Students | Absent) -> tuple[Sentence, ...]:
    """Sum up the sections of a report; without a store there is one sentence, about the students."""
    if isinstance(figures, Absent):
        return (_describe_students(None, students),)
    about = figures.about
    return (
        _describe_agreement(about, figures.agreement),
        _describe_noise(about, figures.noise, figures.agreement),
        _describe_sharpness(about, figures.sharpness),
        _describe_encoding(about, figures.encoding),
        _describe_coverage(about, figures.coverage),
        _describe_students(about, students),
    )


def _describe_agreement(about: About, found: Agreement | Absent) -> Sentence:
    if isinstance(found, Absent):
        return Sentence(
            section="agreement", level="look", text=f"How good the labels are is not known: {found.reason}."
        )
    rows = about.noun if about.views == 1 else "rows"
    top5 = "" if found.top5 is None else f" (top-5 {format_share(found.top5)})"
    text = f"The labels agree with the hard labels on {format_share(found.accuracy)}{top5} of {found.labelled:,} {rows}"
    if about.activation == "sigmoid":
        text = f"The labels are on the side of the known hard labels in {format_share(found.accuracy)} of all answers"
    worst = min(((value, place) for place, value in enumerate(found.class_accuracy) if value is not None), default=None)
    if worst is not None and about.classes > 1:
        text += f"; the weakest class is {name_class(about.class_names, worst[1])} with {format_share(worst[0])}"
    if about.seen == "in-sample":
        text += (
            f", on {about.noun} that the teachers were trained on"
            if _saw_all(about)
            else (f"; a teacher was trained on {about.seen_samples:,} of these {about.noun}")
        )
    level: Level = "good" if found.accuracy >= STRONG else "look" if found.accuracy >= 0.5 else "act"
    command = "" if level == "good" else write_verify(about)
    return Sentence(section="agreement", level=level, text=f"{text}.", command=command)


def _describe_noise(about: About, found: Noise | Absent, agreement: Agreement | Absent) -> Sentence:
    if isinstance(found, Absent):
        return Sentence(
            section="noise", level="look", text=f"How many hard labels are wrong is not known: {found.reason}."
        )
    text = (
        f"About {format_share(found.share)} of the hard labels look wrong: {found.candidates:,} of {found.judged:,} "
        f"{about.noun} look like another class"
    )
    if found.pairs:
        label, other, count = found.pairs[0]
        shown, looks_like = (name_class(about.class_names, number) for number in (label, other))
        text += f", most often {looks_like} labelled {shown} ({count:,})"
    level: Level = "good" if found.share < _WRONG[0] else "look" if found.share < _WRONG[1] else "act"
    weak = isinstance(agreement, Agreement) and agreement.accuracy < STRONG
    if weak and found.candidates:
        assert isinstance(agreement, Agreement)
        text += f"; most of them will be errors of teachers that agree with only {format_share(agreement.accuracy)}"
        level = "look"
    if about.seen != "out-of-sample":
        trained = "the teachers may have been trained on these labels"
        if about.seen == "in-sample":
            trained = "the teachers were trained on these labels"
            trained = trained if _saw_all(about) else f"a teacher was trained on {about.seen_samples:,} of these labels"
        text += f"; {trained}, which hides wrong ones"
        level = "look" if level == "good" else level
        return Sentence(section="noise", level=level, text=f"{text}.", command=_crossfit(about))
    command = "" if level == "good" else _train(about, "--soft-weight", "1", "--hard-weight", "0")
    if weak:  # then the soft labels are worse than the hard ones
        command = "" if level == "good" else write_verify(about)
    return Sentence(section="noise", level=level, text=f"{text}.", command=command)


def _describe_sharpness(about: About, found: Sharpness | Absent) -> Sentence:
    if isinstance(found, Absent):
        return Sentence(
            section="sharpness", level="look", text=f"How sharp the labels are is not known: {found.reason}."
        )
    stored = next(one for one in found.at if one.temperature == about.temperature)
    other = next((one for one in found.at if one.temperature == 1.0), None)
    each = "answer" if about.activation == "sigmoid" else "row"
    beside = "" if other is None or other is stored else f" ({other.effective_classes:.2f} at T = 1)"
    text = (
        f"At T = {about.temperature:g} {'an' if each == 'answer' else 'a'} {each} spreads over "
        f"{stored.effective_classes:.2f} classes in the mean{beside}, and {format_share(stored.one_hot)} of the "
        f"{each}s are as good as one-hot"
    )
    if found.suggested_temperature is None:
        return Sentence(section="sharpness", level="good", text=f"{text}.")
    wanted = f"{found.suggested_temperature:g}"
    return Sentence(
        section="sharpness",
        level="look",
        text=f"{text}; T = {wanted} suits a student better.",
        command=_train(about, "--temperature", wanted),
    )


def _describe_encoding(about: About, found: EncodingCost) -> Sentence:
    text = f"Encoding {found.name} takes {found.row_bytes:,} bytes a row, {format_bytes(found.store_bytes)} in all"
    if found.mean_t is None or found.worst_t is None:
        return Sentence(
            section="encoding",
            level="look",
            text=f"{text}; what it loses of the teachers' answers was not measured.",
            command=shlex.join(["softlabel", "inspect", about.store]),
        )
    text += f", and loses {found.mean_t:.1e} nats of a row in the mean, {found.worst_t:.1e} at worst"
    if found.of == "sources":
        text += ", of what the stores had that it was made from; what these had lost was not measured"
    level: Level = "good" if found.mean_t < _LOST[0] else "look" if found.mean_t < _LOST[1] else "act"
    if level != "good" and about.derived:
        text += "; make it again from its sources with a finer encoding"
        command = shlex.join(["softlabel", "inspect", about.store])
        return Sentence(section="encoding", level=level, text=f"{text}.", command=command)
    if level != "good":
        options = ["--encoding", "float16", "--out", f"{about.store}-float16"]
        return Sentence(section="encoding", level=level, text=f"{text}.", command=write_generate(about, *options))
    if found.store_bytes > _LARGE and found.name.startswith("float"):
        smaller = ["softlabel", "convert", about.store, f"{about.store}-int8", "--encoding", "int8"]
        text += "; int8 takes about half"
        return Sentence(section="encoding", level="look", text=f"{text}.", command=shlex.join(smaller))
    return Sentence(section="encoding", level="good", text=f"{text}.")


def _describe_coverage(about: About, found: Coverage) -> Sentence:
    covered = found.samples - found.missing - found.bad_count
    parts = []
    if all_bad := found.bad_count == found.samples:
        parts.append(f"none of the {about.noun} could be read")
    if found.non_finite:
        parts.append(f"{found.non_finite:,} rows hold numbers that are not finite, so that the labels cannot be judged")
    parts += [f"{covered:,} of {found.samples:,} {about.noun} have soft labels"]
    if found.missing:
        parts.append(f"{found.missing:,} are missing")
    if found.bad_count and not all_bad:
        parts.append(f"{found.bad_count:,} could not be read")
    same = found.duplicates
    if same.groups:
        differ = f", {same.conflicting:,} of which have different hard labels" if same.conflicting else ""
        parts.append(f"{same.samples:,} {about.noun} are exact duplicates, in {same.groups:,} groups{differ}")
    elif all_bad:
        pass
    elif same.compared:
        parts.append("none is an exact duplicate of another")
    else:
        parts.append("duplicates are not known, as the store has no content hashes")
    if (unlabelled := found.samples - found.bad_count - found.missing - found.with_hard_label) > 0:
        parts.append(f"{unlabelled:,} have no hard label")
    level: Level = "good"
    command = ""
    if found.non_finite:
        level, command = "act", shlex.join(["softlabel", "verify", about.store])
    elif found.missing:
        level, command = "act", shlex.join(["softlabel", "verify", about.store, "--data", name_data(about)])
    elif same.conflicting:
        level = "act"
    elif found.bad_count:
        level, command = "act" if all_bad else "look", shlex.join(["softlabel", "inspect", about.store])
    elif same.groups:
        level = "look"
    return Sentence(section="coverage", level=level, text=f"{'; '.join(parts)}.", command=command)


def _describe_students(about: About | None, students: Students | Absent) -> Sentence:
    if isinstance(students, Absent):
        command = "" if about is None else _train(about)
        return Sentence(
            section="students", level="look", text=f"No student was measured: {students.reason}.", command=command
        )
    broken = {one.run: one for one in students.comparisons if one.non_finite}
    measured = [one for one in students.comparisons if one.accuracy is not None and one.run not in broken]
    if broken:
        names = ", ".join(broken)
        text = f"{'Student' if len(broken) == 1 else 'Students'} {names}: answers that are not finite numbers"
        text += f" for {next(iter(broken.values())).non_finite:,} samples" if len(broken) == 1 else ""
        best = f"; of the others: {_describe_best(measured).text}" if measured else "."
        return Sentence(section="students", level="act", text=f"{text}; train again with --overwrite{best}")
    if measured:
        return _describe_best(measured)
    finals = [(one.final["eval_accuracy"], one.run) for one in students.runs if "eval_accuracy" in one.final]
    if finals:
        value, run = max(finals, key=lambda one: one[0])
        which = f"The best of {len(finals)} students, {run}," if len(finals) > 1 else f"Student {run}"
        # No teacher says what could have been reached.
        return Sentence(
            section="students", level="look", text=f"{which} reached {format_share(value)} on its evaluation data."
        )
    named = "1 student" if len(students.runs) == 1 else f"{len(students.runs)} students"
    text = f"{named} without an accuracy; give labelled --eval-data to measure it."
    return Sentence(section="students", level="look", text=text)


def _describe_best(measured: list[Comparison]) -> Sentence:
    """Of the students on data that they were not trained on, if there is some."""
    chosen = [one for one in measured if one.held_out] or measured
    best = max(chosen, key=lambda one: one.accuracy or 0.0)
    assert best.accuracy is not None
    runs = {one.run for one in chosen}
    which = f"The best of {len(runs)} students, {best.run}," if len(runs) > 1 else f"Student {best.run}"
    labelled = best.samples if best.student is None else sum(best.student.counts)
    text = f"{which} is right on {format_share(best.accuracy)} of {describe_samples(labelled, best)}"
    if best.teacher_accuracy is not None and math.isfinite(best.teacher_accuracy):
        text += f", its teacher on {format_share(best.teacher_accuracy)}"
    if best.agreement is not None and math.isfinite(best.agreement):
        text += f"; the two agree on {format_share(best.agreement)}"
    behind = best.teacher_accuracy is not None and best.accuracy < best.teacher_accuracy - 0.02
    level: Level = "look" if behind or not best.held_out else "good"
    return Sentence(section="students", level=level, text=f"{text}.")


def write_verify(about: About) -> str:
    """Compute rows again; of a store that was made from others, compare with the data."""
    how = ["--data", name_data(about)] if about.derived else ["--recompute", "256"]
    return shlex.join(["softlabel", "verify", about.store, *how])


def _saw_all(about: About) -> bool:
    """Whether a teacher that has seen some of the samples has seen all."""
    return about.seen_samples is None or about.seen_samples >= about.rows // about.views


def _crossfit(about: About) -> str:
    words = [
        "--data",
        name_data(about),
        "--student",
        _student(about),
        "--folds",
        "4",
        "--out",
        f"{about.store}-crossfit",
    ]
    return shlex.join(["softlabel", "crossfit", *words])


def _train(about: About, *options: str) -> str:
    words = ["--data", name_data(about), "--labels", about.store, "--student", _student(about), *options]
    return shlex.join(["softlabel", "train", *words, "--out", "runs/student"])


def write_generate(about: About, *options: str) -> str:
    return shlex.join(["softlabel", "generate", "--data", name_data(about), *about.made_by, *options])


def name_data(about: About) -> str:
    return "DATA" if about.data == "?" else about.data  # a store that was written by another program


def _student(about: About) -> str:
    """A network that takes such samples: a small one for images, else one that the user has to name."""
    return "zoo:resnet20" if about.noun == "images" else "STUDENT"
