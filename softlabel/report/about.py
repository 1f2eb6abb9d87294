"""What a report is about, and whether the teachers were trained on the samples that they label."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from softlabel.common.spec import parse_spec
from softlabel.common.version import VERSION
from softlabel.errors import SpecError
from softlabel.inputs.transforms import KINDS
from softlabel.labels.combine import normalized_weights
from softlabel.report.figures import About, EncodingCost, TeacherFacts
from softlabel.report.probabilities import LabelReader
from softlabel.report.training_data import Overlap, StoredSamples, count_trained
from softlabel.store.origins import origins_of
from softlabel.store.reader import Store
from softlabel.training.fold_plan import FOLDS, SETTINGS

Seen = Literal["in-sample", "out-of-sample", "unknown"]


def describe_store(store: Store, reader: LabelReader, *, measured: int) -> About:
    """Describe a store from its manifest and from the run folders of its teachers.

    Args:
        measured: rows of the sample.
    """
    run, recorded = store.run, store.manifest.recorded
    noun = KINDS[run.input].noun if run.input in KINDS else "samples"
    seen, note, seen_samples = find_seen(store, noun)
    specs = _list_teachers(store)
    weights = normalized_weights(run.combine.weights or None, len(run.members))
    return About(
        store=store.url,
        fingerprint=run.fingerprint(),
        data=str(recorded.get("data", "?")),
        rows=len(store),
        samples=run.dataset.rows,
        views=run.views.count,
        classes=run.num_classes,
        class_names=run.class_names,
        teachers=tuple(
            TeacherFacts(spec=spec, weight=weight, calibration=member.calibration, precision=member.precision)
            for spec, member, weight in zip(specs, run.members, weights, strict=True)
        ),
        combine=run.combine.rule,
        made_by=list_options(store),
        derived="" if (origins := origins_of(store.manifest)) is None else origins[0],
        temperature=run.temperature,
        encoding=run.encoding.title,
        activation=run.activation,
        seen=seen,
        seen_note=note,
        seen_samples=seen_samples,
        noun=noun,
        unit=noun.removesuffix("s"),
        measured=measured,
        version=VERSION,
        judged_temperature=reader.judged,
    )


def find_seen(store: Store, noun: str) -> tuple[Seen, str, int | None]:
    """Whether the teachers were trained on these samples, the caveat that follows, in one sentence, and on how many of
    the samples one teacher was trained, where that is known."""
    recorded, run = store.manifest.recorded, store.run
    if folds := recorded.get(FOLDS):
        settings = recorded.get(SETTINGS)
        student = str(settings.get("student")) if isinstance(settings, dict) else ""
        if _starts_trained(student):
            return (
                "unknown",
                f"The {folds} teachers started from the weights of {student}: if those were trained on these {noun}, "
                "the confidence is in-sample and hides wrong labels; cross-fit a network without weights.",
                None,
            )
        return (
            "out-of-sample",
            f"Each of the {folds} teachers labelled only {noun} that it was not trained on (cross-fitting), so that "
            "its confidence and the estimate of wrong labels are out-of-sample.",
            0,
        )
    # What follows from confidence in-sample, in short and in full.
    hides = "hides wrong labels; 'softlabel crossfit' makes labels that are out-of-sample"
    hidden = (
        "hides wrong labels, so that accuracy looks better and wrong labels look fewer than they are; 'softlabel "
        "crossfit' makes labels that are out-of-sample"
    )
    if run.tokens is not None:
        hides = hidden = f"the NLL lower than on {noun} that were not seen; label some of those to compare"
    listed = _list_teachers(store)
    overlaps = _compare_teachers(store, listed)
    known = [one for one in overlaps if one is not None and one.trained is not None]
    worst = max(known, key=lambda one: ((one.trained or 0) - one.by_keys, one.by_keys), default=None)
    if worst is not None and worst.trained:
        spec = listed[overlaps.index(worst)]
        if worst.trained == worst.by_keys:
            return (
                "unknown",
                f"Teacher {spec} was trained on data with the same keys, and nothing else is known of it: if it was "
                f"these {noun}, the confidence is in-sample and {hides}.",
                None,
            )
        labelled = len(store) // store.run.views.count
        which = "these very" if worst.trained >= labelled else f"{worst.trained:,} of these {labelled:,}"
        return (
            "in-sample",
            f"Teacher {spec} was trained on {which} {noun}: its confidence is in-sample and {hidden}.",
            worst.trained,
        )
    if len(known) == len(listed) and not any(one.untold for one in known):
        return (
            "out-of-sample",
            f"By the data of their runs, no teacher was trained on one of these {noun}: the confidence is "
            "out-of-sample.",
            0,
        )
    options = recorded.get("options")
    ignored = isinstance(options, dict) and bool(options.get("ignore_labels"))
    if not run.dataset.has_labels and not ignored and run.tokens is None:
        return (
            "out-of-sample",
            f"The {noun} have no hard labels, so that no teacher was trained on labels of theirs: its confidence is "
            "out-of-sample.",
            None,
        )
    return (
        "unknown",
        f"Nothing says whether the teachers were trained on these {noun}: if they were, their confidence is in-sample "
        f"and {hides}.",
        None,
    )


def list_options(store: Store) -> tuple[str, ...]:
    """The arguments of `softlabel generate` that label other samples as those of a store were, but for the encoding."""
    run, recorded = store.run, store.manifest.recorded
    words = [word for spec in _list_teachers(store) for word in ("--teacher", spec)]
    words += ["--temperature", f"{run.temperature:g}"]
    if run.activation != "softmax":
        words += ["--activation", run.activation]
    if len(run.members) > 1 or run.kept:
        words += ["--combine", run.combine.rule]
        if not run.kept and len(set(run.combine.weights)) > 1:
            words += ["--weights", *(f"{weight:g}" for weight in run.combine.weights)]
    if run.tokens is not None:
        words += ["--max-length", str(run.tokens.max_length)]
        words += ["--positions", run.tokens.positions] if run.tokens.positions != "all" else []
    if any(member.calibration != 1 for member in run.members):
        words += ["--calibration", str((recorded.get("options") or {}).get("calibration") or "FILE")]
    if len(precisions := {member.precision for member in run.members}) == 1 and precisions != {"fp32"}:
        words += ["--precision", *precisions]
    return tuple(words)


def _starts_trained(spec: str) -> bool:
    try:
        return parse_spec(spec).starts_trained
    except SpecError:
        return False


def _list_teachers(store: Store) -> list[str]:
    """The SPECs as they were given; those of a store by another program have no places of weights."""
    members, given = store.run.members, store.manifest.recorded.get("teachers")
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == len(members):
        return [str(spec) for spec in given]
    return [member.spec for member in members]


def _compare_teachers(store: Store, specs: Sequence[str]) -> list[Overlap | None]:
    """How many of the labelled samples each teacher was trained on, of those that are runs."""
    samples: StoredSamples | None = None
    found: list[Overlap | None] = []
    for text in specs:
        try:
            spec = parse_spec(text)
        except SpecError:
            found.append(None)
            continue
        if spec.kind != "run":
            found.append(None)
            continue
        samples = samples or StoredSamples(store)
        found.append(count_trained(Path(spec.name), samples, stores=[store]))
    return found


def describe_encoding(store: Store) -> EncodingCost:
    """What the labels take and what they have lost, from the totals of the manifest; of a store that was made from
    lossy ones, what its own step lost."""
    totals, run = store.manifest.totals, store.run
    lost, step = totals.fidelity, None
    if lost is None and isinstance(made := store.manifest.recorded.get("derived"), Mapping):
        step = made.get("step")
    found = _read_losses(lost if lost is not None else step)
    return EncodingCost(
        name=" with ".join([run.encoding.title, *([] if run.features is None else [" and ".join(run.features.names)])]),
        row_bytes=sum(column.row_bytes for column in run.columns),
        store_bytes=totals.bytes,
        mean_t1=found[0],
        worst_t1=found[1],
        mean_t=found[2],
        worst_t=found[3],
        of="teachers" if lost is not None or found[2] is None else "sources",
    )


def _read_losses(found: Any) -> list[float | None]:
    """(mean and worst at T = 1, mean and worst at the store's T), None where there is none."""
    names = ("mean_t1", "worst_t1", "mean_t", "worst_t")
    values = [found.get(name) if isinstance(found, Mapping) else getattr(found, name, None) for name in names]
    return [float(value) if isinstance(value, int | float) else None for value in values]
