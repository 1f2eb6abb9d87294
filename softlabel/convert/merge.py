"""Merge stores of different samples."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from softlabel.common.keys import Keys
from softlabel.convert.rewrite import RewriteSummary, open_whole, rewrite
from softlabel.convert.sample_index import Samples
from softlabel.errors import MismatchError, UsageError
from softlabel.inputs.tokenizer import Tokenizer
from softlabel.inputs.vocabulary import Vocabulary
from softlabel.store.manifest import DatasetInfo, Run
from softlabel.store.manifest_read import find_extra
from softlabel.store.reader import Store


def merge_stores(
    stores: Sequence[str | Path],
    out: str | Path,
    *,
    progress: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> RewriteSummary:
    """Merge stores in the given order; labels do not change.

    The merged dataset is the concatenation of the datasets; its fingerprint is that of a source with their samples in
    this order. Rows are divided into new shards. The same call resumes an interrupted one.

    Args:
        stores: folders of two or more finished stores with equal teachers, temperature, combination, encoding, views,
            classes, file format and rows per shard, without common keys.
        out: folder of the new one.
        progress: show a bar; None: if standard error is a terminal.
        options: JSON values to keep in the manifest under `recorded.options`.

    Raises:
        UsageError: fewer than two stores.
        MismatchError: stores differ or share keys, or `out` holds another store.
        StoreError: a store cannot be read or written.
    """
    if len(stores) < 2:
        raise UsageError(f"merge: expected two stores or more, found {len(stores)}")
    opened = [open_whole(store, of="merge", out=out) for store in stores]
    first = opened[0]
    for other in opened[1:]:
        _refuse_other_vocabulary(first, other)
        refuse_difference(first.url, first.run, other.url, other.run)
        _refuse_other_head(first, other)
    for position, other in enumerate(opened[1:], 1):
        for earlier in opened[:position]:
            _refuse_overlap(earlier, other)
    samples = Samples(opened)
    kinds = {store.run.dataset.kind for store in opened}
    dataset = DatasetInfo(
        kind=kinds.pop() if len(kinds) == 1 else "merged",
        rows=samples.count,
        fingerprint=compute_fingerprint(samples),
        has_labels=any(store.run.dataset.has_labels for store in opened),
    )
    run = dataclasses.replace(first.run, dataset=dataset)
    places = ", ".join(str(store.manifest.recorded.get("data", "?")) for store in opened)
    return rewrite(
        samples,
        out,
        run,
        None,
        command="merge",
        truth="carried",
        progress=progress,
        recorded={"data": places},
        options=options,
    )


def refuse_difference(url: str, run: Run, other_url: str, other: Run) -> None:
    """Raise MismatchError if two stores differ in more than their samples."""
    compression = run.compression if other.format == run.format else other.compression
    if differences := run.differences(dataclasses.replace(other, dataset=run.dataset, compression=compression)):
        words = "; ".join(
            one.replace("the store has", "it has").replace("this run", "the other") for one in differences
        )
        raise MismatchError(
            f"{url} and {other_url}: expected labels of one run over different samples, found in the first: "
            f"{words}; 'softlabel convert' changes format, encoding and shard rows, other settings need new labels"
        )


def _refuse_other_vocabulary(first: Store, other: Store) -> None:
    """Raise MismatchError, with the first id that differs, where two stores of tokens have their tokenizers."""
    contents = [store.tokenizer for store in (first, other)]
    if None in contents or contents[0] == contents[1]:
        return
    ours, theirs = (Vocabulary(Tokenizer(content)) for content in contents if content is not None)
    if (difference := ours.find_difference(theirs)) is not None:
        raise MismatchError(
            f"{first.url} and {other.url}: expected one vocabulary, found different ones: {difference}; label the "
            "documents of both with teachers of one tokenizer"
        )


def _refuse_other_head(first: Store, other: Store) -> None:
    if (name := first.run.encoding.extra) is None:
        return
    one, two = (find_extra(store.manifest, name) for store in (first, other))
    if one == two:
        return
    ours, theirs = first.extra or {}, other.extra or {}  # the same numbers may be there in another type
    if ours.keys() != theirs.keys() or not all(np.array_equal(ours[one], theirs[one]) for one in ours):
        raise MismatchError(f"{first.url} and {other.url}: their heads (extra/) differ, so their teachers differ")


def _refuse_overlap(first: Store, other: Store) -> None:
    """Raise MismatchError if two stores share a key, also of a sample without a row."""
    shared: list[str] = []
    for rows in other.stream(["key"]):
        assert rows.key_data is not None
        keys = rows.key_data.get()
        found = first.lookup(keys, missing="mask") >= 0
        if found.any():
            shared += [key for key, hit in zip(keys.to_list(), found, strict=True) if hit]
            break
    bad = list(other.bad)
    if bad:
        shared += [key for key, row in zip(bad, first.lookup(Keys.of(bad), missing="mask"), strict=True) if row >= 0]
    if first.bad:
        shared += [key for key in bad if key in first.bad]
        if other_rows := list(first.bad):
            hits = other.lookup(Keys.of(other_rows), missing="mask")
            shared += [key for key, row in zip(other_rows, hits, strict=True) if row >= 0]
    if shared:
        names = ", ".join(repr(key[:80]) for key in dict.fromkeys(shared[:3]))
        raise MismatchError(
            f"{first.url} and {other.url}: expected different samples, found keys in both, the first: {names}; "
            "leave one of the stores out, or label each sample once"
        )


def compute_fingerprint(samples: Samples) -> str:
    """Compute the fingerprint as `Source.fingerprint` does."""
    digest = xxhash.xxh3_128()
    for key in samples.keys():  # noqa: SIM118
        encoded = key.encode()
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    return digest.hexdigest()
