"""Sections of the page of a store of documents."""

import math
from shlex import quote

from softlabel.report.document_figures import (
    DocumentCoverage,
    DocumentList,
    Documents,
    Measure,
    NextToken,
    NextTokenAgreement,
    PositionCost,
    ShownDocument,
    VocabularyUse,
)
from softlabel.report.number_text import (
    count_of,
    format_bytes,
    format_count,
    format_number,
    format_share,
)
from softlabel.report.page_parts import (
    MOST_BARS,
    Advice,
    Cell,
    Context,
    Figure,
    Scale,
    Section,
    Table,
    TokenMark,
    TokenText,
    TokenTextGroup,
    TokenTexts,
    count_cell,
    key_cell,
    make_table,
    name_cell,
    number_cell,
    share_cell,
)
from softlabel.report.page_store import describe_repair, draw_costs
from softlabel.report.svg import draw_bars

_LEVELS = 8  # of colour, above none


def describe_next_tokens(found: NextTokenAgreement, context: Context) -> Section:
    ranges = [
        f"{one.first:,}" if one.first == one.last else f"{one.first:,} to {one.last:,}" for one in found.by_context
    ]
    by_context = make_table(
        "By the tokens of the document that a position has seen",
        ("tokens seen", "positions", "NLL, nats", "accuracy"),
        [
            (Cell(text=name), count_cell(one.positions), number_cell(one.nll), share_cell(one.accuracy))
            for name, one in zip(ranges, found.by_context, strict=True)
        ],
    )
    surprising = found.surprising[:MOST_BARS]
    figures = [
        Figure(
            title="NLL by the tokens that were seen",
            plot=draw_bars(
                ranges,
                [one.nll for one in found.by_context],
                title="NLL by the tokens that were seen",
                desc="Bars of the mean NLL of the next token, by how many tokens of its document a position has seen.",
                text=format_number,
                reference=found.nll,
            ),
            caption="Mean NLL in nats; the dashed line is that of all positions. Good: bars that get shorter, or stay. "
            "Longer ones towards the end say that documents are longer than the teacher was trained for, or that its "
            "position encoding is broken.",
            table=by_context,
        ),
        Figure(
            title="The most surprising tokens",
            plot=draw_bars(
                [_name_token(one.id, one.token) for one in surprising],
                [one.nll for one in surprising],
                title="The most surprising tokens",
                desc=f"Bars of the mean NLL where a token came next; the {len(surprising)} highest.",
                text=format_number,
                reference=found.nll,
            ),
            caption=f"Mean NLL in nats where the token came next, of tokens that came at least {found.least:,} times. "
            "Good: rare words and names. Punctuation, special tokens or parts of a template among them are positions "
            "that the teacher was not trained for.",
            table=_tabulate_tokens("The most surprising tokens", found.surprising),
        ),
    ]
    named = "" if found.named == 1 else f" Its label names the token at {format_share(found.named)} of them."
    rule = " by the mean of the members' probabilities" if context.kept else ""
    return Section(
        statement=f"The next token has an NLL of {format_number(found.nll)} nats{rule}, a perplexity of "
        f"{format_number(found.perplexity)}, over {count_of(found.predicted, 'position')}; it is the most probable one "
        f"at {format_share(found.accuracy)}. How often each token comes gives it {format_number(found.frequency_nll)} "
        f"nats without any context.{named}",
        figures=tuple(figures),
        tables=(_tabulate_tokens("Tokens with the largest share of the NLL", found.costly),),
        advice=(
            Advice(
                text="An NLL near that of a network without training, or accuracy far below what the teacher has "
                "elsewhere, points to labels of another tokenizer, another template or broken weights: compute some of "
                "them again. What a truncated label left out counts as spread evenly over the other tokens.",
                command=f"softlabel verify {quote(context.store)} --recompute 256",
            ),
        ),
    )


def _name_token(number: int, token: str) -> str:
    return f"{token}" if token.strip() else f"{token!r} {number}" if token else f"token {number}"


def _tabulate_tokens(caption: str, tokens: tuple[NextToken, ...]) -> Table:
    return make_table(
        caption,
        ("token", "id", "times", "NLL, nats", "accuracy", "share of the NLL"),
        [
            (
                name_cell(_name_token(one.id, one.token)),
                count_cell(one.id),
                count_cell(one.count),
                number_cell(one.nll),
                share_cell(one.accuracy),
                share_cell(one.share),
            )
            for one in tokens
        ],
        noun="tokens",
    )


