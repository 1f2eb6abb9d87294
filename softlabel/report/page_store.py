"""Sections on what the store holds: members, views, encoding, coverage."""

from shlex import quote

from softlabel.report.figures import Coverage, EncodingCost, Ensemble, Views
from softlabel.report.number_text import count_of, format_bytes, format_count, format_number, format_share
from softlabel.report.page_classes import class_counts_figure
from softlabel.report.page_parts import (
    Advice,
    Cell,
    Context,
    Figure,
    Gallery,
    Section,
    Table,
    count_cell,
    histogram_table,
    key_cell,
    make_gallery,
    make_table,
    matrix_table,
    name_cell,
    number_cell,
    share_cell,
)
from softlabel.report.svg import draw_bars, draw_heat_map, draw_histogram
from softlabel.store.origins import CROSSFIT


def describe_ensemble(found: Ensemble, context: Context) -> Section:
    numbered = [f"{number}. {name}" for number, name in enumerate(found.names, 1)]
    short = [str(number) for number in range(1, len(found.names) + 1)]
    rows = []
    for number, name in enumerate(numbered):
        rows.append(
            (
                name_cell(name),
                share_cell(found.accuracy[number]),
                number_cell(found.cross_entropy[number]),
                share_cell(found.without_accuracy[number]),
                number_cell(found.without_cross_entropy[number]),
            )
        )
    rows.append(
        (
            name_cell("all together"),
            share_cell(found.all_accuracy),
            number_cell(found.all_cross_entropy),
            share_cell(None),
            number_cell(None),
        )
    )
    members = make_table(
        "Members alone, and the mean of the others",
        ("member", "accuracy", "cross-entropy", "accuracy without it", "cross-entropy without it"),
        rows,
        noun="members",
    )
    least = min(min(row) for row in found.agreement)
    same = f"{context.row}s with the same most probable {'token' if context.row == 'position' else 'class'}"
    matrices = (
        ("Agreement", found.agreement, format_share, share_cell, least * 0.9, same,
         "Good: alike but not the same; members that always agree add nothing to each other."),
        ("KL divergence", found.divergence, format_number, number_cell, 0.0,
         "mean KL(row || column) in nats at T = 1",
         "Good: even. A member whose row and column stand out answers unlike the others."),
    )  # fmt: skip
    figures = [
        Figure(
            title=f"{title} of members",
            plot=draw_heat_map(
                numbered,
                short,
                values,
                title=f"{title} of members",
                desc=f"A cell: {what}, by member in rows and columns.",
                text=show,
                low=low,
                letters=22,
            ),
            caption=f"{title}: {what}. {good}",
            table=matrix_table(f"{title} of members", numbered, short, values, cell, corner="member"),
        )
        for title, values, show, cell, low, what, good in matrices
    ]
    figures.append(
        Figure(
            title="Disagreement of members",
            plot=draw_histogram(
                found.disagreement,
                title="Disagreement of members",
                desc=f"Histogram of the mutual information in nats; mean {format_number(found.mean_disagreement)}.",
                x_label="mutual information, nats",
                y_label=f"{context.row}s",
                mean=found.mean_disagreement,
            ),
            caption="Mutual information H(mean p) - mean H(p): what the members do not agree on. Good: most "
            f"{context.row}s near 0, and a tail of hard samples.",
            table=histogram_table("Disagreement of members", found.disagreement),
        )
    )
    drop = found.droppable
    if drop is None:
        advice = Advice(text="No member makes the mean worse; keep all of them.")
    else:
        store = quote(context.store)
        kept = " ".join(str(number) for number in range(1, len(found.names) + 1) if number != drop + 1)
        without = found.without_cross_entropy[drop]
        advice = Advice(
            text=f"Without member {drop + 1} ({found.names[drop]}) the cross-entropy of the mean falls from "
            f"{format_number(found.all_cross_entropy)} to {format_number(without)}. Combine the others.",
            command=f"softlabel combine {store} {quote(context.store + '-fewer')} --members {kept}",
        )
    gallery = make_gallery(
        "Samples on which members differ most",
        "By mutual information in nats. Hard samples, wrong labels and samples unlike the training data gather here.",
        found.examples,
        context,
        score="disagreement",
        negative=True,
    )
    together = "" if found.all_accuracy is None else f" Their mean is right for {format_share(found.all_accuracy)}."
    return Section(
        statement=f"{count_of(len(found.names), 'member')} disagree by {format_number(found.mean_disagreement)} nats "
        f"on average, over {count_of(found.rows, context.row)}.{together}",
        figures=tuple(figures),
        tables=(members,),
        galleries=(gallery,) if found.examples else (),
        advice=(advice,),
    )


