"""What a report holds of a store of documents: plain numbers, as in `softlabel.report.figures`.

Position t of a document is what the teacher says after its tokens 0 to t. A position counts where its mask is 1; it is
predicted where the document goes on after it, with the token that the teacher is compared with. What a truncated label
left out counts as spread evenly over the other tokens. Members that a store keeps apart are judged by the mean of their
probabilities.

Legend: C tokens of the vocabulary, K measures, L tokens that are shown.
"""

from dataclasses import dataclass
from typing import Literal

from softlabel.report.figures import EncodingCost
from softlabel.report.student_figures import Compared, Grid, RunFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextRange:
    """Predicted positions that have seen `first` to `last` tokens of their document, the own one included."""

    first: int
    last: int
    positions: int
    nll: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NextToken:
    """A token of the vocabulary as the next one: how often it came, and what the teacher made of it.

    Attributes:
        id, token: as the tokenizer's file writes it; '' where that is not known.
        nll: mean of -log p(token) in nats where it came.
        accuracy: share of these positions at which it was the most probable one.
        share: of the NLL of all positions together.
    """

    id: int
    token: str
    count: int
    nll: float
    accuracy: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokenAgreement:
    """The teacher against the data's own next token, on all predicted positions.

    Attributes:
        predicted: how many.
        ruled_out: at how many of them the label gives the next token no probability at all; the NLL is infinite then.
        nll: mean of -log p(next token) in nats.
        perplexity: exp(nll).
        frequency_nll: the same of the frequencies of these tokens, whatever came before.
        accuracy: share of positions whose most probable token came next.
        named: share of positions whose label, or that of a member, names the next token; 1 where labels have all
            tokens.
        by_context: ranges that double in length.
        surprising: tokens of the highest mean NLL, of those that came at least `least` times; at most 50.
        least: see there.
        costly: tokens with the largest share of the NLL; at most 50.
    """

    predicted: int
    ruled_out: int
    nll: float
    perplexity: float
    frequency_nll: float
    accuracy: float
    named: float
    by_context: tuple[ContextRange, ...]
    surprising: tuple[NextToken, ...]
    least: int
    costly: tuple[NextToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptMass:
    """How much of the teacher's probability a truncated label names, of members that are kept apart the mean of theirs,
    at a temperature that it is exact at: mean over the positions that count, the lowest, and the share of positions
    where it is below 0.9."""

    temperature: float
    mean: float
    lowest: float
    below_90: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionCost(EncodingCost):
    """What the labels of positions cost; `row_bytes` are those of a position, without what a document has beside.

    Attributes:
        token_bytes: of a token, with its mask.
        kept: of top-k labels, by temperature; empty for labels of all tokens.
    """

    token_bytes: int
    kept: tuple[KeptMass, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualDocuments:
    """Documents of the same tokens, by their content hashes, which `compared` documents have: groups of two and more,
    and keys of the first ones, at most 30 groups of at most 8."""

    groups: int
    samples: int
    keys: tuple[tuple[str, ...], ...]
    compared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRange:
    """Documents of `first` to `last` tokens."""

    first: int
    last: int
    documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentCoverage:
    """What has labels.

    Attributes:
        samples: documents of the data.
        documents: that have labels.
        tokens, positions, counted, predicted: of these; positions are labelled ones.
        at_limit: documents of exactly `max_length` tokens, most of which lost their end.
        lengths: ranges that double in length.
        bad_count, bad: documents without labels that could not be read: (key, reason) of the first 100.
        empty: how many of them have no token.
        missing: documents of the data without a row.
        non_finite: positions with numbers that are not finite; nothing of such a store's labels is measured.
    """

    samples: int
    documents: int
    tokens: int
    positions: int
    counted: int
    predicted: int
    max_length: int
    at_limit: int
    lengths: tuple[LengthRange, ...]
    bad_count: int
    empty: int
    bad: tuple[tuple[str, str], ...]
    missing: int
    non_finite: int
    duplicates: EqualDocuments


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUse:
    """A token of the vocabulary: how often it is in the documents, and how often the teacher finds it most probable at
    a position that counts; None where labels do not determine that."""

    id: int
    token: str
    count: int
    predicted: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyUse:
    """Which tokens the documents have.

    Attributes:
        size: C.
        used: how many of them occur in the documents.
        predicted: how many are the most probable one somewhere; None where labels do not determine that.
        covering: (share, how many of the most frequent tokens make up this share of the documents).
        unknown: how often the token for what the tokenizer does not know occurs; None where it has none, or the store
            has no tokenizer.
        frequent: at most 50.
    """

    size: int
    used: int
    predicted: int | None
    covering: tuple[tuple[float, int], ...]
    unknown: int | None
    frequent: tuple[TokenUse, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What tokens are coloured by: `scale` is the value of the strongest colour, which the highest twentieth of the
    shown tokens has."""

    name: str
    meaning: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownDocument:
    """A document, or the stretch of it with the highest values of what its list is ordered by.

    Attributes:
        key: of the document.
        length: tokens of all of it.
        first: the place of the first token that is shown, from 0.
        score: what the list is ordered by.
        tokens: texts of L tokens.
        values: K x L: of each measure, what the labels of the position before a token say about it, to four digits;
            None for the first token, and where the position has no label or does not count.
    """

    key: str
    length: int
    first: int
    score: float
    tokens: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentList:
    """Documents with the highest score first."""

    title: str
    score: str  # its name
    documents: tuple[ShownDocument, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Documents as text, with what is measured of each token; `note` says why a text is not as it was."""

    measures: tuple[Measure, ...]
    lists: tuple[DocumentList, ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenComparison(Compared):
    """A student that is a language model, on some documents; see `softlabel.evaluation.language.TokenEvaluation`.

    Attributes:
        of: how many documents there were, of which `samples` were measured.
        is_finite: whether its answers are finite numbers; the figures are NaN otherwise.
        tokens: of the documents.
        predicted: positions to which NLL, perplexity, accuracy and calibration error refer.
        with_teacher: those of them that have a label, to which the figures about the teacher refer.
        divergence: mean KL(teacher || student) in nats at the store's temperature; of truncated labels (kind
            ``bucketed``) what they left out is one outcome, and the divergence is at most the exact one.
    """

    of: int
    is_finite: bool
    tokens: int
    predicted: int
    with_teacher: int
    nll: float | None
    perplexity: float | None
    accuracy: float | None
    calibration_error: float | None
    agreement: float | None
    divergence: float | None
    divergence_kind: Literal["exact", "bucketed"] | None
    teacher_accuracy: float | None
    temperature: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStudents:
    """Runs of language models, and what was measured of each; as `softlabel.report.student_figures.Students`."""

    runs: tuple[RunFacts, ...]
    comparisons: tuple[TokenComparison, ...]
    grid: Grid | None
    notes: tuple[str, ...]
