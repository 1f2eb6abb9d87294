"""The section on students: runs, their curves, and how each compares with its teacher."""

import math
from shlex import quote

from softlabel.report.figures import Reliability
from softlabel.report.number_text import count_of, describe_samples, format_count, format_number, format_share
from softlabel.report.page_parts import (
    Advice,
    Cell,
    Context,
    Figure,
    Part,
    Section,
    Table,
    count_cell,
    lowest,
    make_gallery,
    make_table,
    matrix_table,
    name_cell,
    number_cell,
    of_all,
    reliability_table,
    share_cell,
)
from softlabel.report.student_figures import Comparison, Grid, RunFacts, Students
from softlabel.report.svg import SERIES, draw_bars, draw_heat_map, draw_lines, draw_reliability

_MOST_CURVES = 6
_CORNERS = {
    "both right": "Nothing to do; the hardest of these, by the lowest probability, may still be worth a look.",
    "teacher alone right": "What the student has not learnt yet: longer training, or a larger student.",
    "student alone right": "Where the student is better than its teacher: often wrong soft labels.",
    "both wrong": "Hard samples, or wrong hard labels: compare with section 2.",
}


def describe_students(found: Students, context: Context) -> Section:
    figures = [] if found.grid is None else [draw_grid(found.grid)]
    figures += draw_curves(found.runs)
    return Section(
        statement=_sum_up(found),
        figures=tuple(figures),
        tables=(tabulate_runs(found.runs),) if found.runs else (),
        parts=tuple(_compare(one, context) for one in found.comparisons),
        notes=found.notes,
        advice=(
            Advice(
                text="Compare students on data that none of them was trained on. A student that agrees with the "
                "teacher on the training data alone has memorised the labels: more views of each sample, or a smaller "
                "student. One that disagrees on both has not learnt them yet: train longer, or hotter.",
                command=f"softlabel train --labels {quote(context.store)} --data {quote(context.data)} "
                "--student STUDENT --temperature 1 2 4 --out runs/grid",
            ),
        ),
    )


def _sum_up(found: Students) -> str:
    runs = count_of(len(found.runs), "student")
    sound = [one for one in found.comparisons if not one.non_finite]
    shown = next((one for one in sound if one.held_out), None) or next(iter(sound), None)
    if shown is None:
        if found.comparisons:
            return f"{runs}; the answers of {found.comparisons[0].run} are not finite numbers."
        return f"{runs}; none was compared with a teacher."
    said = []
    if shown.accuracy is not None:
        teacher = "" if shown.teacher_accuracy is None else f" (its teacher for {format_share(shown.teacher_accuracy)})"
        where = describe_samples(shown.samples if shown.student is None else sum(shown.student.counts), shown)
        said.append(f"is right for {format_share(shown.accuracy)} of {where}{teacher}")
    if shown.agreement is not None and math.isfinite(shown.agreement):
        said.append(f"agrees with its teacher for {format_share(shown.agreement)}")
    return f"{runs}. {shown.run} {' and '.join(said)}." if said else f"{runs}; {shown.run} could not be judged."