def describe_documents(found: Documents, context: Context) -> Section:
    shown = sum(len(one.documents) for one in found.lists)
    return Section(
        statement=f"{count_of(shown, 'document')} as {'text' if not found.note else 'ids'}. A token is coloured by "
        "what the label before it says; the first one has none. Point at a token for its numbers, or go to a document "
        "with the Tab key and through it with the arrow keys.",
        notes=(f"{found.note}.",) if found.note else (),
        token_texts=TokenTexts(
            scales=tuple(_describe_scale(one) for one in found.measures),
            groups=tuple(
                TokenTextGroup(
                    title=one.title,
                    texts=tuple(_mark_tokens(document, one, found.measures) for document in one.documents),
                )
                for one in found.lists
            ),
        ),
        advice=(
            Advice(
                text="Documents that surprise the teacher most are often broken: markup, another language, a wrong "
                "template, text that was cut within a word. Leave them out of the data if so. A student far from its "
                "teacher on ordinary text has not learnt it yet: train it longer.",
            ),
        ),
    )


def _describe_scale(one: Measure) -> Scale:
    label = f"{one.meaning}; the strongest colour stands for {format_number(one.scale)} and more"
    return Scale(name=one.name, label=label, strongest=one.scale)


def _mark_tokens(document: ShownDocument, of: DocumentList, measures: tuple[Measure, ...]) -> TokenText:
    shown = len(document.tokens)
    where = f"{of.score} {format_number(document.score)} nats; {count_of(document.length, 'token')}"
    if shown < document.length:
        where += f", of which {document.first + 1:,} to {document.first + shown:,} are shown"
    marks = []
    for place, text in enumerate(document.tokens):
        values = [one[place] for one in document.values]
        known = [
            f"{measure.name} {format_number(value)}"
            for measure, value in zip(measures, values, strict=True)
            if value is not None
        ]
        marks.append(
            TokenMark(
                text=text.replace("\n", "⏎\n") or "◌",
                level=_find_level(values[0], measures[0].scale),
                values=",".join("" if value is None else f"{value:.3g}".replace("inf", "Infinity") for value in values),
                hint=", ".join(known) or "no label",
            )
        )
    return TokenText(key=document.key, where=where, tokens=tuple(marks))


def _find_level(value: float | None, strongest: float) -> int | None:
    """As the page's script has it."""
    if value is None:
        return None
    if not value < strongest:
        return _LEVELS if value > 0 else 0
    return math.floor(max(value, 0.0) / strongest * (_LEVELS + 1)) if strongest > 0 else 0


def describe_position_cost(found: PositionCost, context: Context) -> Section:
    tables: tuple[Table, ...] = ()
    if found.kept:
        mean = ", mean over the members" if context.kept else ""
        tables = (
            make_table(
                f"Probability that the labels name, over the positions that count{mean}",
                ("temperature", "mean", "lowest", "positions below 90%"),
                [
                    (Cell(text=f"T = {one.temperature:g}"), share_cell(one.mean), share_cell(one.lowest),
                     share_cell(one.below_90))
                    for one in found.kept
                ],
            ),
        )  # fmt: skip
    nats = found.mean_t if found.mean_t is not None else found.mean_t1
    cost = "; its cost was not measured" if nats is None else f" and costs {format_number(nats)} nats on average"
    if found.of == "sources":
        cost += ", of what its sources had; what these had lost before was not measured"
    return Section(
        statement=f"{found.name} takes {found.row_bytes:,} bytes a labelled position, beside {found.token_bytes:,} of "
        f"the token, {format_bytes(found.store_bytes)} in all{cost}.",
        figures=draw_costs(found, context),
        tables=tables,
        advice=(
            Advice(
                text="What a label left out is not restored by a finer encoding: label again with a larger --top-k, or "
                "with encoding head, which has every token at every temperature. 'softlabel plan' lists the cost of "
                "each on this data.",
                command=f"softlabel inspect {quote(context.store)}",
            ),
        ),
    )


