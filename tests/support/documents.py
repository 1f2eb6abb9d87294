"""Stores of tokens for tests: documents of random ids whose labels follow from a seed.

V views, N documents, C classes, L tokens and P labelled positions of a document, W elements of a column.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from softlabel.store.formats.base import Rows
from softlabel.store.manifest import BadRow, DatasetInfo, Run, ShardPlan
from softlabel.store.token_rows import TokenRun
from tests.support.stores import Samples, make_run

Array = np.ndarray[Any, Any]
LONGEST = 23


def make_token_run(
    format: str = "parquet", *, samples: int = 50, classes: int = 300, positions: str = "all", **changes: Any
) -> Run:
    tokens = TokenRun(tokenizer="ab" * 32, max_length=LONGEST, bos=1, positions=positions)
    dataset = DatasetInfo(kind="json", rows=samples, fingerprint=f"{samples:032x}", has_labels=False)
    settings = {"input": "tokens", "tokens": tokens, "dataset": dataset, "temperature": 2.0}
    return make_run(format, samples=samples, classes=classes, **{**settings, **changes})


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Labelled documents.

    run: what they are for; keys: N strings; ids: of int32 (L,), and masks: of uint8 (L,), N each; content: uint64 (N,);
    logits: scaled logits of float32 (P, C) of each view and document; columns: of the encoding, by name (P, W)
    likewise, in place of logits in float16.
    """

    run: Run
    keys: Sequence[str]
    ids: Sequence[Array]
    masks: Sequence[Array]
    content: Array
    logits: Sequence[Sequence[Array]]
    columns: Mapping[str, Sequence[Sequence[Array]]] | None = None

    @staticmethod
    def of(run: Run, seed: int = 0, shortest: int = 1) -> "Documents":
        rng = np.random.default_rng(seed)
        assert run.tokens is not None
        lengths = rng.integers(shortest, run.tokens.max_length + 1, run.dataset.rows)
        ids = [rng.integers(0, run.num_classes, length).astype("<i4") for length in lengths]
        masks = [rng.integers(0, 2, length).astype("u1") for length in lengths]
        counts = [int(mask.sum()) for mask in masks] if run.tokens.positions == "masked" else lengths
        logits = []
        for _ in range(run.views.count):
            found = [rng.normal(0, 3, (count, run.num_classes)).astype(np.float32) for count in counts]
            logits.append([one - one.max(axis=1, keepdims=True, initial=-np.inf) for one in found])
        content = np.array([xxhash.xxh3_64_intdigest(one.tobytes()) for one in ids], np.uint64)
        keys = [f"doc-{number:05d}-é" for number in range(run.dataset.rows)]
        return Documents(run=run, keys=keys, ids=ids, masks=masks, content=content, logits=logits)

    def join(self, view: int, picks: Iterable[int]) -> dict[str, Array]:
        """The columns of some documents, written again without the store's code."""
        picks = list(picks)
        of = {"logits": [[one.astype(np.float16) for one in part] for part in self.logits]}
        of = of if self.columns is None else dict(self.columns)
        answers = {
            name: np.concatenate([parts[view][0][:0], *(parts[view][n] for n in picks)]) for name, parts in of.items()
        }
        counted = next(iter(of.values()))[view]
        small = "|u1" if self.run.num_classes <= 256 else "<u2"
        return {
            **answers,
            "length": np.array([[len(self.ids[n])] for n in picks], "<i4").reshape(-1, 1),
            "positions": np.array([[len(counted[n])] for n in picks], "<i4").reshape(-1, 1),
            "tokens": np.concatenate([np.zeros(0, small), *(self.ids[n].astype(small) for n in picks)]).reshape(-1, 1),
            "mask": np.concatenate([np.zeros(0, "u1"), *(self.masks[n] for n in picks)]).reshape(-1, 1),
        }

    def rows(self, plan: ShardPlan, bad: Iterable[int] = ()) -> tuple[Rows, list[BadRow]]:
        """The rows of one shard without the documents that are bad, and these."""
        wrong = [index for index in sorted(bad) if plan.start <= index < plan.stop]
        good = [index for index in range(plan.start, plan.stop) if index not in wrong]
        rows = Rows(
            keys=[self.keys[index] for index in good],
            content=self.content[good],
            columns=self.join(plan.view, good),
        )
        return rows, [BadRow(index=index, key=self.keys[index], reason="no tokens") for index in wrong]


def make_samples(kind: str, format: str, **changes: Any) -> tuple[Run, Samples | Documents]:
    """A run of images or tokens, and its samples."""
    if kind == "tokens":
        run = make_token_run(format, **changes)
        return run, Documents.of(run)
    run = make_run(format, **changes)
    return run, Samples.of(run)
