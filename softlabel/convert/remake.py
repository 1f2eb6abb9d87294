"""Shards of a store that was made from others, made again from them."""

from collections.abc import Collection, Sequence
from pathlib import Path

from softlabel.convert.combine import combine_recode
from softlabel.convert.recode import convert_recode
from softlabel.convert.rewrite import Recode, RewriteSummary, Truth, keep_columns, rewrite
from softlabel.convert.sample_index import Samples
from softlabel.errors import MismatchError
from softlabel.store.manifest_read import load_root
from softlabel.store.open import open_store
from softlabel.store.origins import missing_origin, origins_of, samples_then
from softlabel.store.storage.open import open_folder


def redo_store(
    store: str | Path,
    *,
    lost: Collection[int],
    sources: Sequence[str] | None = None,
    progress: bool | None = None,
) -> RewriteSummary:
    """Write shards of a derived store again, as `combine`, `merge` or `convert` wrote them.

    Args:
        store: its folder.
        lost: their numbers.
        sources: where the stores that it was made from lie now, in their order; None: where they lay.
        progress: show a bar; absent: if standard error is a terminal.

    Raises:
        MismatchError: a source is not there any more, or is not what it was; what has grown since is.
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
            f"{store}: was made by 'softlabel {command}' from {listed}, and {why}; give --source with the places where "
            "these stores lie now, as they were, or generate the labels again into another folder"
        )
    opened = [open_store(place, verify="sizes") for place in places]
    counts = [
        samples_then(one.run, origin.run, fewer_members=command == "combine")
        for one, origin in zip(opened, origins, strict=True)
    ]
    samples = Samples(opened, counts=[count for count in counts if count is not None])
    recode: Recode = keep_columns
    truth: Truth = "carried"
    if command == "convert":
        recode, truth = convert_recode(samples, manifest.run)
    elif command == "combine":
        recode, truth = combine_recode(samples, manifest.run)
    return rewrite(
        samples, store, manifest.run, recode, command=command, truth=truth, progress=progress, lost=frozenset(lost)
    )
