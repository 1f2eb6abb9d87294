"""Wrote the golden stores, once: `python -m tests.store.golden.make_stores VERSION`. Never run it over them again.

A store that was written by any released version stays readable; the stores here are those of format version 1, and of
version 6, whose rows say what their view is.
"""

import json
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from softlabel.labels.encodings import encode
from softlabel.store.encodings import Encoding, Float16, Float32, Head, Int8, Sampled, TopK
from softlabel.store.fidelity import Fidelity
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import BadRow, Combine, DatasetInfo, Member, Run
from softlabel.store.open import open_store
from softlabel.store.view_columns import ViewPolicy
from softlabel.store.writer import Committer, write_shard

CLASSES, SAMPLES, VIEWS, T = 11, 6, 2, 4.0
ENCODINGS = {
    "float32": Float32(),
    "float16": Float16(),
    "int8": Int8(),
    "topk": TopK(k=3, temperatures=(1.0, T)),
    "sampled": Sampled(samples=6, proposal=0.9, draw="independent"),
    "head-float16": Head(width=4, hidden="float16"),
    "head-int8": Head(width=4, hidden="int8"),
    "keep": Float16(),
}
STEPS = [{"op": "crop-flip", "padding": 4, "flip": True}]


def main(version: int) -> None:
    folder = Path(__file__).parent / f"stores-v{version}"
    folder.mkdir()
    rng = np.random.default_rng(2024)
    for name, encoding in ENCODINGS.items():
        members = 2 if name == "keep" else 1
        logits = rng.normal(0, 4, (VIEWS, SAMPLES * members, CLASSES)).astype(np.float32)
        logits[0, 1, 7] = -np.inf
        hidden = rng.normal(0, 2, (VIEWS, SAMPLES, 4)).astype(np.float32)
        head = {"weight": rng.normal(size=(CLASSES, 4)).astype(np.float32), "bias": np.ones(CLASSES, np.float32)}
        for format in ("parquet", "hdf5") if version == 1 else ("parquet",):
            write(folder / f"{name}-{format}", format, encoding, members, logits, hidden, head, viewed=version == 6)
    expected = {}
    for path in sorted(folder.iterdir()):
        rows = open_store(path, verify="full").take(range((SAMPLES - 1) * VIEWS))
        expected[path.name] = {
            "keys": rows.keys,
            "views": rows.views.tolist(),
            "labels": rows.labels.tolist(),
            "content": rows.content.tolist(),
            "scaled_logits": [[float(one).hex() for one in row] for row in rows.scaled_logits.reshape(len(rows), -1)],
        }
        if rows.run.view_columns:
            expected[path.name]["of_views"] = {
                one.name: rows.columns[one.name].tolist() for one in rows.run.view_columns
            }
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=0) + "\n")


def write(
    root: Path,
    format: str,
    encoding: Encoding,
    members: int,
    logits: np.ndarray,
    hidden: np.ndarray,
    head: dict[str, np.ndarray],
    *,
    viewed: bool,
) -> None:
    run = Run(
        format=format,  # type: ignore[arg-type]
        num_classes=CLASSES,
        class_names=tuple(f"class {number} é" for number in range(CLASSES)),
        temperature=T,
        encoding=encoding,
        combine=Combine(rule="keep", weights=(0.5, 0.5)) if members > 1 else Combine(),
        members=tuple(Member(spec=f"zoo:resnet{one}", sha256="ab" * 32, num_classes=CLASSES) for one in range(members)),
        dataset=DatasetInfo(kind="folder", rows=SAMPLES, fingerprint="cd" * 16),
        views=ViewPolicy(
            count=VIEWS, policy={"name": "crop-flip", "steps": STEPS} if viewed else {"name": "center"}, seed=3
        ),
        shard_rows=4,
        compression="zstd" if viewed else "none",
    )
    with Committer.open(root, run, {"device": "cpu"}) as committer:
        if encoding.from_hidden:
            committer.add_extra("head", safetensors.numpy.save(head))
        for plan in committer.missing():
            good = [index for index in range(plan.start, plan.stop) if index != 2]
            scaled = torch.from_numpy(logits[plan.view]) / T
            scaled = scaled - scaled.amax(dim=1, keepdim=True)
            hidden_RD, seeds_R = torch.from_numpy(hidden[plan.view]), torch.arange(len(scaled))
            columns = encode(scaled, encoding, temperature=T, seeds_R=seeds_R, hidden_RD=hidden_RD)
            if viewed:
                rng = np.random.default_rng([plan.view, plan.start])
                boxes = rng.integers([-4, -4, 30, 30], [5, 5, 34, 34], (SAMPLES, 4), np.int32)
                columns |= {
                    "view_box": torch.from_numpy(boxes),
                    "view_flip": torch.from_numpy(rng.integers(0, 2, (SAMPLES, 1), np.uint8)),
                    "view_xxh3": torch.from_numpy(rng.integers(1, 2**64, (SAMPLES, 1), np.uint64)),
                }
            rows = Rows(
                keys=[f"ordner {index}/bild-{index}-ü.jpg" for index in good],
                labels=np.array([-100 if index == 4 else index for index in good]),
                content=np.array([0 if index == 0 else 2**63 + index for index in good], np.uint64),
                columns={one: array.reshape(SAMPLES, -1).numpy()[good] for one, array in columns.items()},
            )
            bad = [BadRow(index=2, key="ordner 2/bild-2-ü.jpg", reason="truncated")] if plan.start == 0 else []
            fidelity = Fidelity(mean_t1=0.1, worst_t1=0.2, mean_t=0.3, worst_t=0.4)
            committer.commit(write_shard(root, run, plan, rows, bad, fidelity=fidelity))
        committer.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]))
