"""Replace shards of a store from the stores that it was made from."""

from collections.abc import Collection, Sequence
from pathlib import Path

from softlabel.convert.combine import combine_recode
from softlabel.convert.recode import convert_recode
from softlabel.convert.rewrite import Recode, RewriteSummary, Truth, rewrite
from softlabel.convert.sample_index import Samples
from softlabel.errors import MismatchError
from softlabel.store.manifest_read import load_root
from softlabel.store.open import open_store
from softlabel.store.origins import missing_origin, origins_of, samples_then
from softlabel.store.storage.open import open_folder


def redo_store(
    store: str | Path, *, lost: Collection[int], sources: Sequence[str] | None = None, progress: bool | None = None
) -> RewriteSummary:
    """Write shards of a derived store again, as `combine`, `merge` or `convert` wrote them.

    Args:
        store: its folder.
        lost: numbers of the shards.
        sources: current paths of its sources, in order; None: the recorded ones.
        progress: show a bar; None: if standard error is a terminal.

    Raises:
        MismatchError: a source is missing, or has changed other than by growth.
        StoreCorruptError: a source is damaged.
        StoreError: a store cannot be read or written.
    """
    manifest = load_root(open_folder(store))
    found = origins_of(manifest)
    assert found is not None
    command, origins = found
    places = [origin.path for origin in origins] if sources is None else [str(source) for source in sources]
    if (why := missing_origin(manifest, places)) is not None:
        listed = ", ".join(origin.path for origin in origins)
        raise MismatchError(
            f"{store}: made by 'softlabel {command}' from {listed}, but {why}; give --source with the current paths of "
            "these stores, or generate the labels again into another folder"
        )
    opened = [open_store(place, verify="sizes") for place in places]
    counts = [
        samples_then(one.run, origin.run, fewer_members=command == "combine")
        for one, origin in zip(opened, origins, strict=True)
    ]
    samples = Samples(opened, counts=[count for count in counts if count is not None])
    recode: Recode | None = None
    truth: Truth = "carried"
    if command == "convert":
        recode, truth = convert_recode(samples, manifest.run)
    elif command == "combine":
        recode, truth = combine_recode(samples, manifest.run)
    return rewrite(
        samples, store, manifest.run, recode, command=command, truth=truth, progress=progress, lost=frozenset(lost)
    )
