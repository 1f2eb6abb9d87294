"""Load the data and teachers of a store again, from the paths that its manifest records or from new ones."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from softlabel.dataset import Source
from softlabel.errors import MismatchError, UsageError
from softlabel.generation.config import GenerateConfig
from softlabel.generation.growth import History
from softlabel.generation.job import Job, load_job
from softlabel.generation.optimize import OPTIMIZED
from softlabel.store.manifest import Manifest


def config_of(manifest: Manifest) -> GenerateConfig:
    """Restore the configuration of a store's run from its manifest."""
    run, recorded = manifest.run, manifest.recorded
    features = run.features
    embedding = None if features is None else features.embedding
    wanted = () if features is None else features.names
    return GenerateConfig(
        activation=run.activation,
        combine=run.combine.rule,  # type: ignore[arg-type]
        weights=None if run.kept else run.combine.weights,
        temperature=run.temperature,
        calibration=[member.calibration for member in run.members],
        # With the recorded size labels agree to the bit, else up to rounding.
        batch_size=int(recorded.get("batch_size", 256)),
        precision=run.members[0].precision,  # type: ignore[arg-type]
        seed=run.views.seed,
        ignore_labels=not run.dataset.has_labels,
        views=run.views.count,
        augment=run.views,
        encoding=run.encoding,
        format=run.format,
        shard_rows=run.shard_rows,
        max_length=None if run.tokens is None else run.tokens.max_length,
        positions="all" if run.tokens is None else run.tokens.positions,
        also=wanted or None,
        only=None if run.encoding.labels else wanted[0],
        embedding_width=None if embedding is None or embedding.projection is None else embedding.width,
        embedding_type=None if embedding is None else embedding.type,
        compile=bool(recorded.get("compile", False)),
        optimize="auto" if recorded.get(OPTIMIZED) else "none",
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
    """Load the job that labelled a store.

    Args:
        manifest: of the store.
        where: path of the store.
        config: `config_of` the manifest, with changes such as the device.
        data: the SOURCE, if it moved.
        teachers: the SPECs, if they moved.
        trust_keys: compare only kind and length of the data; skip reading all keys.
        damaged: numbers of damaged shards to label again.

    Raises:
        UsageError: the store was not labelled by teachers, or does not record the paths of data or teachers.
        MismatchError: data or teachers have changed.
    """
    run = manifest.run
    refuse_derived(manifest, where)
    places = recorded_place(manifest, "teachers", where, teachers)
    if len(places) != len(run.members):
        raise MismatchError(
            f"{where}: expected {len(run.members)} teachers as when it was labelled, found {len(places)}"
        )
    job = load_job(
        recorded_place(manifest, "data", where, data),
        places,
        config,
        history=History.of(where, damaged=damaged),
        recorded=manifest.recorded,
        trusted=run.dataset if trust_keys else None,
        there=run,
    )
    if differences := run.differences(job.run):
        raise MismatchError(
            f"{where}: data or teachers differ from those that labelled it; {'; '.join(differences)}; "
            "give the same --data and --teacher"
        )
    return job


def refuse_derived(manifest: Manifest, where: object) -> None:
    """Refuse a store that was made from others: teachers would give other rows.

    Raises:
        UsageError: it was.
    """
    if manifest.recorded.get("derived"):
        raise UsageError(
            f"{where}: made from another store (see 'softlabel inspect {where}'), not by teachers; make it again from "
            "that store"
        )


def recorded_place(manifest: Manifest, name: Literal["data", "teachers"], where: object, given: Any = None) -> Any:
    """Return the given data or teachers, else the recorded ones.

    Raises:
        UsageError: there are none.
    """
    found = manifest.recorded.get(name) if given is None else given
    if not found:
        raise UsageError(f"{where}: does not record its {name}; give --{name.removesuffix('s')}")
    return found
