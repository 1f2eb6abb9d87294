"""A new member for a store that keeps its members: the same rows, seen by one more teacher.

Legend: B rows, M members, W elements of a column in one row.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from softlabel.common.arguments import check_arguments
from softlabel.common.keys import Keys
from softlabel.dataset import Source
from softlabel.errors import MismatchError, UsageError
from softlabel.generation.executor import LocalExecutor
from softlabel.generation.growth import History, check_same_data
from softlabel.generation.job import load_job
from softlabel.generation.labeller import LabelledShard
from softlabel.generation.reload import config_of, recorded_place, refuse_derived
from softlabel.generation.run import GenerateSummary, label_missing
from softlabel.inputs.content import changed_content, why_not_comparable
from softlabel.labels.combine import normalized_weights
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import Combine, Fidelity, Run
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.replace import replace_store
from softlabel.store.writer import Committer
from softlabel.views import changed as changed_libraries

log = logging.getLogger("softlabel")


@check_arguments
def extend(
    store: str | Path,
    *,
    teacher: str,
    data: "str | Path | Source | Dataset[Any] | None" = None,
    calibration: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: bool | None = None,
) -> GenerateSummary:
    """Add a member to a store that keeps its members; the others are not run again.

    The new shards are written beside the store, in ``STORE.extending``, and take its place in one step at the end; the
    same call resumes an interrupted one.

    Args:
        store: its folder.
        teacher: SPEC of the new member.
        data: the SOURCE or the dataset, where it is not at the recorded place any more.
        calibration: file of `softlabel calibrate` with this teacher; needed where the other members are calibrated.

    Raises:
        UsageError: the store does not keep its members, or keeps them calibrated and this one is not, or the reverse.
        MismatchError: the data are not those that were labelled; the teacher has other classes, or is a member already.
    """
    opened = open_store(store, verify="full")
    manifest, run = opened.manifest, opened.run
    if not run.kept:
        raise UsageError(
            f"{store}: holds the {run.combine.rule} average of its members, which cannot take another one; "
            "generate with --combine keep to add members later"
        )
    refuse_derived(manifest, store)
    if (calibration is not None) != (calibrated := any(member.calibration != 1.0 for member in run.members)):
        raise UsageError(
            f"{store}: its members are {'' if calibrated else 'not '}calibrated; "
            f"{'give --calibration for this one too' if calibrated else 'leave out --calibration'}"
        )
    job = load_job(
        recorded_place(manifest, "data", store, data),
        [teacher],
        dataclasses.replace(
            config_of(manifest), calibration=calibration, device=device, workers=workers, compile=False
        ),
        history=History.of(store),
        recorded={"decoding": manifest.recorded.get("decoding", {})},
        first_member=len(run.members),
    )
    (member,) = job.run.members
    if any((member.sha256, member.preprocessing) == (one.sha256, one.preprocessing) for one in run.members):
        raise MismatchError(f"{store}: {member.spec} with these weights is a member already")
    members = (*run.members, member)
    combine = Combine(rule="keep", weights=normalized_weights(None, len(members)))
    # All but the members must be the store's own.
    if differences := run.differences(dataclasses.replace(job.run, members=run.members, combine=run.combine)):
        raise MismatchError(f"{store}: the data are not those that were labelled; {'; '.join(differences)}")
    extended = dataclasses.replace(run, members=members, combine=combine)
    teachers = [*manifest.recorded.get("teachers", []), teacher]
    beside = Path(f"{Path(store)}.extending")
    try:
        opened_beside = Committer.open(beside, extended, {**manifest.recorded, "teachers": teachers})
    except MismatchError as error:
        raise MismatchError(
            f"{error}; an earlier 'softlabel extend' of {store} left {beside}: give its teacher to finish it, or "
            "remove that folder"
        ) from None
    with opened_beside as committer:
        if committer.resumed:
            check_same_data(beside, job.labeller.reader)
        summary = label_missing(job, committer, executor=_MemberExecutor(opened, extended), progress=progress)
    opened.close()
    replace_store(store, beside)
    return dataclasses.replace(summary, path=str(store))


class _MemberExecutor(LocalExecutor):
    """Puts a new member's columns to the right of those that the store has for the same rows."""

    def __init__(self, store: Store, extended: Run) -> None:
        self._store, self._extended = store, extended
        self._starts = np.cumsum([0, *(record.rows for record in store.shards)])
        self._warned = False

    def complete(self, shard: LabelledShard) -> LabelledShard:
        store, extended, starts = self._store, self._extended, self._starts
        record = store.shards[shard.plan.number]
        kept = store.take(np.arange(starts[record.number], starts[record.number + 1]))
        if Keys.of(shard.rows.keys).to_list() != kept.keys or {r.key for r in record.bad} != {r.key for r in shard.bad}:
            raise MismatchError(f"{store.path / record.file}: holds other samples than can be labelled now")
        seen, now = kept.content, shard.rows.content
        assert now is not None
        changed = changed_content(now, seen)
        unknown = why_not_comparable(now, seen)
        if unknown is not None and not self._warned:
            self._warned = True
            log.warning(
                "warning: %s: its images cannot be compared with those that the other members saw (%s)",
                store.url,
                unknown,
            )
        if changed.any():
            key = kept.keys[int(np.flatnonzero(changed)[0])]
            raise MismatchError(
                f"image {key!r}: is not the one that the other members of {store.path} saw (its content differs); "
                "give the data that was labelled as --data"
            )
        columns = {
            column.name: np.concatenate([kept.columns[column.name], shard.rows.columns[column.name]], axis=1)
            for column in extended.label_columns
        }
        for column in extended.view_columns:
            said = kept.columns[column.name]
            if (wrong := (said != shard.rows.columns[column.name]).any(axis=1)).any():
                key = kept.keys[int(np.flatnonzero(wrong)[0])]
                raise MismatchError(
                    f"image {key!r}: its view {shard.plan.view} is not the one that the other members of {store.path} "
                    f"saw ({column.name} differs); {changed_libraries(store.manifest.recorded.get('libraries'))}"
                )
            columns[column.name] = said
        rows = Rows(keys=shard.rows.keys, labels=kept.labels, content=kept.content, columns=columns)
        members = len(extended.members)
        fidelity = _mean(record.fidelity, shard.fidelity, members)
        return dataclasses.replace(shard, rows=rows, fidelity=fidelity)


def _mean(kept: Fidelity | None, new: Fidelity | None, members: int) -> Fidelity | None:
    if kept is None or new is None:
        return None
    return Fidelity.total([(members - 1, kept), (1, new)])
