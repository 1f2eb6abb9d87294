"""The stores that a store was made from, as its manifest records them, and how to restore lost rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softlabel.errors import StoreError, StoreNotFoundError
from softlabel.store.manifest import Combine, Manifest, Run
from softlabel.store.manifest_read import load_root
from softlabel.store.storage.base import Folder
from softlabel.store.storage.open import open_folder

CROSSFIT = "crossfit"  # the command whose stores of single folds, its sources, are removed in the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A source of a derived store: its path and the fingerprint of its run at that time."""

    path: str
    run: str


def origins_of(manifest: Manifest) -> tuple[str, tuple[Origin, ...]] | None:
    """Return the command that made a store and the stores that it read; None for a store labelled by teachers."""
    made = manifest.recorded.get("derived")
    if not isinstance(made, Mapping):
        return None
    sources = made.get("sources")
    listed = sources if isinstance(sources, list | tuple) else ()
    found = [Origin(path=str(one.get("path")), run=str(one.get("run"))) for one in listed if isinstance(one, Mapping)]
    return str(made.get("command")), tuple(found)


def samples_then(run: Run, fingerprint: str, *, fewer_members: bool = False) -> int | None:
    """Return how many samples a store had when its run had a fingerprint; None if it never had it.

    Args:
        run: the store's run now; growth adds rows and changes none.
        fingerprint: the earlier fingerprint.
        fewer_members: allow members that were added since.
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
    """Return why a derived store cannot be made again; None if it can.

    Args:
        manifest: of the derived store.
        places: current paths of its sources; None: the recorded ones.
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
            return f"{place} does not exist"
        except StoreError as error:
            return f"{place} cannot be read ({error})"
        if samples_then(there.run, source.run, fewer_members=command == "combine") is None:
            return f"{place} is another store now"
        if not there.complete:
            return f"{place} is not complete"
    return None


def describe_remedy(folder: Folder, manifest: Manifest) -> str:
    """Return in words how to restore lost shards of a store."""
    if (found := origins_of(manifest)) is None:
        return f"run 'softlabel repair {folder}' to relabel it"
    command, sources = found
    if command == CROSSFIT:
        return (
            f"move {folder} away and repeat the 'softlabel crossfit' that made it, which does not train again the "
            f"teachers that are still in {folder}.folds"
        )
    listed = ", ".join(source.path for source in sources)
    if (why := missing_origin(manifest)) is None:
        return f"run 'softlabel repair {folder}' to make it again from {listed}"
    return (
        f"made by 'softlabel {command}' from {listed}, but {why}: run 'softlabel repair {folder} --source STORE' "
        "with the current path of that store, or generate the labels again into another folder"
    )
