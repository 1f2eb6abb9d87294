"""What happens to a store after it was written: relabelling what is damaged, and audits against data and teachers.

A store knows its identity, not the places of its data and weights; those are recorded beside it, and can be given anew.

Legend: B rows, C classes, M members.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from softlabel.common.arguments import check_arguments
from softlabel.common.device import Choice, Tuning
from softlabel.convert import RewriteSummary, redo_store
from softlabel.dataset import Source, open_source, report_source
from softlabel.engine import BadImagePolicy
from softlabel.errors import MismatchError, StoreCorruptError, UsageError
from softlabel.generate import GenerateSummary, label_missing
from softlabel.history import History, check_same_data
from softlabel.inputs.content import comparable, hashes_of, why_not_comparable
from softlabel.job import Job, prepare
from softlabel.store.columns import EXTRA_NAME
from softlabel.store.manifest import ROOT_NAME, Manifest
from softlabel.store.manifest_read import load_manifest, load_root
from softlabel.store.origins import origins_of
from softlabel.store.reader import Store
from softlabel.store.storage.open import open_folder
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer

CHUNK = 4096  # samples read at a time
LISTED = 3  # keys that a message spells out


def job_of(
    manifest: Manifest,
    where: str | Path,
    *,
    data: "str | Path | Source | Dataset[Any] | None" = None,
    teachers: Sequence[str] | None = None,
    device: str = "auto",
    workers: int | None = None,
    on_bad_image: BadImagePolicy = "skip",
    threads: int | None = None,
    members_in_turn: Choice = "auto",
    believe: bool = False,
    damaged: Collection[int] | None = None,
) -> Job:
    """Load what labelled a store, from where the store says it lay or from where it lies now.

    believe: of the data compare kind and length alone, and take the manifest's word for the keys.
    damaged: shards that are to be labelled again, which say nothing.

    Raises:
        MismatchError: data or teachers are not those that labelled it.
    """
    run, recorded = manifest.run, manifest.recorded
    refuse_derived(manifest, where)
    places = recorded_place(manifest, "teachers", where, teachers)
    if len(places) != len(run.members):
        raise MismatchError(
            f"{where}: expected {len(run.members)} teachers, as it was labelled by, found {len(places)}"
        )
    job = prepare(
        recorded_place(manifest, "data", where, data),
        teachers=places,
        combine=run.combine.rule,  # type: ignore[arg-type]
        weights=None if run.kept else run.combine.weights,
        temperature=run.temperature,
        format=run.format,
        shard_rows=run.shard_rows,
        # The recorded size: labels agree across sizes within a rounding step, with the same size to the bit.
        batch_size=int(recorded.get("batch_size", 256)),
        precision=run.members[0].precision,  # type: ignore[arg-type]
        tuning=Tuning(threads=threads, compile=bool(recorded.get("compile", False)), members_in_turn=members_in_turn),
        settled=recorded,
        workers=workers,
        seed=run.views.seed,
        ignore_labels=not run.dataset.has_labels,
        on_bad_image=on_bad_image,
        encoding=run.encoding,
        calibration=[member.calibration for member in run.members],
        device=device,
        history=History.of(where, damaged=damaged),
        views=run.views,
        believed=run.dataset if believe else None,
    )
    if differences := run.differences(job.run):
        raise MismatchError(
            f"{where}: data or teachers are not those that labelled it; {'; '.join(differences)}; "
            "give --data and --teacher as they were"
        )
    return job


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairSummary:
    """What a call of `repair` did.

    Attributes:
        problems: what it found, each naming its file.
        shards_written: how many shards it made again; total_rows: of the whole store.
        derived: whether they were made from other stores, and not by teachers.
    """

    problems: tuple[str, ...]
    shards_written: int
    total_rows: int
    derived: bool


@check_arguments
def repair(
    store: str | Path,
    *,
    data: "str | Path | Source | Dataset[Any] | None" = None,
    teachers: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: bool | None = None,
) -> RepairSummary:
    """Make the shards that are missing or damaged again, and nothing else: by the teachers, or out of the stores that
    this one was made from.

    Args:
        store: its folder.
        data: the SOURCE, where it is not at the recorded place any more.
        teachers: the SPECs, where the weights are not at the recorded places any more.
        sources: of a store that was made from others, where these lie now, in their order.

    Raises:
        UsageError: data or teachers for a store that was made from others, or sources for one that was not.
        MismatchError: data, teachers or sources are not the same any more.
        StoreCorruptError: the manifest itself is damaged, so that nothing says what the store was, or what is wrong is
            nothing that labelling again changes.
    """
    folder = open_folder(store)
    try:
        manifest = load_root(folder)
    except StoreCorruptError as error:
        raise StoreCorruptError(
            f"{error}; the shards alone do not say what the store was: without a copy of {ROOT_NAME}, move it out of "
            "the folder and run the same 'softlabel generate' again, which takes over the whole shards of a store that "
            "has not grown, or label into another folder"
        ) from None
    derived = origins_of(manifest) is not None
    for option, given, wrong in (
        ("data", data, derived),
        ("teacher", teachers, derived),
        ("source", sources, not derived),
    ):
        if given is not None and wrong:
            how = "made from other stores" if derived else "labelled by teachers"
            raise UsageError(f"--{option}: {store} was {how}; see 'softlabel inspect {store}'")
    problems: tuple[str, ...] = ()
    try:
        load_manifest(folder)
    except StoreCorruptError as error:
        problems = (str(error),)
        with Committer.open(store, manifest.run, relabel=()):
            pass  # what damaged segments recorded is found again in the shards
    report = verify_store(store, workers=workers, allow_incomplete=True)
    if not (report.ok or report.damaged or report.extra):
        raise StoreCorruptError(
            f"{'; '.join(report.problems[:LISTED])}; no shard is damaged that could be made again: label the data "
            "again, into another folder"
        )
    done: GenerateSummary | RewriteSummary
    if derived:
        done = redo_store(store, lost=report.damaged, sources=sources, progress=progress)
    else:
        done = _relabel(store, report.damaged, data, teachers, device, workers, progress)
    return RepairSummary(
        problems=(*problems, *report.problems),
        shards_written=done.shards_written,
        total_rows=done.total_rows,
        derived=derived,
    )


def _relabel(
    store: str | Path,
    damaged: Collection[int],
    data: "str | Path | Source | Dataset[Any] | None",
    teachers: Sequence[str] | None,
    device: str,
    workers: int | None,
    progress: bool | None,
) -> GenerateSummary:
    manifest = load_root(open_folder(store))
    job = job_of(manifest, store, data=data, teachers=teachers, device=device, workers=workers, damaged=damaged)
    # Before the damaged shards are forgotten: a repair that is refused leaves the store as it was.
    check_same_data(store, job.labeller.intake, without=damaged)
    with Committer.open(store, job.run, relabel=damaged) as committer:
        if job.labeller.head is not None:
            committer.add_extra(EXTRA_NAME, job.labeller.head.safetensors())
        return label_missing(committer, store, job, progress=progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """A source against a store. Keys are listed up to a few, counted in full.

    Attributes:
        samples: in the source.
        missing: samples without a row, that the store does not list as bad either.
        surplus: rows whose key the source does not have.
        changed: samples whose images are not those that were labelled.
        compared: samples whose images could be compared by their content hash.
        unknown: why the first one that could not be compared was not; None where all could.
    """

    samples: int
    missing: tuple[str, ...]
    missing_count: int
    surplus_count: int
    changed: tuple[str, ...]
    changed_count: int
    compared: int
    unknown: str | None = None

    @property
    def ok(self) -> bool:
        return not (self.missing_count or self.surplus_count or self.changed_count)


def coverage(store: Store, data: str | Source, *, progress: bool | None = None) -> Coverage:
    """Check that a store has a row for every sample of a source, no other ones, and for the very same images."""
    source = open_source(data)
    report_source(source)
    bad = store.bad
    missing: list[str] = []
    changed: list[str] = []
    missing_count = changed_count = compared = found = 0
    unknown: str | None = None
    with tqdm(total=len(source), unit="img", unit_scale=True, desc="comparing", disable=_off(progress)) as bar:
        for start in range(0, len(source), CHUNK):
            samples = source.read(range(start, min(start + CHUNK, len(source))))
            keys = [sample.key for sample in samples]
            rows_B = store.lookup(keys, missing="mask")
            absent = [key for key, row in zip(keys, rows_B.tolist(), strict=True) if row < 0 and key not in bad]
            missing_count += len(absent)
            missing += absent[: LISTED - len(missing)] if len(missing) < LISTED else []
            found += int((rows_B >= 0).sum())
            there = np.flatnonzero(rows_B >= 0)
            stored = store.content[rows_B[there]]
            now = hashes_of([samples[place].image for place in there.tolist()])
            unknown = unknown or why_not_comparable(now, stored)
            can = comparable(now, stored)
            compared += int(can.sum())
            others = there[can & (now != stored)].tolist()
            changed_count += len(others)
            changed += [keys[place] for place in others[: max(0, LISTED - len(changed))]]
            bar.update(len(samples))
    per_view = len(store) // store.run.views.count
    return Coverage(
        samples=len(source),
        missing=tuple(missing),
        missing_count=missing_count,
        surplus_count=per_view - found,
        changed=tuple(changed),
        changed_count=changed_count,
        compared=compared,
        unknown=unknown,
    )


def _off(progress: bool | None) -> bool | None:
    return None if progress is None else not progress


def refuse_derived(manifest: Manifest, where: object) -> None:
    """Raises UsageError for a store that was made from others: teachers give other rows than its recoded ones."""
    if manifest.recorded.get("derived"):
        raise UsageError(
            f"{where}: was made from another store (see 'softlabel inspect {where}'), not by teachers; make it again "
            "from there"
        )


def recorded_place(manifest: Manifest, name: Literal["data", "teachers"], where: object, given: Any = None) -> Any:
    """Where data or teachers lie: as given, or else as they lay when the store was written.

    Raises:
        UsageError: neither is known.
    """
    found = manifest.recorded.get(name) if given is None else given
    if not found:
        raise UsageError(f"{where}: does not say where its {name} lay; give --{name.removesuffix('s')}")
    return found
