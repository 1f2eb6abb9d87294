"""Add a member to a store that keeps its members.

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
from softlabel.common.multi_hot import MULTI_HOT
from softlabel.dataset import Source
from softlabel.errors import MismatchError, UsageError
from softlabel.evaluation.language import check_vocabulary
from softlabel.generation.assemble import LabelledShard
from softlabel.generation.executor import LocalExecutor
from softlabel.generation.growth import History, check_same_data
from softlabel.generation.job import load_job
from softlabel.generation.optimize import OPTIMIZED, Optimization
from softlabel.generation.reload import config_of, recorded_place, refuse_derived
from softlabel.generation.run import GenerateSummary, label_missing
from softlabel.inputs.content import changed_content, why_not_comparable
from softlabel.labels.combine import normalized_weights
from softlabel.models import LanguageModel
from softlabel.store.features import Features
from softlabel.store.fidelity import Fidelity
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import Combine, Run
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.replace import replace_store
from softlabel.store.token_rows import POSITIONS, TOKENIZER
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

    The new shards are written to ``STORE.extending``, which replaces the store atomically at the end; the same call
    resumes an interrupted one.

    Args:
        store: its folder.
        teacher: SPEC of the new member.
        data: the SOURCE or the dataset, if it moved.
        calibration: file of `softlabel calibrate` with this teacher; needed if the other members are calibrated.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        workers: decoding processes; None: chosen for the machine.
        progress: show a bar; None: if standard error is a terminal.

    Raises:
        UsageError: the store does not keep its members, or only one of store and teacher is calibrated.
        MismatchError: the data differ from the labelled ones; the teacher has other classes, or is a member already.
    """
    opened = open_store(store, verify="full")
    manifest, run = opened.manifest, opened.run
    if not run.kept:
        raise UsageError(
            f"{store}: expected a store that keeps its members, found their {run.combine.rule} average; generate with "
            "--combine keep to add members later"
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
            config_of(manifest),
            calibration=calibration,
            device=device,
            workers=workers,
            compile=False,
            optimize="none",
        ),
        history=History.of(store),
        recorded={"decoding": manifest.recorded.get("decoding", {})},
        there=run,
        first_member=len(run.members),
    )
    (member,), (model,) = job.run.members, (one.model for one in job.labeller.teachers)
    if isinstance(model, LanguageModel):
        check_vocabulary(f"teacher {teacher}", opened, model.vocabulary)
    if any((member.sha256, member.preprocessing) == (one.sha256, one.preprocessing) for one in run.members):
        raise MismatchError(f"{store}: {member.spec} with these weights is a member already")
    members = (*run.members, member)
    combine = Combine(rule="keep", weights=normalized_weights(None, len(members)))
    features = _join_features(store, run, job.run)
    # Everything but the members must agree.
    same = dataclasses.replace(job.run, members=run.members, combine=run.combine, features=run.features)
    if differences := run.differences(same):
        raise MismatchError(f"{store}: the data differ from the labelled ones; {'; '.join(differences)}")
    extended = dataclasses.replace(run, members=members, combine=combine, features=features)
    recorded = {**manifest.recorded, "teachers": [*manifest.recorded.get("teachers", []), teacher]}
    if how := recorded.get(OPTIMIZED):  # a repair computes each member as it was computed
        recorded[OPTIMIZED] = [*how, Optimization().to_dict()]
    beside = Path(f"{Path(store)}.extending")
    try:
        opened_beside = Committer.open(beside, extended, recorded)
    except MismatchError as error:
        raise MismatchError(
            f"{error}; {beside} is of an interrupted 'softlabel extend': give its teacher to finish it, or remove the "
            "folder"
        ) from None
    with opened_beside as committer:
        if (tokenizer := opened.tokenizer) is not None:
            committer.add_extra(TOKENIZER, tokenizer, "json")
        if committer.resumed:
            check_same_data(beside, job.labeller.reader)
        executor = _MemberExecutor(opened, extended)
        summary = label_missing(job, committer, executor=executor, progress=progress, name=str(store))
    opened.close()
    replace_store(store, beside)
    return summary


def _join_features(store: str | Path, run: Run, own: Run) -> Features | None:
    """The features of the members of a store, and of a new one."""
    if run.features is None or own.features is None:
        return run.features
    try:
        return run.features.joined(own.features)
    except ValueError as error:
        raise MismatchError(
            f"{store}: {error} (the same widths, sizes and types), found others of {own.members[0].spec}; name modules "
            "that give the same, ?embedding=MODULE or ?attention=MODULE,MODULE"
        ) from None


class _MemberExecutor(LocalExecutor):
    """Appends a new member's columns to those of the store for the same rows."""

    def __init__(self, store: Store, extended: Run) -> None:
        self._store, self._extended = store, extended
        self._starts = np.cumsum([0, *(record.rows for record in store.shards)])
        self._warned = False

    def complete(self, shard: LabelledShard) -> LabelledShard:
        store, extended, starts = self._store, self._extended, self._starts
        record = store.shards[shard.plan.number]
        kept = store.take(np.arange(starts[record.number], starts[record.number + 1]))
        if Keys.of(shard.rows.keys).to_list() != kept.keys or {r.key for r in record.bad} != {r.key for r in shard.bad}:
            raise MismatchError(f"{store.path / record.file}: its samples differ from those that can be labelled now")
        seen, now = kept.content, shard.rows.content
        assert now is not None
        changed = changed_content(now, seen)
        unknown = why_not_comparable(now, seen)
        if unknown is not None and not self._warned:
            self._warned = True
            log.warning(
                "warning: %s: its samples cannot be compared with those of the other members (%s)", store.url, unknown
            )
        if changed.any():
            key = kept.keys[int(np.flatnonzero(changed)[0])]
            raise MismatchError(
                f"sample {key!r} is not the one that the other members of {store.path} labelled (its content differs); "
                "give the data that was labelled as --data"
            )
        if extended.tokens is not None and (kept.columns[POSITIONS] != shard.rows.columns[POSITIONS]).any():
            raise MismatchError(
                f"{store.path}: expected labels at the positions of the other members, found others: a teacher vllm: "
                "does not answer at the last token of a document, others do; extend with a teacher of the same kind"
            )
        columns = {
            column.name: np.concatenate([kept.columns[column.name], shard.rows.columns[column.name]], axis=1)
            for column in (*extended.label_columns, *extended.feature_columns)
        }
        for column in extended.sample_columns:
            stored = kept.columns[column.name]
            if column.name == MULTI_HOT:
                columns[column.name] = stored
                continue
            if (wrong := (stored != shard.rows.columns[column.name]).any(axis=1)).any():
                row, _ = kept.spans.row_of(column.per, int(np.flatnonzero(wrong)[0]))
                key = kept.keys[row]
                raise MismatchError(
                    f"sample {key!r}: view {shard.plan.view} ({column.name}) differs from the one that other members "
                    f"of {store.path} labelled; {changed_libraries(store.manifest.recorded.get('libraries'))}"
                )
            columns[column.name] = stored
        rows = Rows(keys=shard.rows.keys, labels=kept.labels, content=kept.content, columns=columns)
        members = len(extended.members)
        fidelity = _average_fidelity(record.fidelity, shard.fidelity, members)
        return dataclasses.replace(shard, rows=rows, fidelity=fidelity)


def _average_fidelity(kept: Fidelity | None, new: Fidelity | None, members: int) -> Fidelity | None:
    if kept is None or new is None:
        return None
    kept, new = (dataclasses.replace(one, positions=None) for one in (kept, new))  # the rows are the same
    return Fidelity.total([(members - 1, kept), (1, new)])
