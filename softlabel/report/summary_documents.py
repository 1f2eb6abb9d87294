"""Six sentences that sum up a report of documents: how well the labels predict the next tokens, how sharp they are,
which documents surprise the teacher, what the encoding costs, what is missing or double, and what the students got."""

import math
import shlex

from softlabel.report.document_figures import (
    DocumentCoverage,
    Documents,
    NextTokenAgreement,
    PositionCost,
    TokenComparison,
    TokenStudents,
)
from softlabel.report.figures import About, Absent, Sharpness
from softlabel.report.measure_documents import DocumentFigures
from softlabel.report.number_text import (
    count_of,
    describe_samples,
    format_bytes,
    format_number,
    format_share,
    shorten,
)
from softlabel.report.report import Sentence
from softlabel.report.summary import Level, name_data, write_generate, write_verify

_LOST = 0.03, 0.3  # nats from which on an encoding is worth a look, and has to be changed
_INFORMED = 0.75  # of the NLL by the frequencies of tokens alone: up to there a teacher is good
_UNSURE = 0.5  # of the vocabulary: labels that spread over so many tokens say little
_ODD = 2.0  # times the mean NLL, from which on a document is worth a look


def summarize_documents(
    figures: DocumentFigures | Absent, documents: Documents | Absent, students: TokenStudents | Absent
) -> tuple[Sentence, ...]:
    """Sum up the sections of a report; without a store there is one sentence, about the students."""
    if isinstance(figures, Absent):
        return (_describe_students(None, students),)
    about = figures.about
    return (
        _describe_agreement(about, figures.agreement),
        _describe_sharpness(about, figures.sharpness),
        _describe_documents(documents, figures.agreement),
        _describe_encoding(about, figures.encoding),
        _describe_coverage(about, figures),
        _describe_students(about, students),
    )


def _describe_agreement(about: About, found: NextTokenAgreement | Absent) -> Sentence:
    if isinstance(found, Absent):
        return Sentence(
            section="agreement", level="look", text=f"How well the labels predict is not known: {found.reason}."
        )
    who = "The labels give"
    if about.combine == "keep" and len(about.teachers) > 1:
        who = f"The mean of the probabilities of the {len(about.teachers)} members gives"
    text = (
        f"{who} the next token {_format_nats(found.nll)} nats (perplexity "
        f"{_format_nats(found.perplexity)}), and the most probable token came next at "
        f"{format_share(found.accuracy)} of {count_of(found.predicted, 'position')}"
    )
    if found.ruled_out:
        text += f"; at {found.ruled_out:,} of them the token that came has no probability at all"
    if about.seen == "in-sample":
        text += f", on {about.noun} that a teacher was trained on"
    level: Level = "good"
    # A teacher that knows nothing gives each token the same probability.
    if not found.nll < math.log(max(2, about.classes)):
        level = "act"
    elif not found.nll <= _INFORMED * found.frequency_nll:
        level = "look"
        text += (
            f"; how often each token comes gives it {format_number(found.frequency_nll)} nats without any context, of "
            f"which a good teacher has at most {_INFORMED:.0%}"
        )
    command = "" if level == "good" else write_verify(about)
    return Sentence(section="agreement", level=level, text=f"{text}.", command=command)


def _format_nats(value: float) -> str:
    """Of a mean, which is infinite where a token that came had no probability."""
    return "∞" if value == math.inf else format_number(value)


def _describe_sharpness(about: About, found: Sharpness | Absent) -> Sentence:
    if isinstance(found, Absent):
        return Sentence(
            section="sharpness", level="look", text=f"How sharp the labels are is not known: {found.reason}."
        )
    stored = next(one for one in found.at if one.temperature == about.temperature)
    other = next((one for one in found.at if one.temperature == 1.0), None)
    beside = "" if other is None or other is stored else f" ({other.effective_classes:.2f} at T = 1)"
    text = (
        f"At T = {about.temperature:g} a position spreads over {stored.effective_classes:.2f} tokens in the "
        f"mean{beside}, and {format_share(stored.one_hot)} of the positions are as good as one-hot"
    )
    level: Level = "good" if stored.effective_classes < _UNSURE * about.classes else "look"
    text += "" if level == "good" else "; where so many tokens are alike, there is little to learn"
    return Sentence(section="sharpness", level=level, text=f"{text}.")


def _describe_documents(found: Documents | Absent, agreement: NextTokenAgreement | Absent) -> Sentence:
    if isinstance(found, Absent) or isinstance(agreement, Absent) or not found.lists[0].documents:
        why = found.reason if isinstance(found, Absent) else "no document has a next token that counts"
        return Sentence(section="documents", level="look", text=f"No document is shown: {why}.")
    first = found.lists[0].documents[0]
    text = (
        f"The document that surprises the teacher most is {shorten(first.key, 80)}, with {_format_nats(first.score)} "
        "nats a token in the mean"
    )
    if agreement.nll and math.isfinite(agreement.nll):
        text += f", {format_number(first.score / agreement.nll)} times the mean of all"
    is_odd = math.isinf(first.score) or first.score > _ODD * agreement.nll
    if is_odd:
        text += "; look for broken text, another language or a wrong template among the first ones"
    return Sentence(section="documents", level="look" if is_odd else "good", text=f"{text}.")


