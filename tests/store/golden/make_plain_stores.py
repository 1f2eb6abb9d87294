"""Wrote the golden Parquet stores of format versions 2 (views), 3 (sigmoids) and 4 (tokens), once:
`python -m tests.store.golden.make_plain_stores FOLDER`, into a new folder. Never run it over them again."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softlabel.store.view_columns import ViewPolicy
from tests.support.documents import make_samples
from tests.support.stores import Samples, make_run, write_store

STEPS = [{"op": "crop-flip", "padding": 4, "flip": True}]


def main(folder: Path, **settings: Any) -> None:
    run = make_run(samples=5, shard_rows=4, views=2, **settings)
    samples = Samples.of(run)
    rng = np.random.default_rng(2)
    columns = {
        "logits": samples.logits.astype(np.float16),
        "view_box": rng.integers([-4, -4, 30, 30], [5, 5, 34, 34], (2, 5, 4), np.int32),
        "view_flip": rng.integers(0, 2, (2, 5, 1), np.uint8),
        "view_xxh3": rng.integers(1, 2**64, (2, 5, 1), np.uint64),
    }
    viewed = replace(run, views=ViewPolicy(count=2, policy={"name": "crop-flip", "steps": STEPS}, seed=3))
    write_store(folder / "stores-v2", viewed, replace(samples, columns=columns))
    write_store(folder / "stores-v3", make_run(samples=5, shard_rows=4, activation="sigmoid", **settings))
    write_store(
        folder / "stores-v4", *make_samples("tokens", "parquet", samples=5, classes=7, shard_rows=4, **settings)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), compression="none")
