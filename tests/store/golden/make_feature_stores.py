"""Wrote the golden stores of format version 5, once: `python -m tests.store.golden.make_feature_stores`. Never run it
over them again.

M members, D numbers of an embedding, S of all maps of attention.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from softlabel.store.encodings import Encoding, Float16, NoLabels
from softlabel.store.features import Attention, Embedding, Features, Tap
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import Combine, DatasetInfo, Member, Run
from softlabel.store.open import open_store
from softlabel.store.writer import Committer, write_shard

FOLDER = Path(__file__).parent / "stores-v5"
SAMPLES, CLASSES, M, D, S = 5, 3, 2, 4, 5
TAPS = (Tap(module="fc", side="input", width=9), Tap(module="layer4", width=12, pool="pixels"))
MAPS = (("layer1", "layer2"), ("a.0", "b"))


def main() -> None:
    FOLDER.mkdir()
    rng = np.random.default_rng(5)
    expected: dict[str, Any] = {}
    for format in ("parquet", "hdf5"):
        kept = Features(
            embedding=Embedding(width=D, type="int8", taps=TAPS, projection=11, kept=True),
            attention=Attention(heights=(2, 1), widths=(2, 1), modules=MAPS, kept=True),
        )
        columns = {
            "logits": -rng.exponential(2, (SAMPLES, M * CLASSES)).astype("<f2"),
            "embedding": rng.integers(-127, 128, (SAMPLES, M * D)).astype("|i1"),
            "embedding_scale": rng.uniform(0.01, 0.1, (SAMPLES, M)).astype("<f4"),
            "attention": rng.uniform(0, 1, (SAMPLES, M * S)).astype("<f2"),
        }
        for logits_MC in columns["logits"].reshape(-1, CLASSES):
            logits_MC[0] = 0
        write(f"kept-{format}", format, Float16(), kept, columns, expected)
        alone = Features(embedding=Embedding(width=D, taps=(Tap(module="", width=D),)))
        vectors = {"embedding": rng.normal(0, 1, (SAMPLES, D)).astype("<f2")}
        write(f"alone-{format}", format, NoLabels(), alone, vectors, expected)
    (FOLDER / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=0) + "\n")


def write(
    name: str, format: Any, encoding: Encoding, features: Features, columns: dict[str, Any], expected: dict[str, Any]
) -> None:
    members = M if encoding.labels else 1
    run = Run(
        format=format,
        num_classes=CLASSES if encoding.labels else 0,
        temperature=4.0 if encoding.labels else 1.0,
        encoding=encoding,
        combine=Combine(rule="keep", weights=(0.5, 0.5)) if members > 1 else Combine(weights=(1.0,)),
        members=tuple(Member(spec=f"zoo:resnet{one}", sha256="ab" * 32) for one in range(members)),
        dataset=DatasetInfo(kind="folder", rows=SAMPLES, fingerprint="cd" * 16),
        shard_rows=4,
        compression="none",
        features=features,
    )
    keys = [f"bild-{number}-ü.jpg" for number in range(SAMPLES)]
    with Committer.open(FOLDER / name, run, {"device": "cpu"}) as committer:
        for plan in committer.missing():
            part = slice(plan.start, plan.stop)
            labels = np.arange(plan.start, plan.stop) % CLASSES
            rows = Rows(keys=keys[part], labels=labels, columns={one: array[part] for one, array in columns.items()})
            committer.commit(write_shard(FOLDER / name, run, plan, rows, ()))
        committer.finish()
    rows = open_store(FOLDER / name, verify="full").take(range(SAMPLES))
    found = {"embedding": rows.embedding, **({} if run.attention is None else {"attention": rows.attention})}
    expected[name] = {"keys": keys, "labels": rows.labels.tolist()} | {
        one: [[float(number).hex() for number in row] for row in array.reshape(SAMPLES, -1)]
        for one, array in found.items()
    }


if __name__ == "__main__":
    main()
