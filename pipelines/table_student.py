"""A table: a gradient-boosted forest as an ONNX file labels it, and a small network learns from the labels.

Few rows of scikit-learn's digits (64 numbers each) have a class. The forest learns from those and labels all rows; one
network learns from the few hard labels alone, the other one from the forest's soft labels of everything. On pixels a
network is the better learner, so do not expect the forest's labels to beat hard ones here: compare on your own table.

    pip install 'softlabel[onnx]' scikit-learn skl2onnx
    python pipelines/table_student.py --out demo-table
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

import softlabel

LABELLED, TEST = 200, 500  # of 1,797 rows; the rest is unlabelled
BATCH = 50
COLUMNS = [f"pixel_{number}" for number in range(64)]
STUDENT = "python:table_student:build_network?mean=8&std=6"


def build_network(num_classes: int = 10) -> nn.Module:
    """The student: two hidden layers."""
    return nn.Sequential(
        nn.Linear(len(COLUMNS), 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes)
    )


def write_table(path: Path, rows: np.ndarray, labels: list[int | None]) -> str:
    """A Parquet table, and the SOURCE that names its columns."""
    columns = dict(zip(COLUMNS, rows.T, strict=True))
    pq.write_table(pa.table({**columns, "digit": pa.array(labels, pa.int64())}), path)
    return f"{path}?inputs={','.join(COLUMNS)}&label=digit"


def write_forest(path: Path, rows: np.ndarray, labels: list[int], trees: int) -> str:
    """A forest as ONNX, and the SPEC that takes its probabilities."""
    from skl2onnx import to_onnx
    from sklearn.ensemble import GradientBoostingClassifier

    forest = GradientBoostingClassifier(n_estimators=trees, subsample=0.5, max_features="sqrt", random_state=0)
    forest.fit(rows, labels)
    path.write_bytes(to_onnx(forest, rows[:1], options={"zipmap": False}).SerializeToString())
    return f"{path}?output=probabilities&probabilities=true"


def main() -> None:
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-table"), help="folder for everything that this writes")
    parser.add_argument("--epochs", type=int, default=100, help="epochs over the labelled rows")
    parser.add_argument("--trees", type=int, default=100, help="boosting rounds of the forest")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    out: Path = options.out
    (out / "data").mkdir(parents=True, exist_ok=True)

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    rows, labels = digits.data[order].astype(np.float32), digits.target[order].tolist()
    end = len(rows) - TEST
    few = write_table(out / "data/labelled.parquet", rows[:LABELLED], labels[:LABELLED])
    everything = write_table(out / "data/all.parquet", rows[:end], [*labels[:LABELLED], *[None] * (end - LABELLED)])
    test = write_table(out / "data/test.parquet", rows[end:], labels[end:])
    forest = write_forest(out / "forest.onnx", rows[:LABELLED], labels[:LABELLED], options.trees)
    print(f"1. {LABELLED} labelled rows, {end - LABELLED} unlabelled, {TEST} for the test; a forest of {options.trees}")

    store = out / "labels"
    summary = softlabel.generate(everything, teachers=[forest], out=store, temperature=2.0, device="cpu")
    print(f"2. the forest labelled {summary.total_rows:,} rows: {store}")

    # Both students take as many steps: the one with soft labels sees more rows in fewer epochs.
    fewer = max(1, round(options.epochs * (LABELLED // BATCH) / (end // BATCH)))
    runs = {"hard labels alone": out / "runs/hard", "soft labels": out / "runs/soft"}
    shared = {"student": STUDENT, "batch_size": BATCH, "lr": 0.05, "device": "cpu"}
    softlabel.train(
        softlabel.TrainConfig(data=few, out=str(runs["hard labels alone"]), epochs=options.epochs, **shared)  # type: ignore[arg-type]
    )
    softlabel.train(
        softlabel.TrainConfig(data=everything, labels=str(store), out=str(runs["soft labels"]), epochs=fewer, **shared)  # type: ignore[arg-type]
    )
    print(f"3. trained the network twice: {out / 'runs'}")

    print(f"\n{'on the test rows':<30}{'accuracy':>10}{'cross-entropy':>16}{'calibration error':>20}")
    models = {"forest": forest, **{f"student, {name}": f"run:{run}" for name, run in runs.items()}}
    for name, model in models.items():
        found = softlabel.evaluate(model, test, progress=False, device="cpu")
        print(f"{name:<30}{found.accuracy:>10.4f}{found.cross_entropy:>16.4f}{found.calibration_error:>20.4f}")


if __name__ == "__main__":
    main()
