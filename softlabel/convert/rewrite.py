"""Make a store from others: each shard of the new plan is read, recoded, written and committed in turn.

Legend: B rows of a batch or labelled positions, R = B * M of single members, C classes, M members.

Only one shard is in memory; a killed run loses at most that shard, and the same command resumes.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from softlabel.common.keys import Keys
from softlabel.common.multi_hot import MULTI_HOT
from softlabel.convert.answers import StoredAnswers, iter_answers
from softlabel.convert.sample_index import Samples
from softlabel.errors import MismatchError, StoreNotFoundError, UsageError
from softlabel.labels.combine import subtract_maximum
from softlabel.labels.encodings import encode
from softlabel.labels.fidelity import FidelityMeter
from softlabel.store.columns import Array
from softlabel.store.fidelity import Fidelity
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import Run, ShardPlan
from softlabel.store.manifest_read import find_root
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.storage.open import open_folder
from softlabel.store.stored_rows import StoredRows
from softlabel.store.strict_json import to_json
from softlabel.store.token_rows import TOKENIZER
from softlabel.store.writer import Committer, write_shard

# Converts answers to columns of the new store, and adds their cost to the meter.
Recode = Callable[[StoredAnswers, FidelityMeter], dict[str, Array]]
# KL(teacher || decoded) of the new store: that of its sources, measured now, or unknown.
Truth = Literal["carried", "measured", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteSummary:
    """Result of a call; `step` is KL(source || new) in nats over the rows written by this call."""

    path: str
    total_rows: int
    total_bad: int
    shards_written: int
    rows_written: int
    bytes: int
    seconds: float
    step: Fidelity | None


def open_whole(path: str | Path, *, of: str, out: str | Path) -> Store:
    """Open a finished source store.

    Raises:
        UsageError: `out` is the same folder.
        StoreError: as `open_store`.
    """
    if _normalise_path(path) == _normalise_path(out):
        raise UsageError(f"{of}: expected another folder for the result, found the store itself, {out}")
    return open_store(path, verify="sizes")  # every byte is checked before the first row is written


def _normalise_path(path: str | Path) -> str:
    text = str(path).removeprefix("file://")
    return text.rstrip("/") if "://" in text else str(Path(text).resolve())


def rewrite(
    samples: Samples,
    out: str | Path,
    run: Run,
    recode: Recode | None,
    *,
    command: str,
    truth: Truth,
    progress: bool | None,
    recorded: Mapping[str, Any] | None = None,
    lost: Collection[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> RewriteSummary:
    """Write a store, or its missing shards.

    Args:
        samples: of the source stores.
        out: folder of the new store.
        run: its identity.
        recode: converts answers; None: they are copied.
        command: for messages and the manifest.
        truth: how the cost of the new rows is known.
        progress: show a bar; None: if standard error is a terminal.
        recorded: changes to what the first source records.
        lost: shards of a finished store to write again; None: nothing is repaired.
        options: kept in the manifest.

    Raises:
        MismatchError: `out` holds a store of another run or one that was made in another way.
        StoreCorruptError: a source is damaged; its bytes are checked first, as a copy would get valid checksums.
        StoreError: the disk cannot be written.
    """
    started = time.perf_counter()
    made = _describe_sources(samples.stores, command)
    there = find_root(open_folder(out))
    # A store that was begun goes on as it is; a new one has what new ones have, whatever its sources are.
    begun = there is not None and there.run.format == run.format
    run = dataclasses.replace(run, compression=there.run.compression if there is not None and begun else None)
    notes: dict[str, Any] | None = None
    if lost is None:
        _refuse_other(out, made)
        notes = {**samples.stores[0].manifest.recorded, **(recorded or {}), "derived": made}
        notes.pop("options", None)  # those of the first source
        if options is not None:
            notes["options"] = dict(options)
    steps: list[tuple[int, Fidelity | None]] = []
    written = 0
    with Committer.open(out, run, notes, relabel=lost) as committer:
        missing = committer.missing()
        if missing:
            for store in samples.stores:
                open_store(store.url, verify="full").close()
        if lost is not None or not committer.complete:
            name, content = run.encoding.extra, samples.stores[0].extra_file  # reading it checks its hash
            if name is not None and content is not None:
                committer.add_extra(name, content)
            if (tokenizer := next(filter(None, (store.tokenizer for store in samples.stores)), None)) is not None:
                committer.add_extra(TOKENIZER, tokenizer, "json")
        total = run.dataset.rows * run.views.count
        left = sum(plan.stop - plan.start for plan in missing)
        with _make_bar(command, total, total - left, progress) as bar:
            for plan in missing:
                meter = FidelityMeter(temperature=run.temperature, encoding=run.encoding, activation=run.activation)
                rows = _gather(samples, run, plan, recode, meter, bar)
                steps.append((meter.rows, meter.result()))
                match truth:
                    case "carried":
                        cost = samples.cost(plan.view, plan.start, plan.stop)
                    case "measured":
                        cost = meter.result()
                    case "unknown":
                        cost = None
                bad = samples.bad(plan.view, plan.start, plan.stop)
                committer.commit(write_shard(out, run, plan, rows, bad, fidelity=cost))
                written += len(rows.keys)
                bar.update(len(bad))
        step = Fidelity.total(steps)
        if step is not None:
            counted = sum(rows for rows, _ in steps) // run.members_stored
            made = {**made, "step": {"rows": counted, **to_json(step)}}
        totals = committer.finish({"derived": made} if missing and lost is None else None).totals
    return RewriteSummary(
        path=str(out),
        total_rows=totals.rows,
        total_bad=totals.bad,
        shards_written=len(missing),
        rows_written=written,
        bytes=totals.bytes,
        seconds=time.perf_counter() - started,
        step=step,
    )


def encode_answers(scaled_logits: Tensor, answers: StoredAnswers, run: Run, meter: FidelityMeter) -> dict[str, Array]:
    """Encode scaled logits (B, C), or (B, M, C) if members are kept, as columns of `run`, and measure the cost."""
    scaled_RC = scaled_logits.reshape(-1, run.num_classes)
    if run.activation == "softmax":
        scaled_RC = subtract_maximum(scaled_RC)
    seeds_R = None if answers.seeds is None else torch.from_numpy(answers.seeds)
    columns = encode(scaled_RC, run.encoding, temperature=run.temperature, seeds_R=seeds_R)
    meter.add(scaled_RC, columns)
    return {
        column.name: columns[column.name].numpy().astype(column.numpy, copy=False).reshape(-1, column.width)
        for column in run.label_columns
    }


def _gather(
    samples: Samples, run: Run, plan: ShardPlan, recode: Recode | None, meter: FidelityMeter, bar: "tqdm[Any]"
) -> Rows:
    """Collect the rows of one shard of the new store."""
    keys: list[Keys] = []
    labels, content = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    columns: dict[str, list[Array]] = {
        column.name: [np.zeros((0, column.width), column.numpy)] for column in run.columns
    }
    for rows in samples.read(plan.view, plan.start, plan.stop):
        assert rows.key_data is not None
        keys.append(rows.key_data.get())
        labels.append(rows.labels)
        content.append(rows.content)
        kept = (*(run.label_columns if recode is None else ()), *run.sample_columns)
        for name, array in pick_features(rows, run).items():
            columns[name].append(array)
        for column in kept:
            columns[column.name].append(rows.hard_labels if column.name == MULTI_HOT else rows.columns[column.name])
        if recode is not None:
            for answers in iter_answers(rows, run):
                for name, array in recode(answers, meter).items():
                    columns[name].append(array)
        bar.update(len(rows))
    return Rows(
        keys=Keys.join(keys) if keys else Keys.of([]),
        labels=np.concatenate(labels),
        content=np.concatenate(content),
        columns={name: np.concatenate(parts) for name, parts in columns.items()},
    )


def pick_features(rows: StoredRows, run: Run) -> dict[str, Array]:
    """The columns of features that stored rows have of the members of `run`."""
    stored = {column.name: rows.columns[column.name] for column in run.feature_columns}
    if len(run.members) == len(rows.run.members):
        return stored
    numbers = [rows.run.members.index(member) for member in run.members]
    count = len(rows.run.members)
    return {
        name: array.reshape(len(rows), count, -1)[:, numbers].reshape(len(rows), -1) for name, array in stored.items()
    }


def _describe_sources(stores: Sequence[Store], command: str) -> dict[str, Any]:
    """Return the content of `manifest.recorded.derived`: the command, the source stores and their cost."""
    return {
        "command": command,
        "sources": [
            {
                "path": store.url,
                "store_id": store.manifest.store_id,
                "run": store.run.fingerprint(),
                "encoding": to_json(store.run.encoding),
                "temperature": store.run.temperature,
                "fidelity": to_json(store.manifest.totals.fidelity),
                "derived": store.manifest.recorded.get("derived"),
            }
            for store in stores
        ],
    }


def _refuse_other(out: str | Path, made: Mapping[str, Any]) -> None:
    """Raise MismatchError if `out` was begun from other sources: their rows may differ even for an equal run."""
    try:
        found = open_store(out, verify="none", allow_incomplete=True)
    except StoreNotFoundError:
        return
    there = found.manifest.recorded.get("derived")
    if _extract_identity(there) != _extract_identity(made):
        how = f"'softlabel {there.get('command')}' from other stores" if isinstance(there, Mapping) else "a teacher"
        raise MismatchError(
            f"{out}: expected no store, or one begun by 'softlabel {made['command']}' from the same store; found one "
            f"made by {how}; choose another folder"
        )


def _extract_identity(made: object) -> object:
    """Return the parts of a provenance that determine the rows: commands and runs, not paths."""
    if not isinstance(made, Mapping):
        return None
    sources = made.get("sources")
    listed = sources if isinstance(sources, list | tuple) else ()
    return (
        made.get("command"),
        [(one.get("run"), _extract_identity(one.get("derived"))) for one in listed if isinstance(one, Mapping)],
    )


def _make_bar(command: str, total: int, initial: int, progress: bool | None) -> "tqdm[Any]":
    disable = None if progress is None else not progress
    return tqdm(total=total, initial=initial, unit="row", unit_scale=True, desc=command, disable=disable, leave=False)
