"""What labelled a store, loaded again from its manifest.

A store knows its identity, not the places of its data and weights; those are recorded beside it, or given again.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from softlabel.dataset import Source
from softlabel.errors import MismatchError, UsageError
from softlabel.generation.config import GenerateConfig
from softlabel.generation.growth import History
from softlabel.generation.job import Job, load_job
from softlabel.store.manifest import Manifest


def config_of(manifest: Manifest) -> GenerateConfig:
    """What the run of a store was asked for, as its manifest has it."""
    run, recorded = manifest.run, manifest.recorded
    return GenerateConfig(
        combine=run.combine.rule,  # type: ignore[arg-type]
        weights=None if run.kept else run.combine.weights,
        temperature=run.temperature,
        calibration=[member.calibration for member in run.members],
        # The recorded size: labels agree across sizes within a rounding step, with the same size to the bit.
        batch_size=int(recorded.get("batch_size", 256)),
        precision=run.members[0].precision,  # type: ignore[arg-type]
        seed=run.views.seed,
        ignore_labels=not run.dataset.has_labels,
        views=run.views.count,
        augment=run.views,
        encoding=run.encoding,
        format=run.format,
        shard_rows=run.shard_rows,
        compile=bool(recorded.get("compile", False)),
    )


def reload_job(
    manifest: Manifest,
    where: str | Path,
    config: GenerateConfig,
    *,
    data: "str | Path | Source | Dataset[Any] | None" = None,
    teachers: Sequence[str] | None = None,
    trust_keys: bool = False,
    damaged: Collection[int] | None = None,
) -> Job:
    """Load what labelled a store, from where the store says it lay or from where it lies now.

    Args:
        manifest: of the store.
        where: the store lies.
        config: `config_of` the manifest, with another device, number of workers and the like.
        data: the SOURCE, where it is not at the recorded place.
        teachers: the SPECs, where they are not at the recorded places.
        trust_keys: of the data compare kind and length alone; skip reading all keys.
        damaged: numbers of shards that are to be labelled again, whose bytes are not trusted.

    Raises:
        UsageError: the store was not labelled by teachers, or does not say where data or teachers lay.
        MismatchError: data or teachers are not those that labelled it.
    """
    run = manifest.run
    refuse_derived(manifest, where)
    places = recorded_place(manifest, "teachers", where, teachers)
    if len(places) != len(run.members):
        raise MismatchError(
            f"{where}: expected {len(run.members)} teachers, as it was labelled by, found {len(places)}"
        )
    job = load_job(
        recorded_place(manifest, "data", where, data),
        places,
        config,
        history=History.of(where, damaged=damaged),
        recorded=manifest.recorded,
        trusted=run.dataset if trust_keys else None,
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
