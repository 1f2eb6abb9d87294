"""Stores for tests, made without torch: rows that follow from a seed, and what a store of them must hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softlabel.store.formats.base import Rows
from softlabel.store.manifest import BadRow, DatasetInfo, Fidelity, Member, Run, ShardPlan, ViewPolicy
from softlabel.store.writer import Committer, write_shard

FORMATS = ("parquet", "hdf5")


def make_run(format: str = "parquet", *, samples: int = 50, classes: int = 7, views: int = 1, **changes: Any) -> Run:
    settings: dict[str, Any] = {
        "format": format,
        "num_classes": classes,
        "temperature": 4.0,
        "members": (Member(spec="zoo:resnet8", sha256="0" * 64, preprocessing={"mean": [0.5]}, num_classes=classes),),
        "dataset": DatasetInfo(kind="parquet", rows=samples, fingerprint=f"{samples:032x}"),
        "views": ViewPolicy(count=views, policy={"name": "center"}, seed=0),
        "shard_rows": 16,
    }
    return Run(**{**settings, **changes})


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A dataset's worth of labels: keys, hard labels, content hashes and scaled logits (views, samples, classes)."""

    keys: list[str]
    labels: np.ndarray[Any, Any]
    content: np.ndarray[Any, Any]
    logits: np.ndarray[Any, Any]

    @staticmethod
    def of(run: Run, seed: int = 0, keys: Iterable[str] | None = None) -> "Samples":
        rng = np.random.default_rng(seed)
        count = run.dataset.rows
        logits = rng.normal(0, 3, (run.views.count, count, run.num_classes)).astype(np.float32)
        labels = rng.integers(0, run.num_classes, count)
        labels[::5] = -100
        content = rng.integers(1, 2**64, count, dtype=np.uint64)
        content[::7] = 0
        names = [f"n{position % 10}/bild-{position:05d}-é.jpg" for position in range(count)] if keys is None else keys
        return Samples(
            keys=list(names), labels=labels, content=content, logits=logits - logits.max(axis=-1, keepdims=True)
        )

    def rows(self, plan: ShardPlan, bad: Iterable[int] = ()) -> tuple[Rows, list[BadRow]]:
        """The rows of one shard, float16, without the samples that are bad."""
        wrong = [index for index in sorted(bad) if plan.start <= index < plan.stop]
        good = np.setdiff1d(np.arange(plan.start, plan.stop), wrong)
        rows = Rows(
            keys=[self.keys[index] for index in good],
            labels=self.labels[good],
            content=self.content[good],
            columns={"logits": self.logits[plan.view, good].astype(np.float16)},
        )
        return rows, [BadRow(index=index, key=self.keys[index], reason="truncated JPEG") for index in wrong]


FIDELITY = Fidelity(mean_t1=1e-7, worst_t1=4e-7, mean_t=2e-7, worst_t=6e-7)


def write_store(root: Path, run: Run, samples: Samples | None = None, bad: Iterable[int] = ()) -> Samples:
    """Write what is missing of a store and finish it."""
    samples = samples or Samples.of(run)
    with Committer.open(root, run, {"device": "cpu"}) as committer:
        for plan in committer.missing():
            committer.commit(write_shard(root, run, plan, *samples.rows(plan, bad), fidelity=FIDELITY))
        committer.finish()
    return samples


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def reference_rows(run: Run, samples: Samples, bad: Iterable[int] = ()) -> dict[str, Any]:
    """What a store of these samples must hold, row by row, computed without a store."""
    good = np.setdiff1d(np.arange(run.dataset.rows), list(bad))
    order = [(view, index) for view in range(run.views.count) for index in good]
    return {
        "keys": [samples.keys[index] for _, index in order],
        "views": np.array([view for view, _ in order], np.int32),
        "labels": np.array([samples.labels[index] for _, index in order], np.int64),
        "content": np.array([samples.content[index] for _, index in order], np.uint64),
        "logits": np.array([samples.logits[view, index] for view, index in order], np.float32),
    }
