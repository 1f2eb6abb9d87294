"""Stores for tests, written without torch: of labels that follow from a seed or that a test gives, and their rows.

V views, N samples, C classes, D width of hidden features.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import xxhash
from numpy.typing import NDArray

from softlabel.store.fidelity import Fidelity
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import BadRow, Combine, DatasetInfo, Member, Run, ShardPlan
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.view_columns import ViewPolicy
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
    """The labels of a whole dataset.

    keys: N strings; labels: int64 (N,); content: uint64 (N,); logits: scaled logits (V, N, C), repeated from the start
    where there are fewer than N; columns: of the encoding, (V, N, W) each, in place of logits in float16; multi_hot:
    int8 (N, C), of a run of independent sigmoids, whose labels are -100.
    """

    keys: Sequence[str]
    labels: np.ndarray[Any, Any]
    content: np.ndarray[Any, Any]
    logits: np.ndarray[Any, Any]
    columns: Mapping[str, np.ndarray[Any, Any]] | None = None
    multi_hot: np.ndarray[Any, Any] | None = None

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
        if run.activation == "sigmoid":
            hot = rng.integers(-1, 2, (count, run.num_classes)).astype(np.int8)
            unlabelled = np.full(count, -100)
            return Samples(keys=list(names), labels=unlabelled, content=content, logits=logits, multi_hot=hot)
        return Samples(
            keys=list(names), labels=labels, content=content, logits=logits - logits.max(axis=-1, keepdims=True)
        )

    def rows(self, plan: ShardPlan, bad: Iterable[int] = ()) -> tuple[Rows, list[BadRow]]:
        """The rows of one shard without the samples that are bad, and these."""
        wrong = [index for index in sorted(bad) if plan.start <= index < plan.stop]
        good = np.setdiff1d(np.arange(plan.start, plan.stop), wrong)
        if self.columns is None:
            columns = {"logits": self.logits[plan.view, good % self.logits.shape[1]].astype(np.float16)}
        else:
            columns = {name: column[plan.view, good] for name, column in self.columns.items()}
        if self.multi_hot is not None:
            columns["multi_hot"] = self.multi_hot[good]
        rows = Rows(
            keys=[self.keys[index] for index in good],
            labels=self.labels[good],
            content=self.content[good],
            columns=columns,
        )
        return rows, [BadRow(index=index, key=self.keys[index], reason="truncated JPEG") for index in wrong]


FIDELITY = Fidelity(mean_t1=1e-7, worst_t1=4e-7, mean_t=2e-7, worst_t=6e-7)


def write_store(
    root: Path,
    run: Run,
    samples: Any = None,
    bad: Iterable[int] = (),
    *,
    extra: Mapping[str, bytes] | None = None,
    fidelity: Fidelity | None = FIDELITY,
    recorded: Mapping[str, Any] | None = None,
) -> Any:
    """Write what is missing of a store of these `Samples` or `Documents` and finish it; they are returned."""
    samples = samples or Samples.of(run)
    with Committer.open(root, run, {"device": "cpu", **(recorded or {})}) as committer:
        for name, data in (extra or {}).items():
            committer.add_extra(name, data)
        for plan in committer.missing():
            committer.commit(write_shard(root, run, plan, *samples.rows(plan, bad), fidelity=fidelity))
        committer.finish()
    return samples


def write_logits(
    root: Path,
    keys: Sequence[str],
    logits_NC: NDArray[np.floating[Any]],
    *,
    images: Sequence[bytes] | None = None,
    labels: Sequence[int] | None = None,
    temperature: float = 4.0,
    rule: str = "logits",
    members: int = 1,
    class_names: tuple[str, ...] | None = None,
    bad: Sequence[str] = (),
    content: NDArray[np.uint64] | None = None,
    shard_rows: int | None = None,
) -> Store:
    """Write a store of these logits, divided by the temperature, and open it; `bad` keys are listed after the rows.

    Fewer logits than keys are repeated. Content hashes are those of the images, where there are some. One shard, unless
    `shard_rows` says otherwise.
    """
    good, count, classes = len(keys), len(keys) + len(bad), logits_NC.shape[1]
    run = make_run(
        samples=count,
        classes=classes,
        class_names=class_names,
        temperature=float(temperature),
        combine=Combine(rule=rule, weights=(1.0 / members,) * members),
        members=(Member(spec="test", sha256="0" * 64, num_classes=classes),) * members,
        shard_rows=shard_rows or count,
    )
    if content is None:
        content = np.zeros(count, np.uint64)
        if images is not None:
            content[:good] = [xxhash.xxh3_64_intdigest(image) for image in images]
    hard = np.full(count, -100)
    if labels is not None:
        hard[:good] = labels
    scaled_NC = (logits_NC / temperature).astype(np.float32)
    samples = Samples(
        keys=[*keys, *bad],
        labels=hard,
        content=content,
        logits=(scaled_NC - scaled_NC.max(axis=1, keepdims=True))[None],
    )
    write_store(root, run, samples, bad=range(good, count), fidelity=None)
    return open_store(root, verify="full")


def write_head_store(root: Path, run: Run, samples: Samples | None = None) -> NDArray[np.float64]:
    """Write a store of encoding `head` with features in float16; the teacher's raw logits (N, C) are returned."""
    rng = np.random.default_rng(0)
    samples = samples or Samples.of(run)
    hidden_ND = rng.normal(size=(run.dataset.rows, run.encoding.width or 0)).astype(np.float16)
    weight_CD = rng.normal(size=(run.num_classes, hidden_ND.shape[1])).astype(np.float32)
    bias_C = rng.normal(size=run.num_classes).astype(np.float32)
    head = safetensors.numpy.save({"weight": weight_CD, "bias": bias_C})
    stored = replace(samples, columns={"hidden": hidden_ND[None]})
    write_store(root, run, stored, extra={"head": head}, fidelity=None)
    return hidden_ND.astype(np.float64) @ weight_CD.T.astype(np.float64) + bias_C


def draw_logits(rows: int, classes: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, classes)) * 5).astype(np.float32)


def read_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def make_reference_rows(run: Run, samples: Samples, bad: Iterable[int] = ()) -> dict[str, Any]:
    """What a store of these samples must hold, row by row, computed without a store; `hard`: as its kind of labels."""
    good, hot = np.setdiff1d(np.arange(run.dataset.rows), list(bad)), samples.multi_hot
    order = [(view, index) for view in range(run.views.count) for index in good]
    return {
        "keys": [samples.keys[index] for _, index in order],
        "views": np.array([view for view, _ in order], np.int32),
        "labels": np.array([samples.labels[index] for _, index in order], np.int64),
        "hard": np.array([(samples.labels if hot is None else hot)[index] for _, index in order]),
        "content": np.array([samples.content[index] for _, index in order], np.uint64),
        "logits": np.array([samples.logits[view, index] for view, index in order], np.float32),
    }
