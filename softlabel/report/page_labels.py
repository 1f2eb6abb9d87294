"""Sections on what the labels say: label errors, calibration, sharpness."""

from shlex import quote

from softlabel.report.figures import Calibrated, Calibration, Noise, Sharpness
from softlabel.report.number_text import count_of, format_count, format_number, format_share
from softlabel.report.page_parts import (
    Advice,
    Context,
    Figure,
    Section,
    count_cell,
    histogram_table,
    lowest,
    make_gallery,
    make_table,
    name_cell,
    number_cell,
    of_all,
    reliability_table,
    share_cell,
    unknown,
)
from softlabel.report.summary import STRONG
from softlabel.report.svg import draw_bars, draw_histogram, draw_reliability


def describe_noise(found: Noise, context: Context) -> Section:
    shown, listed = found.pairs[:15], len(found.examples)
    all_listed = listed == found.candidates
    which = f"All {listed:,}" if all_listed else f"The {listed:,} with the lowest p(label) of {found.candidates:,}"
    figures = []
    if shown:
        figures.append(
            Figure(
                title="Most frequent pairs of label and suggestion",
                plot=draw_bars(
                    [context.pair(label, suggestion, 24) for label, suggestion, _ in shown],
                    [count for *_, count in shown],
                    title="Most frequent pairs of label and suggestion",
                    desc=f"Bars of how many rows have this label and that suggestion; {len(shown)} pairs.",
                    text=format_count,
                    hints=[f"{context.pair(label, suggestion)}: {count:,}" for label, suggestion, count in shown],
                ),
                caption=of_all(len(shown), len(found.pairs), "pairs", "that are most frequent")
                + "Good: few rows, spread over pairs that people mix up too. One pair that stands out points to two "
                "classes whose definitions overlap, or to a mistake in the labelling.",
                table=make_table(
                    "Pairs of label and suggestion",
                    ("label", "suggestion", "rows"),
                    [
                        (name_cell(context.name(label)), name_cell(context.name(suggestion)), count_cell(count))
                        for label, suggestion, count in found.pairs
                    ],
                    noun="pairs",
                ),
            )
        )
    gallery = make_gallery(
        "Candidates",
        f"{which}: label → suggestion. The margin "
        "is p(label) less the largest other probability; at -100% the teachers are sure of another class.",
        found.examples,
        context,
        score="margin",
        show=format_share,
        controls=True,
    )
    order = [*lowest(found.thresholds, len(found.thresholds)), *unknown(found.thresholds)]
    thresholds = make_table(
        "Thresholds of confident learning: the mean probability of a class over the rows that are labelled with it",
        ("class", "threshold"),
        [(name_cell(context.name(number)), share_cell(found.thresholds[number])) for number in order],
        noun="classes",
    )
    return Section(
        statement=f"An estimated {format_share(found.share)} of the hard labels are wrong: {found.candidates:,} of "
        f"{count_of(found.judged, 'row')} are candidates, by confident learning.",
        figures=tuple(figures),
        tables=(thresholds,),
        galleries=(gallery,) if found.examples else (),
        advice=(_advise_on_noise(found, context),),
    )


def _advise_on_noise(found: Noise, context: Context) -> Advice:
    """What to do, which depends on whether the teachers are to be trusted more than the hard labels."""
    if not found.candidates:
        text = "No label is listed, so that there is nothing to look through."
    elif context.accuracy is not None and context.accuracy < STRONG:
        text = (
            "Look through the first candidates. Teachers that agree with so few of the hard labels err more often than "
            "these do: label with better ones before a label is corrected, and do not train on soft labels alone."
        )
    else:
        text = (
            "Look through the first candidates. Where most of them are real errors, correct the labels (--noise-csv "
            "FILE lists them all) or lower hard_weight in training, so that the soft labels outvote them."
        )
    if context.seen == "out-of-sample":
        return Advice(text=text)
    trained = "Where the teachers were" if context.seen == "unknown" else "As teachers were"
    return Advice(
        text=f"{text} {trained} trained on these very samples, they have learnt errors too: teachers that did not see "
        "a sample find more of them.",
        command=f"softlabel crossfit --data {quote(context.data)} --student STUDENT --folds 4 --out labels/oof",
    )


