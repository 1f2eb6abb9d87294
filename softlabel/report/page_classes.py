"""Sections that go through the classes: agreement with hard labels, confusion, and how many samples each has."""

from softlabel.report.figures import Agreement, Confusion, Coverage
from softlabel.report.number_text import count_of, format_count, format_share
from softlabel.report.page_parts import (
    MOST_BARS,
    Advice,
    Context,
    Figure,
    Section,
    count_cell,
    lowest,
    make_table,
    name_cell,
    of_all,
    share_cell,
    unknown,
)
from softlabel.report.svg import draw_bars, draw_dendrogram, draw_heat_map


def describe_agreement(found: Agreement, context: Context) -> Section:
    shown = lowest(found.class_accuracy)
    total = sum(value is not None for value in found.class_accuracy)
    top5 = (
        f", and among its five most probable classes for {format_share(found.top5)}" if found.top5 is not None else ""
    )
    rows = [
        (
            name_cell(context.name(number)),
            count_cell(found.class_rows[number]),
            share_cell(found.class_accuracy[number]),
            share_cell(found.class_p_label[number]),
        )
        for number in [*lowest(found.class_accuracy, len(found.class_accuracy)), *unknown(found.class_accuracy)]
    ]
    figures = []
    if shown:
        figures.append(
            Figure(
                title="Agreement by class",
                plot=draw_bars(
                    [context.name(number) for number in shown],
                    [found.class_accuracy[number] for number in shown],
                    title="Agreement by class",
                    desc="Bars of the share of labels that agree with the hard label, the lowest class first, "
                    f"{len(shown)} bars.",
                    top=1.0,
                    reference=found.accuracy,
                ),
                caption=of_all(len(shown), total, "classes", "with the lowest agreement")
                + f"The dashed line is the whole store's {format_share(found.accuracy)}. Good: bars of about one "
                "length. A class far below the others is one that teachers cannot teach, or whose labels are wrong.",
                table=make_table(
                    "Agreement by class", ("class", "labels", "agreement", "mean p(label)"), rows, noun="classes"
                ),
            )
        )
    if len(found.view_accuracy) > 1:
        figures.append(_view_figure(found))
    if context.sigmoid:
        statement = (
            f"The labels are on the side of the known hard label for {format_share(found.accuracy)} of the answers, "
            f"over {count_of(found.labelled, 'labelled row')}."
        )
    else:
        statement = (
            f"The most probable class is the hard label for {format_share(found.accuracy)} of "
            f"{count_of(found.labelled, 'labelled row')}{top5}."
        )
    return Section(
        statement=statement,
        figures=tuple(figures),
        advice=(
            Advice(
                text="Students inherit what their teachers get wrong. If the agreement is below what you expect of the "
                "teacher, check first that its preprocessing and the order of its classes are those of this data; then "
                "look at the weakest classes in sections 2 and 5. Where it stays low, raise the weight of the hard "
                "label in training (hard_weight), or label with a better teacher.",
            ),
        ),
    )


def _view_figure(found: Agreement) -> Figure:
    shown = lowest(found.view_accuracy)
    return Figure(
        title="Agreement by view",
        plot=draw_bars(
            [f"view {number}" for number in shown],
            [found.view_accuracy[number] for number in shown],
            title="Agreement by view",
            desc="Bars of the share of labels of each view that agree with the hard label, the lowest first.",
            top=1.0,
            reference=found.accuracy,
        ),
        caption=of_all(len(shown), len(found.view_accuracy), "views", "with the lowest agreement")
        + "Good: augmented views a little below the plain one. Far below: the augmentation destroys what the teacher "
        "needs.",
        table=make_table(
            "Agreement by view",
            ("view", "agreement"),
            [(name_cell(f"view {number}"), share_cell(value)) for number, value in enumerate(found.view_accuracy)],
            noun="views",
        ),
    )


def describe_confusion(found: Confusion, context: Context) -> Section:
    figures = []
    grouped = "hard label" if found.by == "label" else "most probable class"
    if found.matrix:
        classes = [context.name(number) for number in range(len(found.matrix))]
        figures.append(
            Figure(
                title="Mean soft label by class",
                plot=draw_heat_map(
                    classes,
                    classes,
                    found.matrix,
                    title="Mean soft label by class",
                    desc=f"A cell is the mean probability of the column's class over rows with that {grouped}.",
                    axis_names=(grouped, "mean probability of"),
                    blank=0.0005,
                ),
                caption=f"Rows are grouped by {grouped}. Good: a dark diagonal, and off it only pairs that look alike.",
            )
        )
    shown = found.pairs[:15]
    if shown:
        figures.append(
            Figure(
                title="Strongest pairs",
                plot=draw_bars(
                    [context.pair(label, other, 24) for label, other, _ in shown],
                    [value for *_, value in shown],
                    title="Strongest pairs",
                    desc=f"Bars of the mean probability of one class over the rows of another; {len(shown)} pairs.",
                    hints=[f"{context.pair(label, other)}: {format_share(value)}" for label, other, value in shown],
                ),
                caption=of_all(len(shown), len(found.pairs), "pairs", "that are strongest")
                + "Mean probability of the second class over rows of the first. Good: classes that are alike, which is "
                "what a student learns from; a pair without likeness is a systematic error.",
                table=make_table(
                    "Strongest pairs of classes",
                    (grouped, "class", "mean probability"),
                    [
                        (name_cell(context.name(a)), name_cell(context.name(b)), share_cell(value))
                        for a, b, value in found.pairs
                    ],
                    noun="pairs",
                ),
            )
        )
    if found.merges:
        figures.append(
            Figure(
                title="Classes by likeness of their mean soft labels",
                plot=draw_dendrogram(
                    [context.name(number) for number in range(len(found.merges) + 1)],
                    found.merges,
                    title="Classes by likeness of their mean soft labels",
                    desc="A tree: classes that join further left are more alike, by 1 - cosine and average linkage.",
                ),
                caption="Classes that join further left are more alike to the teachers. Good: groups that make sense.",
            )
        )
    first = found.pairs[0] if found.pairs else None
    statement = "No two classes share probability."
    if first is not None:
        statement = (
            f"The teachers mix up {context.name(first[0])} with {context.name(first[1])} most: "
            f"{format_share(first[2])} of the probability on average (rows grouped by {grouped})."
        )
    return Section(
        statement=statement,
        figures=tuple(figures),
        advice=(
            Advice(
                text="Likeness between classes is the knowledge that soft labels carry. Act only on pairs that make no "
                "sense: compare their candidates in section 2, and check that the teacher's order of classes is the "
                "data's.",
            ),
        ),
    )


def class_counts_figure(found: Coverage, context: Context) -> Figure | None:
    """The rarest classes by hard labels."""
    if not any(found.class_samples):
        return None
    shown = lowest(found.class_samples, MOST_BARS)
    return Figure(
        title="Samples by class",
        plot=draw_bars(
            [context.name(number) for number in shown],
            [found.class_samples[number] for number in shown],
            title="Samples by class",
            desc=f"Bars of how many samples have each hard label, the rarest first, {len(shown)} bars.",
            text=format_count,
        ),
        caption=of_all(len(shown), len(found.class_samples), "classes", "that are rarest")
        + "Good: bars of about one length. A class with few samples is learnt from its likeness to others alone.",
        table=make_table(
            "Samples by class",
            ("class", "samples"),
            [
                (name_cell(context.name(number)), count_cell(found.class_samples[number]))
                for number in lowest(found.class_samples, len(found.class_samples))
            ],
            noun="classes",
        ),
    )