def _describe_encoding(about: About, found: PositionCost) -> Sentence:
    text = f"Encoding {found.name} takes {found.row_bytes:,} bytes a position, {format_bytes(found.store_bytes)} in all"
    if found.kept:
        stored = next((one for one in found.kept if one.temperature == about.temperature), found.kept[-1])
        text += f", keeps {format_share(stored.mean)} of the probability in the mean"
    if found.mean_t is None or found.worst_t is None:
        return Sentence(
            section="encoding",
            level="look",
            text=f"{text}; what it loses of the teachers' answers was not measured.",
            command=shlex.join(["softlabel", "inspect", about.store]),
        )
    text += f", and loses {found.mean_t:.1e} nats of a position in the mean, {found.worst_t:.1e} at worst"
    if found.of == "sources":
        text += ", of what the stores had that it was made from; what these had lost was not measured"
    level: Level = "good" if found.mean_t < _LOST[0] else "look" if found.mean_t < _LOST[1] else "act"
    command = ""
    if level != "good":
        text += "; a larger k, or encoding head, keeps more"
        command = shlex.join(["softlabel", "inspect", about.store])
        if not about.derived:
            command = write_generate(about, "--encoding", "topk", "--top-k", "128", "--out", f"{about.store}-128")
    return Sentence(section="encoding", level=level, text=f"{text}.", command=command)


def _describe_coverage(about: About, figures: DocumentFigures) -> Sentence:
    found: DocumentCoverage = figures.coverage
    text = [f"{found.documents:,} of {count_of(found.samples, 'document')} have labels"]
    text[0] += f", {count_of(found.tokens, 'token')} and {count_of(found.positions, 'labelled position')}"
    if found.non_finite:
        text.append(f"{found.non_finite:,} positions hold numbers that are not finite")
    if found.missing:
        text.append(f"{found.missing:,} are missing")
    if found.bad_count:
        text.append(f"{found.bad_count:,} could not be labelled, {found.empty:,} of them empty")
    if found.at_limit:
        text.append(f"{found.at_limit:,} have the largest length, {found.max_length:,} tokens, and most of them no end")
    same = found.duplicates
    if same.groups:
        text.append(f"{same.samples:,} are exact duplicates, in {count_of(same.groups, 'group')}")
    elif same.compared:
        text.append("none is an exact duplicate of another")
    else:
        text.append("duplicates are not known, as the store has no content hashes")
    used = figures.vocabulary
    text.append(f"{used.used:,} of {used.size:,} tokens of the vocabulary occur")
    level: Level = "good"
    command = ""
    if found.non_finite:
        level, command = "act", shlex.join(["softlabel", "verify", about.store])
    elif found.missing:
        level, command = "act", shlex.join(["softlabel", "verify", about.store, "--data", name_data(about)])
    elif not found.documents:
        level, command = "act", shlex.join(["softlabel", "inspect", about.store])
    elif found.bad_count:
        level, command = "look", shlex.join(["softlabel", "inspect", about.store])
    elif same.groups or found.at_limit > found.documents // 10 or used.unknown:
        level = "look"
    return Sentence(section="coverage", level=level, text=f"{'; '.join(text)}.", command=command)


def _describe_students(about: About | None, students: TokenStudents | Absent) -> Sentence:
    if isinstance(students, Absent):
        words = [] if about is None else ["--data", name_data(about), "--labels", about.store]
        command = shlex.join(
            ["softlabel", "train", *words, "--student", "lm:FOLDER", "--pack", "512", "--out", "runs/lm"]
        )
        return Sentence(
            section="students",
            level="look",
            text=f"No student was measured: {students.reason}.",
            command="" if about is None else command,
        )
    broken = [one.run for one in students.comparisons if not one.is_finite]
    measured = [one for one in students.comparisons if one.nll is not None and one.is_finite]
    if broken:
        names = ", ".join(dict.fromkeys(broken))
        best = f"; of the others: {_describe_best(measured).text}" if measured else "."
        return Sentence(
            section="students",
            level="act",
            text=f"{'Student' if len(broken) == 1 else 'Students'} {names}: answers that are not finite numbers; train "
            f"again with --overwrite{best}",
        )
    if measured:
        return _describe_best(measured)
    finals = [(one.final["eval_perplexity"], one.run) for one in students.runs if "eval_perplexity" in one.final]
    if finals:
        value, run = min(finals, key=lambda one: one[0])
        which = f"The best of {len(finals)} students, {run}," if len(finals) > 1 else f"Student {run}"
        # No teacher says what could have been reached.
        text = f"{which} reached a perplexity of {format_number(value)} on its evaluation data."
        return Sentence(section="students", level="look", text=text)
    text = f"{count_of(len(students.runs), 'student')} without an NLL; give --eval-data to measure it."
    return Sentence(section="students", level="look", text=text)


def _describe_best(measured: list[TokenComparison]) -> Sentence:
    """Of the students on documents that they were not trained on, if there are some."""
    chosen = [one for one in measured if one.held_out] or measured
    best = min(chosen, key=lambda one: one.nll or 0.0)
    runs = {one.run for one in chosen}
    which = f"The best of {len(runs)} students, {best.run}," if len(runs) > 1 else f"Student {best.run}"
    text = (
        f"{which} gives the next token {format_number(best.nll)} nats (perplexity {format_number(best.perplexity)}) on "
        f"{describe_samples(best.samples, best, noun='documents')}"
    )
    if best.divergence is not None:
        text += f", and is {format_number(best.divergence)} nats from its teacher"
    if best.agreement is not None:
        text += f"; the two agree on {format_share(best.agreement)}"
    return Sentence(section="students", level="good" if best.held_out else "look", text=f"{text}.")
