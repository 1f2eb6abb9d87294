"""What a report must say of a store of documents: numpy in float64 on what pyarrow reads from its files.

N documents, L tokens and P labelled positions of one, C tokens of the vocabulary, M members.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
# A document's columns as they are in the file -> logits (M, P, C) at a temperature.
Decode = Callable[[dict[str, bytes], float], F64]


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """ids: int64 (L,); place: int64 (P,) of its positions, counts: bool (P,); cells: the labels as bytes."""

    key: str
    ids: I64
    place: I64
    counts: NDArray[np.bool_]
    cells: dict[str, bytes]


def read_documents(store: Path, *, masked: bool) -> list[RawDocument]:
    found = []
    for path in sorted((store / "shards").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            itemsize = len(row["tokens"]) // max(1, len(row["mask"]))
            ids = np.frombuffer(row["tokens"], f"<u{itemsize}").astype(np.int64)
            mask = np.frombuffer(row["mask"], "u1")
            place = np.flatnonzero(mask) if masked else np.arange(len(ids))
            cells = {name: row[name] for name in ("logits", "index", "value", "tail") if name in row}
            found.append(RawDocument(key=row["key"], ids=ids, place=place, counts=mask[place] == 1, cells=cells))
    return found


def decode_float16(classes: int, members: int, stored: float) -> Decode:
    def decode(cells: dict[str, bytes], at: float) -> F64:
        logits = np.frombuffer(cells["logits"], "<f2").astype(np.float64).reshape(-1, members, classes)
        return logits.swapaxes(0, 1) * stored / at

    return decode


OF_TOPK = {"index": "<u2", "value": "<f2", "tail": "<f4"}


def decode_topk(classes: int, k: int, temperatures: tuple[float, ...], stored: float) -> Decode:
    """What is left out is spread evenly."""

    def decode(cells: dict[str, bytes], at: float) -> F64:
        index = np.frombuffer(cells["index"], "<u2").astype(np.int64).reshape(-1, k)
        value = np.frombuffer(cells["value"], "<f2").astype(np.float64).reshape(-1, k) * stored / at
        tail = np.frombuffer(cells["tail"], "<f4").astype(np.float64).reshape(-1, len(temperatures))
        logits = np.repeat(tail[:, [temperatures.index(at)]] - math.log(classes - k), classes, axis=1)
        np.put_along_axis(logits, index, value, axis=1)
        return logits[None]

    return decode


@dataclass(frozen=True, kw_only=True)
class Position:
    """next: -1 for none; log_p: (C,) of the mean of the members; information: of the members."""

    row: int
    place: int
    counts: bool
    next: int
    log_p: F64
    information: float


def list_positions(documents: list[RawDocument], decode: Decode, at: float) -> Iterator[Position]:
    for row, one in enumerate(documents):
        log_p_MPC = log_softmax(decode(one.cells, at), axis=2)
        log_p_PC = logsumexp(log_p_MPC, axis=0) - math.log(len(log_p_MPC))
        for number, place in enumerate(one.place.tolist()):
            following = int(one.ids[place + 1]) if place + 1 < len(one.ids) else -1
            members = np.mean([entropy(log_p_MPC[member, number]) for member in range(len(log_p_MPC))])
            log_p = log_p_PC[number]
            yield Position(
                row=row,
                place=place,
                counts=bool(one.counts[number]),
                next=following,
                log_p=log_p,
                information=float(entropy(log_p) - members),
            )


def entropy(log_p: F64) -> float:
    p = np.exp(log_p)
    return float(-(p * np.where(p > 0, log_p, 0.0)).sum())


def summarize(positions: list[Position]) -> dict[str, Any]:
    """NLL, accuracy and what they are by token, context and document."""
    predicted = [one for one in positions if one.counts and one.next >= 0]
    nll = np.array([-one.log_p[one.next] for one in predicted])
    right = np.array([one.log_p.argmax() == one.next for one in predicted])

    def group(key: Callable[[Position], int]) -> dict[int, tuple[int, float, float]]:
        names = np.array([key(one) for one in predicted])
        return {
            int(name): (int((names == name).sum()), nll[names == name].mean(), right[names == name].mean())
            for name in np.unique(names)
        }

    return {
        "predicted": len(predicted),
        "nll": nll.mean(),
        "accuracy": right.mean(),
        "by_token": group(lambda one: one.next),
        "by_context": group(lambda one: 2 ** int(math.log2(one.place + 1))),
        "by_document": group(lambda one: one.row),
    }
