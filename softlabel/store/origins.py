"""Where the rows of a store came from, as its manifest records it, and so what brings lost ones back."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softlabel.errors import StoreError, StoreNotFoundError
from softlabel.store.manifest import Combine, Manifest, Run
from softlabel.store.manifest_read import load_root
from softlabel.store.storage.base import Folder
from softlabel.store.storage.open import open_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A store that another one was made from: where it lay, and the fingerprint that its run had."""

    path: str
    run: str


def origins_of(manifest: Manifest) -> tuple[str, tuple[Origin, ...]] | None:
    """The command that made a store and the stores that it read; None for one that teachers labelled."""
    made = manifest.recorded.get("derived")
    if not isinstance(made, Mapping):
        return None
    sources = made.get("sources")
    listed = sources if isinstance(sources, list | tuple) else ()
    found = [Origin(path=str(one.get("path")), run=str(one.get("run"))) for one in listed if isinstance(one, Mapping)]
    return str(made.get("command")), tuple(found)


def samples_then(run: Run, fingerprint: str, *, fewer_members: bool = False) -> int | None:
    """How many samples a store of `run` had when its run had this fingerprint; None: it is not that store.

    Growth adds rows and changes none. fewer_members: it may have been extended since, too.
    """
    counts = range(len(run.members), 0, -1) if fewer_members and run.kept else [len(run.members)]
    for count in counts:
        then = run
        if count < len(run.members):
            combine = Combine(rule="keep", weights=(1.0 / count,) * count)
            then = dataclasses.replace(run, members=run.members[:count], combine=combine)
        for part, extent in enumerate(then.extents):
            if then.fingerprint(part) == fingerprint:
                return extent.rows
    return None


def missing_origin(manifest: Manifest, places: Sequence[str] | None = None) -> str | None:
    """Why the rows of a store that was made from others cannot be made again; None where they can be.

    places: where its sources lie now; None: where they lay.
    """
    found = origins_of(manifest)
    assert found is not None
    command, sources = found
    places = [source.path for source in sources] if places is None else places
    if len(places) != len(sources) or not sources:
        return f"expected {len(sources)} sources, found {len(places)}"
    for place, source in zip(places, sources, strict=True):
        try:
            there = load_root(open_folder(place))
        except StoreNotFoundError:
            return f"{place} is not there"
        except StoreError as error:
            return f"{place} cannot be read ({error})"
        if samples_then(there.run, source.run, fewer_members=command == "combine") is None:
            return f"{place} is another store now"
        if not there.complete:
            return f"{place} is not complete"
    return None


def cure(folder: Folder, manifest: Manifest) -> str:
    """What brings lost shards of a store back, in words."""
    if (found := origins_of(manifest)) is None:
        return f"run 'softlabel repair {folder}' to relabel it"
    command, sources = found
    listed = ", ".join(source.path for source in sources)
    if (why := missing_origin(manifest)) is None:
        return f"run 'softlabel repair {folder}' to make it again from {listed}"
    return (
        f"was made by 'softlabel {command}' from {listed}, and {why}: run 'softlabel repair {folder} --source STORE' "
        "with the place where that lies now, or else generate the labels again into another folder"
    )