def describe_document_coverage(found: DocumentCoverage, context: Context) -> Section:
    double = found.duplicates
    counted = [
        ("with labels", found.documents),
        ("not in the store", found.missing),
        ("bad", found.bad_count),
        ("of these empty", found.empty),
        (f"of {found.max_length:,} tokens, the most", found.at_limit),
        ("with a duplicate", double.samples),
    ]
    ranges = [f"{one.first:,} to {one.last:,}" if one.last > 1 else "1" for one in found.lengths]
    figures = [
        Figure(
            title="Coverage",
            plot=draw_bars(
                [name for name, _ in counted],
                [count for _, count in counted],
                title="Coverage",
                desc="Bars of how many documents have labels, are missing, bad, empty, as long as may be, or double.",
                text=format_count,
                top=float(max(found.samples, found.missing, found.bad_count, 1)),
            ),
            caption=f"Of {context.samples(found.samples)}. Good: nothing missing or bad, no duplicates, few at the "
            "largest length: most of these have lost their end (--max-length).",
            table=make_table(
                "Coverage", (context.noun, "count"), [(Cell(text=name), count_cell(count)) for name, count in counted]
            ),
        ),
        Figure(
            title="Lengths",
            plot=draw_bars(
                ranges,
                [one.documents for one in found.lengths],
                title="Lengths",
                desc="Bars of how many documents have so many tokens.",
                text=format_count,
            ),
            caption="Documents by their tokens.",
            table=make_table(
                "Documents by their tokens",
                ("tokens", "documents"),
                [(Cell(text=name), count_cell(one.documents)) for name, one in zip(ranges, found.lengths, strict=True)],
            ),
        ),
    ]
    tables = []
    if found.bad:
        tables.append(
            make_table(
                f"Bad documents: the first {len(found.bad)} of {found.bad_count:,}",
                ("key", "reason"),
                [(key_cell(key), Cell(text=reason)) for key, reason in found.bad],
            )
        )
    if double.keys:
        tables.append(
            make_table(
                f"Exact duplicates: the first {len(double.keys)} of {count_of(double.groups, 'group')}",
                ("group", "key"),
                [(count_cell(number), key_cell(key)) for number, keys in enumerate(double.keys, 1) for key in keys],
            )
        )
    doubles = (
        "duplicates not known, as the store has no content hashes"
        if not double.compared
        else "no exact duplicates"
        if not double.groups
        else f"{count_of(double.groups, 'group')} of exact duplicates"
    )
    missing, command = describe_repair(context)
    broken = f" {count_of(found.non_finite, 'position')} with numbers that are not finite." if found.non_finite else ""
    return Section(
        statement=f"{found.documents:,} of {context.samples(found.samples)} with labels: {found.tokens:,} tokens, "
        f"{found.positions:,} labelled positions, of which {found.counted:,} count; {found.missing:,} missing, "
        f"{found.bad_count:,} bad, {doubles}.{broken}",
        figures=tuple(figures),
        tables=tuple(tables),
        advice=(
            Advice(
                text=f"{missing} Duplicates are learnt twice as often as other documents, and those between training "
                "and test data make the test look better than it is: drop all but one.",
                command=command,
            ),
        ),
    )


def describe_vocabulary(found: VocabularyUse, context: Context) -> Section:
    few = [f"{count:,} of them make {share:.0%}" for share, count in found.covering]
    frequent = found.frequent[:MOST_BARS]
    unknown = (
        f" {count_of(found.unknown, 'token')} of the documents {'is' if found.unknown == 1 else 'are'} the unknown one."
        if found.unknown is not None
        else ""
    )
    return Section(
        statement=f"{found.used:,} of {count_of(found.size, 'token')} occur in the documents"
        f"{'; ' if few else ''}{', '.join(few)}{' of all text' if few else ''}.{unknown}",
        figures=()
        if not frequent
        else (
            Figure(
                title="The most frequent tokens",
                plot=draw_bars(
                    [_name_token(one.id, one.token) for one in frequent],
                    [one.count for one in frequent],
                    title="The most frequent tokens",
                    desc=f"Bars of how often a token occurs; the {len(frequent)} most frequent.",
                    text=format_count,
                ),
                caption="How often a token occurs. Good: what the language has most of. Tokens of single bytes or the "
                "unknown one among them: the tokenizer was made for other text, and documents are longer than they "
                "need to be.",
                table=make_table(
                    "The most frequent tokens, and how often the teacher finds them most probable",
                    ("token", "id", "times", "most probable"),
                    [
                        (
                            name_cell(_name_token(one.id, one.token)),
                            count_cell(one.id),
                            count_cell(one.count),
                            count_cell(one.predicted),
                        )
                        for one in found.frequent
                    ],
                    noun="tokens",
                ),
            ),
        ),
    )