def describe_views(found: Views, context: Context) -> Section:
    lost = None if found.lost is None else found.lost / max(found.samples, 1)
    rows = [
        ("all views agree", found.agreement, "samples"),
        ("rows unlike the mean", found.flips, "rows"),
        ("a view loses the label", lost, "samples"),
    ]
    figure = Figure(
        title="Views of one sample against each other",
        plot=draw_bars(
            [name for name, *_ in rows],
            [value for _, value, _ in rows],
            title="Views of one sample against each other",
            desc="Bars of three shares: samples whose views agree, rows that differ, samples with a view that loses "
            "the label.",
            top=1.0,
        ),
        caption="Good: most views agree, and few lose the label (a tenth of its probability in the best view).",
        table=make_table(
            "Views of one sample against each other",
            ("what", "share", "of"),
            [(Cell(text=name), share_cell(value), Cell(text=whole)) for name, value, whole in rows],
        ),
    )
    gallery = make_gallery(
        "Samples whose views differ most",
        "By mean KL(view || mean of the views). The picture is the sample itself, not the view; the number of the view "
        "with the lowest probability of the label stands with it.",
        found.examples,
        context,
        score="mean KL",
        negative=True,
    )
    said = "" if found.lost is None else f" A view loses the label of {context.samples(found.lost)}."
    part = found.sampled < found.samples
    sampled = f" Figures of single views are from {context.samples(found.sampled)}." if part else ""
    return Section(
        statement=f"All views agree for {format_share(found.agreement)} of {context.samples(found.samples)}; a view is "
        f"{format_number(found.divergence)} nats from the mean of the views on average.{said}{sampled}",
        figures=(figure,),
        galleries=(gallery,) if found.examples else (),
        advice=(
            Advice(
                text="Views that lose the object teach the background. If many do, use larger crops (a higher lower "
                "limit of the crop's area in the view policy) and label again; a student that replays the views gets "
                "the label of the very crop that it sees.",
            ),
        ),
    )


def describe_encoding(found: EncodingCost, context: Context) -> Section:
    mean = found.mean_t if found.mean_t is not None else found.mean_t1
    cost = "; its cost was not measured" if mean is None else f" and costs {format_number(mean)} nats on average"
    if found.of == "sources":
        cost += ", of what its sources had; what these had lost before was not measured"
    store = quote(context.store)
    return Section(
        statement=f"{found.name} takes {found.row_bytes:,} bytes a row, {format_bytes(found.store_bytes)} in all"
        f"{cost}.",
        figures=draw_costs(found, context),
        advice=(
            Advice(
                text="A finer encoding does not restore what was lost: label again with it if the cost is too high. A "
                "coarser one saves space; 'softlabel plan' lists the cost of each on this data.",
                command=f"softlabel convert {store} {quote(context.store + '-small')} --encoding int8",
            ),
        ),
    )


