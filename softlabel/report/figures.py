"""What the sections of a report hold: plain numbers, which the page draws and ``--json`` writes as they are.

A section that cannot be measured is an `Absent` with the reason. Tuples of C numbers are in the order of the classes,
of M in that of the members, of V in that of the views. Probabilities are at temperature 1 unless a field says
otherwise, or at the store's where only that one is exact; all logarithms are natural.

Legend: C classes, M members, V views, K bins.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """A section that was not measured, and why, with a remedy."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts of values: bin k holds edges[k] <= value < edges[k + 1], the last one both edges; K + 1 edges."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row that is worth a look.

    Attributes:
        key: of the sample; its picture or text is found by it.
        view: of the row.
        label: the hard label, a class number; None for none.
        suggestion: the class that the teachers find most probable (or that confident learning suggests).
        p_label: probability of the label; None without one.
        p_suggestion: probability of the suggestion.
        score: what the section says; lists are sorted by it, ascending, unless it says otherwise.
        members_agreeing: of M, how many have the suggestion as their most probable class; None unless they are kept.
        views_agreeing: of V, in how many the suggestion is the most probable class; None for a single view.
        student: the class that a student finds most probable, where a student is compared.
        p_student: probability that the student gives to the label.
    """

    key: str
    view: int
    label: int | None
    suggestion: int
    p_label: float | None
    p_suggestion: float
    score: float
    members_agreeing: int | None = None
    views_agreeing: int | None = None
    student: int | None = None
    p_student: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFacts:
    """A member as the manifest has it, its SPEC as it was given; `calibration` divides its logits."""

    spec: str
    weight: float
    calibration: float
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is reported on.

    Attributes:
        store: path or URL as given.
        fingerprint: of the store.
        data: the SOURCE that was labelled.
        rows, samples, views, classes: how many; rows are samples times views, less the bad ones.
        class_names: C names; None where none are known.
        made_by: arguments of `softlabel generate` that label other samples in the same way, but for the encoding.
        derived: the command that made it from other stores (convert, merge, combine, crossfit); '' if teachers labelled
            it. Only of the latter can rows be computed again.
        temperature: of the store.
        seen: whether the teachers were trained on these samples. ``out-of-sample``: each row is by teachers that were
            not (cross-fitting, or data without labels); ``in-sample``: they were; ``unknown``: nothing says so.
        seen_note: the caveat in one sentence.
        seen_samples: on how many of the samples a teacher was trained, the one that was on most; None where that is not
            known.
        noun, unit: of the kind of samples, such as images, image.
        measured: how many rows the dear figures (calibration, sharpness, confusion, members) are from; all if they are
            few. Calibration may use fewer, see there.
        version: of softlabel.
        judged_temperature: of the probabilities that labels are judged by (agreement, noise, calibration, examples): 1,
            or the store's where its labels are exact at that one alone.
    """

    store: str
    fingerprint: str
    data: str
    rows: int
    samples: int
    views: int
    classes: int
    class_names: tuple[str, ...] | None
    teachers: tuple[TeacherFacts, ...]
    combine: str
    made_by: tuple[str, ...]
    derived: str
    temperature: float
    encoding: str
    activation: str
    seen: Literal["in-sample", "out-of-sample", "unknown"]
    seen_note: str
    seen_samples: int | None
    noun: str
    unit: str
    measured: int
    version: str
    judged_temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Labels against hard labels, on rows that have one. `top5` is None for up to 5 classes, and of
    top-k stores that name fewer.

    For independent sigmoids a class is right where it is known and its probability is on its side of 0.5.
    """

    labelled: int
    accuracy: float
    top5: float | None
    class_rows: tuple[int, ...]
    class_accuracy: tuple[float | None, ...]
    class_p_label: tuple[float | None, ...]
    view_accuracy: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Hard labels that are likely wrong, by confident learning (Northcutt et al. 2021, arXiv:1911.00068).

    threshold t_j = mean p_j over rows labelled j. A row labelled i is counted in (i, j) where j is the most probable of
    the classes with p_j >= t_j. The joint is that matrix with each row scaled to the number of rows labelled i;
    `share` is its part off the diagonal. Of each entry (i, j) off the diagonal, rounded to a whole number n, the n rows
    labelled i of largest p_j - p_i are candidates, where that is above 0 (pruning by noise rate). They are ranked by
    p_label, the lowest first; `Example.score` is the margin p_label - max of the others. Only view 0 is judged.

    Attributes:
        share: estimated share of wrong labels; where the teachers are weak, most of it is their own errors.
        candidates: how many rows are listed.
        judged: rows of view 0 with a hard label.
        thresholds: C; None for a class without rows.
        pairs: (label, suggestion, count) of the candidates, the most frequent first, at most 50.
        examples: the first ones of the ranking, at most 400.
    """

    share: float
    candidates: int
    judged: int
    thresholds: tuple[float | None, ...]
    pairs: tuple[tuple[int, int, int], ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """Of one set of answers: K = 15 bins of equal width over the confidence; means are None in an empty bin.

    Of independent sigmoids the confidence is the probability of a class, and the accuracy how often it is present, over
    all known labels.
    """

    counts: tuple[int, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    calibration_error: float
    cross_entropy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A member (or the stored labels) as it is, and after division of its logits by the fitted temperature.

    `fitted_temperature` and `after` are None where no temperature is best; `note` says why.
    """

    name: str
    before: Reliability
    fitted_temperature: float | None
    after: Reliability | None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """First the stored labels, then each member where members are kept. `rows`: how many it is from."""

    rows: int
    curves: tuple[Calibrated, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharpnessAt:
    """Entropy of the rows at a temperature.

    Attributes:
        entropy: histogram of 30 bins over 0 to ln C, in nats.
        mean_entropy: in nats.
        effective_classes: mean of exp(entropy).
        one_hot: share of rows whose largest probability is above 0.999.

    Of independent sigmoids the entropy of a row is the mean over the classes of the binary entropy, over 0 to ln 2, and
    `one_hot` is the share of answers above 0.999 or below 0.001. The classes that a top-k store leaves out share their
    probability evenly, which is the most that their entropy can be.
    """

    temperature: float
    entropy: Histogram
    mean_entropy: float
    effective_classes: float
    one_hot: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharpness:
    """How sharp the labels are, on the rows that a histogram counts: at T = 1 (absent where only the store's is exact)
    and at the store's, and the temperature of those tried at which a student sees about two effective classes; None if
    that needs no change."""

    at: tuple[SharpnessAt, ...]
    suggested_temperature: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Which classes the teachers mix up: the mean probability (at the store's temperature) of the rows of each hard
    label; without hard labels, of each most probable class. Of independent sigmoids a row belongs to each class that it
    has.

    Attributes:
        matrix: (C, C) mean soft label by label, for up to 50 classes, zeros for a label without rows; None for more.
        pairs: (label, class, mean probability) of the largest entries off the diagonal, at most 50.
        merges: of the dendrogram by average linkage of 1 - cosine of the mean soft labels, as SciPy's linkage has
            them: (cluster, cluster, distance, size), clusters at C and above are earlier merges; empty for more than
            200 classes. A class without rows has distance 1 from all.
        by: what the rows were grouped by.
    """

    matrix: tuple[tuple[float, ...], ...] | None
    pairs: tuple[tuple[int, int, float], ...]
    merges: tuple[tuple[int, int, float, int], ...]
    by: Literal["label", "prediction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Kept members against each other.

    Attributes:
        names: M.
        accuracy, cross_entropy: M, where there are hard labels.
        agreement: (M, M) share of rows with the same most probable class.
        divergence: (M, M) mean KL(row member || column member) in nats at T = 1.
        disagreement: histogram of the mutual information H(mean p) - mean H(p), 30 bins over 0 to ln M.
        mean_disagreement: in nats.
        all_accuracy, all_cross_entropy: of the mean of all members' probabilities.
        without_accuracy, without_cross_entropy: M, of the mean without each one, where there are hard labels.
        rows: how many all of this is from.
        droppable: the member without which cross-entropy is lowest, if it is lower than with all; None otherwise.
        examples: rows of largest mutual information (`Example.score` is its negative), at most 60.
    """

    rows: int
    names: tuple[str, ...]
    accuracy: tuple[float | None, ...]
    cross_entropy: tuple[float | None, ...]
    agreement: tuple[tuple[float, ...], ...]
    divergence: tuple[tuple[float, ...], ...]
    disagreement: Histogram
    mean_disagreement: float
    all_accuracy: float | None
    all_cross_entropy: float | None
    without_accuracy: tuple[float | None, ...]
    without_cross_entropy: tuple[float | None, ...]
    droppable: int | None
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Views of one sample against each other, of samples that have all views.

    Attributes:
        samples: that `agreement` and `lost` are from.
        agreement: share of samples whose views all have the same most probable class.
        flips: share of rows whose most probable class is not that of the mean over the views.
        divergence: mean KL(view || mean over the views), in nats.
        lost: samples with a view whose label has less than a tenth of the probability that it has in the best view
            (crops that lose the object); None without hard labels.
        examples: samples whose views diverge most (`Example.score` is the negative mean KL), at most 60; each by its
            view with the lowest probability of the label, or of the suggestion without one. The suggestion is the most
            probable class of the mean over the views.
        sampled: samples that `flips`, `divergence` and `examples` are from.
    """

    samples: int
    agreement: float
    flips: float
    divergence: float
    lost: int | None
    examples: tuple[Example, ...]
    sampled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingCost:
    """Bytes of a row and of the whole store, and KL(teacher || stored) in nats as measured when it was written; with
    `of` "sources" KL(source || stored) instead, of a store that was made from others which had lost something before.
    """

    name: str
    row_bytes: int
    store_bytes: int
    mean_t1: float | None
    worst_t1: float | None
    mean_t: float | None
    worst_t: float | None
    of: Literal["teachers", "sources"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicates:
    """Samples with the same content: groups of two and more, and those of them whose hard labels differ. `compared`
    samples have a content hash, by which they are found; without any, nothing is known of duplicates."""

    groups: int
    samples: int
    conflicting: int
    examples: tuple[tuple[Example, ...], ...]  # groups, the conflicting ones first, at most 30 groups of at most 8
    compared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What has labels.

    Attributes:
        class_samples: C, by hard label.
        bad: (key, reason), at most 100 of `bad_count`.
        non_finite: rows with numbers that are not finite; nothing else is measured of such a store.
    """

    samples: int
    with_hard_label: int
    class_samples: tuple[int, ...]
    bad_count: int
    bad: tuple[tuple[str, str], ...]
    missing: int
    non_finite: int
    duplicates: Duplicates
