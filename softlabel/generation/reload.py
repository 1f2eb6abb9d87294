"""What labelled a store, loaded again from its manifest.

A store knows its identity, not the places of its data and weights; those are recorded beside it, or given again.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from softlabel.common.device import Choice, Tuning
from softlabel.dataset import Source
from softlabel.errors import MismatchError, UsageError
from softlabel.generation.growth import History
from softlabel.generation.job import Job, prepare
from softlabel.generation.labeller import BadImagePolicy
from softlabel.store.manifest import Manifest


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
