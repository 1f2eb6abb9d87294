"""A teacher's answers that the contract of an encoding is tested on, and stores of them.

N samples, M members, R = N * M rows, P labelled positions of documents, C classes, W elements of a column, D width of a
hidden layer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.common.activation import Activation
from softlabel.common.multi_hot import MULTI_HOT
from softlabel.labels.encodings import Reading, encode
from softlabel.store.columns import index_dtype
from softlabel.store.encodings import Encoding
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import Combine, DatasetInfo, Member, Run
from softlabel.store.token_rows import TokenRun
from softlabel.store.writer import Committer, write_shard

Array = NDArray[Any]

_ROWS = 40


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodingCase:
    """Answers of a teacher, and what else an encoding may make of them.

    Attributes:
        scaled_logits: float32 (R, C), divided by the temperature; of a softmax the row's maximum subtracted.
        temperature: the store's.
        hidden: float32 (R, D), of a teacher whose last layer is `extra`; None where the encoding does not store it.
        extra: float32 arrays that the store keeps once.
        activation: what the answers are logits of.
    """

    scaled_logits: Array
    temperature: float = 4.0
    hidden: Array | None = None
    extra: Mapping[str, Array] = field(default_factory=dict)
    activation: Activation = "softmax"

    @property
    def num_classes(self) -> int:
        return int(self.scaled_logits.shape[1])

    def encode(self, encoding: Encoding, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Columns (R, W) of these rows, as the pipeline makes them."""
        seeds_R = torch.arange(len(self.scaled_logits)) * 7919
        hidden_RD = None if self.hidden is None else torch.from_numpy(self.hidden)[rows]
        scaled_RC = torch.from_numpy(self.scaled_logits)[rows]
        return encode(scaled_RC, encoding, temperature=self.temperature, seeds_R=seeds_R[rows], hidden_RD=hidden_RD)


def draw_case(
    encoding: Encoding, *, classes: int, rows: int = _ROWS, seed: int = 0, activation: Activation = "softmax"
) -> EncodingCase:
    """Draw a teacher's answers; those of a linear layer for an encoding of what enters it."""
    rng, temperature = np.random.default_rng(seed), 4.0
    extra = {name: rng.normal(size=shape).astype(np.float32) for name, shape in encoding.extra_shapes(classes).items()}
    hidden = None
    if encoding.from_hidden:
        hidden = rng.normal(0, 2, (rows, extra["weight"].shape[1])).astype(np.float32)
        logits = hidden @ extra["weight"].T + extra["bias"]
    else:
        logits = rng.normal(0, 4, (rows, classes))
    scaled = logits / temperature
    if activation == "softmax":
        scaled = scaled - scaled.max(axis=1, keepdims=True)
    return EncodingCase(
        scaled_logits=scaled.astype(np.float32),
        temperature=temperature,
        hidden=hidden,
        extra=extra,
        activation=activation,
    )


def draw_multi_hot(case: EncodingCase) -> Array:
    """Hard labels of each class, int8 (R, C)."""
    return np.random.default_rng(1).integers(-1, 2, case.scaled_logits.shape).astype(np.int8)


def read_at(case: EncodingCase) -> Reading:
    head = None
    if case.hidden is not None:
        head = (torch.from_numpy(case.extra["weight"]), torch.from_numpy(case.extra["bias"]))
    return Reading(num_classes=case.num_classes, temperature=case.temperature, at=case.temperature, head=head)


def write_case(
    root: Path,
    encoding: Encoding,
    case: EncodingCase,
    *,
    members: int = 1,
    format: Literal["parquet", "hdf5"] = "parquet",
) -> None:
    """Write a store of these answers, in shards of 16 samples."""
    samples = len(case.scaled_logits) // members
    member = Member(spec="test", sha256="0" * 64, num_classes=case.num_classes)
    run = Run(
        format=format,
        num_classes=case.num_classes,
        temperature=case.temperature,
        encoding=encoding,
        combine=Combine(rule="keep", weights=(1 / members,) * members) if members > 1 else Combine(),
        members=(member,) * members,
        dataset=DatasetInfo(kind="test", rows=samples, fingerprint="0" * 32),
        shard_rows=16,
        activation=case.activation,
    )
    stored = {name: column.reshape(samples, -1).numpy() for name, column in case.encode(encoding).items()}
    if case.activation == "sigmoid":
        stored[MULTI_HOT] = draw_multi_hot(case)
    _write_rows(root, run, case, stored, np.arange(samples + 1))


def write_documents(
    root: Path, encoding: Encoding, case: EncodingCase, lengths: Sequence[int], *, format: Literal["parquet", "hdf5"]
) -> None:
    """Write a store of documents of these lengths, whose positions have the case's answers one after another."""
    count, ids = case.num_classes, np.arange(sum(lengths)) % case.num_classes
    run = Run(
        format=format,
        num_classes=count,
        temperature=case.temperature,
        encoding=encoding,
        members=(Member(spec="test", sha256="0" * 64, num_classes=count),),
        dataset=DatasetInfo(kind="test", rows=len(lengths), fingerprint="0" * 32, has_labels=False),
        input="tokens",
        shard_rows=4,
        tokens=TokenRun(tokenizer="0" * 64, max_length=max(lengths)),
    )
    stored = {name: column.numpy() for name, column in case.encode(encoding).items()}
    stored["tokens"] = ids[:, None].astype(index_dtype(count))
    stored["mask"] = np.ones((len(ids), 1), np.uint8)
    _write_rows(root, run, case, stored, np.cumsum([0, *lengths]))


def _write_rows(root: Path, run: Run, case: EncodingCase, stored: Mapping[str, Array], ends: Array) -> None:
    """Write a store of which row i has the elements `ends[i]` to `ends[i + 1]` of the columns."""
    with Committer.open(root, run) as committer:
        if run.encoding.extra is not None and case.extra:
            committer.add_extra(run.encoding.extra, safetensors.numpy.save(dict(case.extra)))
        for plan in committer.missing():
            part = slice(ends[plan.start], ends[plan.stop])
            columns = {name: column[part] for name, column in stored.items()}
            if run.tokens is not None:
                lengths = np.diff(ends)[plan.start : plan.stop, None].astype(np.int32)
                columns |= {"length": lengths, "positions": lengths}
            keys = [f"{index}.jpg" for index in range(plan.start, plan.stop)]
            committer.commit(write_shard(root, run, plan, Rows(keys=keys, columns=columns)))
        committer.finish()


def read_columns(root: Path) -> dict[str, Array]:
    """The columns of a store as FORMAT.md describes them, by pyarrow or h5py alone: (N, W) or (P, W) each."""
    parts = []
    for path in sorted((root / "shards").iterdir()):
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            declared, table = json.loads(file.metadata.metadata[b"softlabel"])["columns"], file.read()
            raw = {one["name"]: np.frombuffer(b"".join(table[one["name"]].to_pylist()), np.uint8) for one in declared}
        else:
            with h5py.File(path, "r") as file:
                declared = json.loads(file.attrs["softlabel"])["columns"]
                raw = {one["name"]: file[one["name"]][:] for one in declared}
        parts.append({one["name"]: raw[one["name"]].view(one["dtype"]).reshape(-1, one["width"]) for one in declared})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