def draw_costs(found: EncodingCost, context: Context) -> tuple[Figure, ...]:
    """What the encoding costs as bars; none where it was not measured."""
    costs = [
        ("T = 1, mean", found.mean_t1),
        ("T = 1, worst", found.worst_t1),
        ("store's T, mean", found.mean_t),
        ("store's T, worst", found.worst_t),
    ]
    loss = "KL(teacher || stored)" if found.of == "teachers" else "KL(source || stored)"
    good = "a mean below 0.001 nats, far less than two teachers differ by"
    if context.row == "position":
        good = "a mean far below the KL(teacher || student) that students reach"
    known = [(name, value) for name, value in costs if value is not None]
    if not known:
        return ()
    return (
        Figure(
            title="What the encoding costs",
            plot=draw_bars(
                [name for name, _ in known],
                [value for _, value in known],
                title="What the encoding costs",
                desc=f"Bars of {loss} in nats on a logarithmic scale: mean and worst {context.row}.",
                text=lambda value: f"{format_number(value)} nats",
                logarithmic=True,
            ),
            caption=f"{loss}, logarithmic. Good: {good}.",
            table=make_table(
                "What the encoding costs",
                (loss, "nats"),
                [(Cell(text=name), number_cell(value)) for name, value in costs],
            ),
        ),
    )


def describe_repair(context: Context) -> tuple[str, str]:
    """How missing and damaged shards come back, and the command."""
    store = quote(context.store)
    if context.derived == CROSSFIT:
        return (
            "Damaged shards of a cross-fitted store are made again by the 'softlabel crossfit' that made it.",
            f"softlabel verify {store}",
        )
    if context.derived:
        return "Damaged shards are made again from the store's sources.", f"softlabel repair {store}"
    return (
        "Missing and damaged shards are labelled again by repair.",
        f"softlabel repair {store} --data {quote(context.data)}",
    )


def describe_coverage(found: Coverage, context: Context) -> Section:
    double = found.duplicates
    counted = [
        ("with a hard label", found.with_hard_label),
        ("without", found.samples - found.with_hard_label),
        ("not in the store", found.missing),
        ("bad", found.bad_count),
        ("with a duplicate", double.samples),
    ]
    figures = [
        Figure(
            title="Coverage",
            plot=draw_bars(
                [name for name, _ in counted],
                [count for _, count in counted],
                title="Coverage",
                desc="Bars of how many samples have a hard label, have none, are missing, bad, or have a duplicate.",
                text=format_count,
                top=float(max(found.samples, found.missing, found.bad_count, 1)),
            ),
            caption=f"Of {context.samples(found.samples)}. Good: nothing missing, nothing bad, no duplicates.",
            table=make_table(
                "Coverage", (context.noun, "count"), [(Cell(text=name), count_cell(count)) for name, count in counted]
            ),
        )
    ]
    classes = class_counts_figure(found, context)
    if classes is not None:
        figures.append(classes)
    tables: tuple[Table, ...] = ()
    if found.bad:
        tables = (
            make_table(
                f"Bad {context.noun}: the first {len(found.bad)} of {found.bad_count:,}",
                ("key", "reason"),
                [(key_cell(key), Cell(text=reason)) for key, reason in found.bad],
            ),
        )
    groups: list[Gallery] = []
    for number, group in enumerate(double.examples, 1):
        differ = "with different labels" if len({one.label for one in group}) > 1 else "with one label"
        groups.append(make_gallery(f"Group {number}: {differ}", "", group, context, score=""))
    doubles = (
        "duplicates not known, as the store has no content hashes"
        if not double.compared
        else "no exact duplicates"
        if not double.groups
        else f"{count_of(double.groups, 'group')} of exact duplicates, {double.conflicting:,} with different labels"
    )
    missing, command = describe_repair(context)
    broken = f" {count_of(found.non_finite, 'row')} with numbers that are not finite." if found.non_finite else ""
    return Section(
        statement=f"{format_share(found.with_hard_label / max(found.samples, 1))} of {context.samples(found.samples)} "
        f"with a hard label; {found.missing:,} missing, {found.bad_count:,} bad, {doubles}.{broken}",
        figures=tuple(figures),
        tables=tables,
        groups=tuple(groups),
        advice=(
            Advice(
                text=f"{missing} Bad samples have to be replaced in the data, or left out. Of exact duplicates with "
                "different labels at least one label is wrong: correct or drop them; duplicates between training and "
                "test data make the test look better than it is.",
                command=command,
            ),
        ),
    )
