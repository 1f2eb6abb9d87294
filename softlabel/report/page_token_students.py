"""The section on students that are language models."""

from shlex import quote

from softlabel.report.document_figures import TokenComparison, TokenStudents
from softlabel.report.number_text import count_of, describe_samples, format_number, shorten
from softlabel.report.page_parts import (
    Advice,
    Cell,
    Context,
    Section,
    Table,
    count_cell,
    make_table,
    name_cell,
    number_cell,
    share_cell,
)
from softlabel.report.page_students import draw_curves, draw_grid, tabulate_runs


def describe_token_students(found: TokenStudents, context: Context) -> Section:
    figures = [] if found.grid is None else [draw_grid(found.grid)]
    figures += draw_curves(found.runs)
    tables = [tabulate_runs(found.runs)] if found.runs else []
    if found.comparisons:
        tables.insert(0, _tabulate_comparisons(found.comparisons))
    broken = [one.run for one in found.comparisons if not one.is_finite]
    said = f" The answers of {', '.join(broken)} are not finite numbers." if broken else ""
    best = min((one for one in found.comparisons if one.is_finite and one.nll is not None),
               key=lambda one: (not one.held_out, one.nll), default=None)  # fmt: skip
    if best is not None:
        said += (
            f" {best.run} gives the next token {format_number(best.nll)} nats on "
            f"{describe_samples(best.samples, best, noun='documents')}."
        )
    return Section(
        statement=f"{count_of(len(found.runs), 'student')}.{said}",
        figures=tuple(figures),
        tables=tuple(tables),
        notes=found.notes,
        advice=(
            Advice(
                text="Compare students on documents that none of them was trained on. A KL(teacher || student) near "
                "what the encoding costs is all that can be learnt from these labels; where it is far above, train "
                "longer, or take a larger student.",
                command=f"softlabel train --labels {quote(context.store)} --data {quote(context.data)} "
                "--student lm:FOLDER --pack 512 --out runs/lm",
            ),
        ),
    )


def _tabulate_comparisons(found: tuple[TokenComparison, ...]) -> Table:
    kinds = {one.divergence_kind for one in found if one.divergence is not None}
    kind = " (what labels left out as one outcome)" if "bucketed" in kinds else ""
    rows = []
    for one in found:
        part = "" if one.samples >= one.of else f", {one.samples:,} of {one.of:,} documents"
        rows.append(
            (
                name_cell(one.run),
                Cell(text=f"{shorten(one.data, 60)}{part}"),
                Cell(text="not known" if one.held_out is None else "yes" if one.held_out else "no"),
                number_cell(one.nll),
                number_cell(one.perplexity),
                share_cell(one.accuracy),
                share_cell(one.teacher_accuracy),
                share_cell(one.agreement),
                number_cell(one.divergence),
                share_cell(one.calibration_error),
                count_cell(one.predicted),
            )
        )
    head = ("run", "data", "held-out", "NLL, nats", "perplexity", "accuracy", "teacher's accuracy", "agreement")
    return make_table(
        f"Students on documents{kind}",
        (*head, "KL(teacher || student), nats", "calibration error", "positions"),
        rows,
        noun="comparisons",
    )