def draw_grid(grid: Grid) -> Figure:
    known = [value for row in grid.values for value in row if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    return Figure(
        title=f"{grid.metric} by {grid.row_setting} and {grid.column_setting}",
        plot=draw_heat_map(
            grid.rows,
            grid.columns,
            grid.values,
            title=f"{grid.metric} by {grid.row_setting} and {grid.column_setting}",
            desc=f"A cell is the {grid.metric} of a student; by {grid.row_setting} and {grid.column_setting}.",
            text=format_number,
            axis_names=(grid.row_setting, grid.column_setting),
            low=low - (high - low) * 0.15,
        ),
        caption=f"{grid.metric}: from {format_number(low)} (faint) to {format_number(high)} (strong). Good: a broad "
        "optimum inside the grid; one at its edge says that the grid should go on there.",
        table=matrix_table(
            f"{grid.metric}: {grid.row_setting} by row, {grid.column_setting} by column",
            grid.rows,
            grid.columns,
            grid.values,
            number_cell,
            corner=grid.row_setting,
        ),
    )


def draw_curves(runs: tuple[RunFacts, ...]) -> list[Figure]:
    metrics = list(dict.fromkeys(metric for run in runs for metric in run.curves))
    figures = []
    for metric in metrics[:_MOST_CURVES]:
        curves = {run.run: run.curves[metric] for run in runs if run.curves.get(metric)}
        rows = [
            (name_cell(name), number_cell(epoch), number_cell(value))
            for name, points in curves.items()
            for epoch, value in points
        ]
        figures.append(
            Figure(
                title=f"{metric} by epoch",
                plot=draw_lines(
                    curves,
                    title=f"{metric} by epoch",
                    desc=f"A line for each of {min(len(curves), SERIES)} students.",
                    x_label="epoch",
                    y_label=metric,
                ),
                caption=of_all(min(SERIES, len(curves)), len(curves), "students", "that come first")
                + f"{metric}. Good: curves that have levelled off at the end, and do not turn back before it.",
                table=make_table(f"{metric} by epoch", ("student", "epoch", metric), rows),
            )
        )
    return figures


def tabulate_runs(runs: tuple[RunFacts, ...]) -> Table:
    settings = list(dict.fromkeys(name for run in runs for name in run.settings))
    metrics = list(dict.fromkeys(name for run in runs for name in run.final))
    rows = [
        (
            name_cell(run.run),
            *(Cell(text=run.settings.get(name, "–")) for name in settings),
            *(number_cell(run.final.get(name)) for name in metrics),
        )
        for run in runs
    ]
    return make_table("Students: settings, and the last evaluation", ("run", *settings, *metrics), rows, noun="runs")


def _compare(found: Comparison, context: Context) -> Part:
    figures = [] if found.joint is None else [_draw_joint(found.joint)]
    figures += _draw_classes(found, context)
    if any(value is not None for value in found.divergence_by_entropy):
        figures.append(_draw_by_entropy(found))
    for who, one in (("student", found.student), ("teacher", found.teacher)):
        if one is not None:
            figures.append(_draw_calibration(who, one))
    total = sum(corner.count for corner in found.corners)
    galleries = [
        make_gallery(
            f"{corner.name.capitalize()}: {context.samples(corner.count)} ({format_share(corner.count / total)})",
            _CORNERS[corner.name],
            corner.examples,
            context,
            score="",
            of_eval_data=found.of_eval_data,
        )
        for corner in found.corners
        if corner.examples and total
    ]
    statement = _describe_comparison(found, context)
    return Part(title=found.run, statement=statement, figures=tuple(figures), galleries=tuple(galleries))


def _describe_comparison(found: Comparison, context: Context) -> str:
    sentences = [f"On {found.data}: {describe_samples(found.samples, found, noun=context.noun)}."]
    if found.non_finite:
        sentences.append(
            f"The student answers {context.samples(found.non_finite)} with numbers that are not finite, so that "
            "nothing is measured of it here: its weights are broken."
        )
    elif found.accuracy is not None:
        teacher = "" if found.teacher_accuracy is None else f", the teacher for {format_share(found.teacher_accuracy)}"
        sentences.append(f"The student is right for {format_share(found.accuracy)}{teacher}.")
    if found.agreement is not None and math.isfinite(found.agreement):
        sentences.append(
            f"Of {context.samples(found.with_teacher)} with its teacher's labels, both have the same most probable "
            f"class for {format_share(found.agreement)}; KL(teacher || student) is "
            f"{format_number(found.divergence)} nats."
        )
    return " ".join(sentences)


def _draw_joint(joint: tuple[tuple[int, ...], ...]) -> Figure:
    # The teacher's largest probability on top, as an upward axis has it.
    count = len(joint)
    values = tuple(reversed(joint))
    edges = [number / count for number in range(count)]
    rows = [f"{edge * 100:.0f}%" if number % 5 == 0 else "" for number, edge in enumerate(edges)][::-1]
    columns = [f"{edge * 100:.0f}%" if number % 5 == 0 else "" for number, edge in enumerate(edges)]
    cells = [
        (share_cell(edges[row]), share_cell(edges[column]), count_cell(joint[row][column]))
        for row in range(count)
        for column in range(count)
        if joint[row][column]
    ]
    cells.sort(key=lambda cell: -(cell[2].value or 0))
    return Figure(
        title="Probability of the label: teacher against student",
        plot=draw_heat_map(
            rows,
            columns,
            values,
            title="Probability of the label: teacher against student",
            desc="A 2-D histogram: the teacher's probability of the hard label upwards, the student's to the right; "
            "darker cells hold more rows, on a logarithmic scale.",
            text=format_count,
            axis_names=("teacher", "student"),
            logarithmic=True,
        ),
        caption="Probability of the hard label: teacher upwards, student to the right; darker is more rows "
        "(logarithmic). Good: everything near the diagonal, most of it at the top right.",
        table=make_table("The fullest cells", ("teacher from", "student from", "rows"), cells, noun="cells"),
    )


def _draw_classes(found: Comparison, context: Context) -> list[Figure]:
    shown = lowest(found.class_agreement)
    total = sum(value is not None for value in found.class_agreement)
    if not shown:
        return []
    order = lowest(found.class_agreement, len(found.class_agreement))
    return [
        Figure(
            title="Agreement with the teacher by class",
            plot=draw_bars(
                [context.name(number) for number in shown],
                [found.class_agreement[number] for number in shown],
                title="Agreement with the teacher by class",
                desc="Bars of the share of rows with the same most probable class, the lowest first.",
                top=1.0,
                reference=found.agreement,
            ),
            caption=of_all(len(shown), total, "classes", "with the lowest agreement")
            + "The dashed line is the agreement over all. Good: bars of about one length.",
            table=make_table(
                "Agreement and divergence by class",
                ("class", "agreement", "KL(teacher || student), nats"),
                [
                    (
                        name_cell(context.name(one)),
                        share_cell(found.class_agreement[one]),
                        number_cell(found.class_divergence[one]),
                    )
                    for one in order
                ],
                noun="classes",
            ),
        )
    ]


def _draw_by_entropy(found: Comparison) -> Figure:
    values, count = found.divergence_by_entropy, len(found.divergence_by_entropy)
    bins = [f"{number / count * 100:.0f} to {(number + 1) / count * 100:.0f}%" for number in range(count)]
    return Figure(
        title="Divergence by the teacher's entropy",
        plot=draw_bars(
            bins,
            values,
            title="Divergence by the teacher's entropy",
            desc="Bars of the mean KL(teacher || student) over rows whose teacher is that unsure.",
            text=format_number,
        ),
        caption="Mean KL(teacher || student) in nats over rows by the teacher's entropy, as a share of the largest "
        "possible. Good: small everywhere; large at low entropy: the student misses what the teacher is sure of.",
        table=make_table(
            "Divergence by the teacher's entropy",
            ("entropy", "mean KL, nats"),
            [(Cell(text=name), number_cell(value)) for name, value in zip(bins, values, strict=True)],
        ),
    )


def _draw_calibration(who: str, one: Reliability) -> Figure:
    error = format_share(one.calibration_error)
    return Figure(
        title=f"Reliability of the {who}",
        plot=draw_reliability(
            one,
            title=f"Reliability of the {who}",
            desc=f"Bars of accuracy over confidence in bins. Expected calibration error {error}.",
        ),
        caption=f"The {who}: calibration error {error}, cross-entropy {format_number(one.cross_entropy)}. Good: bars "
        "that end on the dashed diagonal.",
        table=reliability_table(f"Reliability of the {who}", one),
        small=True,
    )