def describe_calibration(found: Calibration, context: Context) -> Section:
    head = ("labels of", "error before", "after", "cross-entropy before", "after", "fitted temperature")
    # Two members may have one name.
    names = ["stored labels", *(f"member {number}, {one.name}" for number, one in enumerate(found.curves[1:], 1))]
    rows = [
        (
            name_cell(name),
            share_cell(curve.before.calibration_error),
            share_cell(None if curve.after is None else curve.after.calibration_error),
            number_cell(curve.before.cross_entropy),
            number_cell(None if curve.after is None else curve.after.cross_entropy),
            number_cell(curve.fitted_temperature),
        )
        for name, curve in zip(names, found.curves, strict=True)
    ]
    first = found.curves[0]
    statement = (
        f"The stored labels' confidence is off by {format_share(first.before.calibration_error)} on average "
        f"(expected calibration error, {count_of(found.rows, 'row')})"
    )
    if first.after is not None:
        statement += (
            f"; logits divided by {format_number(first.fitted_temperature)} would leave "
            f"{format_share(first.after.calibration_error)}"
        )
    return Section(
        statement=f"{statement}.",
        figures=tuple(_draw_curve(name, curve, context) for name, curve in zip(names, found.curves, strict=True)),
        tables=(make_table("Calibration before and after the fit", head, rows),),
        advice=(
            Advice(
                text="A fitted temperature near 1 needs nothing. Above 1 the teachers are too sure of themselves: "
                "members that differ in it are averaged unfairly, the loudest one wins. Fit it on labelled samples "
                "that the teachers were not trained on, and give the file to 'softlabel generate --calibration'.",
                command="softlabel calibrate --data HELD_OUT --teacher TEACHER --out calibration.json",
            ),
        ),
    )


def _draw_curve(name: str, curve: Calibrated, context: Context) -> Figure:
    before, after, title = curve.before, curve.after, f"Reliability: {name}"
    error = format_share(before.calibration_error)
    caption = f"Calibration error {error}"
    if after is not None:
        caption += (
            f"; diamonds: {format_share(after.calibration_error)} with logits divided by "
            f"{format_number(curve.fitted_temperature)}"
        )
    caption += f". {curve.note}" if curve.note else "."
    caption += " Good: bars that end on the dashed diagonal; a filled gap is too confident, a dashed one too little."
    if context.sigmoid:
        caption += " Confidence is the probability of a class, accuracy how often it is present."
    return Figure(
        title=title,
        plot=draw_reliability(
            before,
            after,
            title=title,
            desc=f"Bars of accuracy over confidence in {len(before.counts)} bins, diamonds after the fit, and the "
            f"number of rows of each bin below. Expected calibration error {error}.",
        ),
        caption=caption,
        table=reliability_table(title, before, after),
        small=True,
    )


def describe_sharpness(found: Sharpness, context: Context) -> Section:
    figures, rows = [], []
    for one in found.at:
        at = f"T = {one.temperature:g}"
        rows.append(
            (
                name_cell(at),
                number_cell(one.mean_entropy),
                number_cell(one.effective_classes),
                share_cell(one.one_hot),
            )
        )
        figures.append(
            Figure(
                title=f"Entropy of the labels at {at}",
                plot=draw_histogram(
                    one.entropy,
                    title=f"Entropy of the labels at {at}",
                    desc=f"Histogram in {len(one.entropy.counts)} bins; the mean is "
                    f"{format_number(one.mean_entropy)} nats.",
                    x_label=f"entropy at {at}, nats",
                    y_label=f"{context.row}s",
                    mean=one.mean_entropy,
                ),
                caption=f"At {at}: {format_number(one.effective_classes)} effective {context.answers} on average. "
                f"Good: a spread, with most {context.row}s away from 0 at the temperature of training. A spike at 0 is "
                "labels that say no more than a hard label.",
                table=histogram_table(f"Entropy at {at}", one.entropy),
            )
        )
    last = found.at[-1]
    spread = f"a label spreads over {format_number(last.effective_classes)} {context.answers} on average"
    sure = f"of the {context.row}s are as good as one-hot (largest probability above 99.9%)"
    if context.sigmoid:
        spread = f"an answer has {format_number(last.mean_entropy)} nats of entropy on average, of at most 0.693"
        sure = "of the answers are as good as certain (above 99.9% or below 0.1%)"
    if context.row == "position":
        advice = Advice(
            text="Temperature 1 is the usual choice for language models. Positions that are as good as one-hot teach a "
            "student little more than the next token does; they are the price of the others.",
        )
    elif found.suggested_temperature is None:
        advice = Advice(text="The temperature of the store suits its labels; nothing has to be changed.")
    else:
        advice = Advice(
            text="Labels that are nearly one-hot teach a student little more than the hard label. About two effective "
            f"classes are a good start: train at temperature {found.suggested_temperature:g}. A store with exact "
            "logits can be given another temperature without running a teacher.",
            command=f"softlabel train --labels {quote(context.store)} --data {quote(context.data)} "
            f"--student STUDENT --temperature {found.suggested_temperature:g} --out runs/sharper",
        )
    head = ("temperature", "mean entropy, nats", f"effective {context.answers}", f"one-hot {context.row}s")
    return Section(
        statement=f"At temperature {last.temperature:g} {spread}; {format_share(last.one_hot)} {sure}.",
        figures=tuple(figures),
        tables=(make_table("Sharpness by temperature", head, rows),),
        advice=(advice,),
    )
