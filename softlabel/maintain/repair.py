"""Replace the damaged or missing shards of a store."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from softlabel.common.arguments import check_arguments
from softlabel.convert import RewriteSummary, redo_store
from softlabel.dataset import Source
from softlabel.errors import MismatchError, StoreCorruptError, UsageError
from softlabel.generation.growth import check_same_data
from softlabel.generation.reload import config_of, reload_job
from softlabel.generation.run import GenerateSummary, add_extra, label_missing
from softlabel.store.manifest import ROOT_NAME
from softlabel.store.manifest_read import load_manifest, load_root
from softlabel.store.origins import CROSSFIT, origins_of
from softlabel.store.storage.open import open_folder
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer

LISTED = 3  # problems listed in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairSummary:
    """Result of `repair`.

    Attributes:
        problems: problems found, each naming its file.
        shards_written: number of shards replaced.
        total_rows: rows of the store.
        derived: whether the store was made from other stores, not by teachers.
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
    """Replace missing and damaged shards, by running the teachers or from the stores that this one was made from.

    Args:
        store: its folder.
        data: the SOURCE, if it moved.
        teachers: the SPECs, if the weights moved.
        sources: for a store made from others, their current paths in order, if they moved.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: decoding processes; None: chosen for the machine.
        progress: show a bar; None: if standard error is a terminal.

    Raises:
        UsageError: data or teachers for a store made from others, or sources for another one.
        MismatchError: data, teachers or sources have changed, or the store was cross-fitted: its sources are gone.
        StoreCorruptError: the manifest is damaged, or the damage is not in a shard.
    """
    folder = open_folder(store)
    try:
        manifest = load_root(folder)
    except StoreCorruptError as error:
        raise StoreCorruptError(
            f"{error}; shards cannot be repaired without {ROOT_NAME}: restore it from a copy, or move it out of the "
            "folder and run the same 'softlabel generate' again, which adopts intact shards unless the store grew, or "
            "label into another folder"
        ) from None
    origins = origins_of(manifest)
    derived = origins is not None
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
            pass  # rebuilds damaged segments from the shards
    report = verify_store(store, allow_incomplete=True)
    if not (report.ok or report.damaged or report.extra):
        raise StoreCorruptError(
            f"{'; '.join(report.problems[:LISTED])}; the damage is not in a shard: label the data again, into another "
            "folder"
        )
    if origins is not None and origins[0] == CROSSFIT:
        if not report.ok:
            raise MismatchError(f"{'; '.join(report.problems[:LISTED])}")
        return RepairSummary(problems=problems, shards_written=0, total_rows=report.rows, derived=True)
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
    config = dataclasses.replace(config_of(manifest), device=device, workers=workers)
    job = reload_job(manifest, store, config, data=data, teachers=teachers, damaged=damaged)
    # Before the damaged shards are dropped: a refused repair must not change the store.
    check_same_data(store, job.labeller.reader, without=damaged)
    with Committer.open(store, job.run, relabel=damaged) as committer:
        add_extra(job, committer)
        return label_missing(job, committer, progress=progress)
