"""Wrong labels that confident learning finds: CIFAR JPEG images with 5% of the labels flipped, cross-fitted.

python -m tests.benchmarks.experiment_noise [--rows 4000] [--student zoo:resnet20] [--epochs 15] --out FOLDER

Labels are flipped to any other class (symmetric), or between cat and dog alone. Prints how many of the listed labels
were flipped (precision) and how many of the flipped ones are listed (recall), and the same of cleanlab's
`find_label_issues` on the same probabilities where cleanlab is installed. What is in FOLDER already is taken as it is,
or resumed.
"""

import argparse
import importlib
import importlib.util
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import softlabel
from softlabel.report.figures import Noise
from softlabel.report.measure import measure_store
from softlabel.training.crossfit import crossfit
from tests.support.shared_data import require_shared_data

CAT, DOG, CLASSES = 3, 5, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="of the training set, the first ones")
    parser.add_argument("--share", type=float, default=0.05, help="of the labels that are flipped")
    parser.add_argument("--student", default="zoo:resnet20", help="SPEC of the teachers of the folds")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--seed", type=int, default=0, help="of the flips, the folds and the teachers")
    parser.add_argument("--out", type=Path, required=True, help="keep the data and the stores here")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train = require_shared_data() / "cifar10-jpeg" / "train.parquet"
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{options.rows:,} rows, {options.student}, {options.folds} folds, {options.epochs} epochs")
    for kind in ("symmetric", "cat-dog"):
        table = pq.read_table(train).slice(0, options.rows)
        true_N = table["label"].to_numpy().astype(np.int64)
        given_N = flip(true_N, kind, share=options.share, seed=options.seed)
        data = options.out / f"{kind}.parquet"
        if not data.exists():
            column = table.schema.get_field_index("label")
            pq.write_table(table.set_column(column, "label", pa.array(given_N)), data)
        crossfit(
            data,
            student=options.student,
            out=options.out / f"oof-{kind}",
            folds=options.folds,
            epochs=options.epochs,
            batch_size=options.batch_size,
            precision=options.precision,
            seed=options.seed,
            tensorboard=False,
            checkpoint_minutes=2.0,
        )
        with softlabel.open_store(options.out / f"oof-{kind}") as store:
            rows = store.take(np.arange(len(store)))
            noise = measure_store(store, progress=False).noise
        assert np.array_equal(rows.labels, given_N), "expected the order of the data"
        logits_NC = rows.scaled_logits.astype(np.float64) * store.run.temperature
        probs_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
        probs_NC /= probs_NC.sum(axis=1, keepdims=True)
        assert isinstance(noise, Noise), noise
        report(kind, probs_NC, given_N, true_N)
        # What `softlabel report` says of the same store.
        row_of = {key: row for row, key in enumerate(rows.keys)}
        first = [row_of[one.key] for one in noise.examples][: int((given_N != true_N).sum())]
        right = float((given_N != true_N)[first].mean())
        print(f"softlabel report: {noise.candidates} listed, share {noise.share:.4f}, first {len(first)}: {right:.4f}")


def flip(labels_N: NDArray[np.int64], kind: str, *, share: float, seed: int) -> NDArray[np.int64]:
    """Return labels of which a share (of all) is wrong: any other class, or cat and dog taken for each other."""
    rng = np.random.default_rng(seed)
    among = np.arange(len(labels_N)) if kind == "symmetric" else np.flatnonzero(np.isin(labels_N, (CAT, DOG)))
    chosen = rng.choice(among, round(share * len(labels_N)), replace=False)
    flipped_N = labels_N.copy()
    if kind == "symmetric":
        flipped_N[chosen] = (labels_N[chosen] + rng.integers(1, CLASSES, len(chosen))) % CLASSES
    else:
        flipped_N[chosen] = CAT + DOG - labels_N[chosen]
    return flipped_N


def find_off_diagonal(probs_NC: NDArray[np.float64], labels_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the rows off the diagonal of the confident joint (arXiv:1911.00068), bool (N,)."""
    suggested_N = suggest(probs_NC, labels_N)
    return (suggested_N >= 0) & (suggested_N != labels_N)


def find_pruned(probs_NC: NDArray[np.float64], labels_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return, of each label and other class, as many rows as the joint estimates, those of largest p_class - p_label,
    without rows whose most probable class is their label: bool (N,)."""
    suggested_N = suggest(probs_NC, labels_N)
    known_N = suggested_N >= 0
    joint_CC = np.zeros((CLASSES, CLASSES))
    np.add.at(joint_CC, (labels_N[known_N], suggested_N[known_N]), 1)
    joint_CC *= (np.bincount(labels_N, minlength=CLASSES) / joint_CC.sum(axis=1))[:, None]
    listed_N = np.zeros(len(labels_N), np.bool_)
    for label in range(CLASSES):
        rows = np.flatnonzero(labels_N == label)
        for other in set(range(CLASSES)) - {label}:
            excess = probs_NC[rows, other] - probs_NC[rows, label]
            listed_N[rows[np.argsort(-excess, kind="stable")[: round(joint_CC[label, other])]]] = True
    return listed_N & (probs_NC.argmax(axis=1) != labels_N)


def suggest(probs_NC: NDArray[np.float64], labels_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the most probable of the classes whose probability is above the mean over their own rows; -1 for none."""
    own_N = probs_NC[np.arange(len(labels_N)), labels_N]
    thresholds_C = np.array([own_N[labels_N == c].mean() for c in range(CLASSES)])
    confident_NC = np.where(probs_NC >= thresholds_C, probs_NC, -1.0)
    return np.where(confident_NC.max(axis=1) >= 0, confident_NC.argmax(axis=1), -1)


def report(kind: str, probs_NC: NDArray[np.float64], given_N: NDArray[np.int64], true_N: NDArray[np.int64]) -> None:
    """Print precision and recall of every way to list wrong labels, and precision among the first of each ranking."""
    wrong_N = given_N != true_N
    wrong = int(wrong_N.sum())
    best_N = probs_NC.argmax(axis=1)
    print(
        f"\n{kind}: {wrong} of {len(given_N):,} labels are wrong; the most probable class is the true one in "
        f"{(best_N == true_N).mean():.4f} of the rows, the given one in {(best_N == given_N).mean():.4f}"
    )
    ways = {
        "off the diagonal of the joint": find_off_diagonal(probs_NC, given_N),
        "pruned by noise rate": find_pruned(probs_NC, given_N),
    }
    if importlib.util.find_spec("cleanlab") is not None:
        find = importlib.import_module("cleanlab.filter").find_label_issues
        for way in ("prune_by_noise_rate", "confident_learning", "both"):
            ways[f"cleanlab, {way}"] = find(given_N, probs_NC, filter_by=way, n_jobs=1)
    else:
        print("cleanlab is not installed; nothing to compare with")
    own_N = probs_NC[np.arange(len(given_N)), given_N]
    others_NC = probs_NC.copy()
    others_NC[np.arange(len(given_N)), given_N] = -1.0
    print(f"{'':<34}{'listed':>8}{'precision':>11}{'recall':>8}   precision of the first {wrong} by margin, by p_label")
    for name, listed_N in ways.items():
        row = (
            f"{name:<34}{listed_N.sum():>8}{wrong_N[listed_N].mean():>11.4f}{(wrong_N & listed_N).sum() / wrong:>8.4f}"
        )
        for score_N in (own_N - others_NC.max(axis=1), own_N):
            first = np.argsort(np.where(listed_N, score_N, np.inf), kind="stable")[: min(wrong, int(listed_N.sum()))]
            row += f"   {wrong_N[first].mean():.4f}"
        print(row)


if __name__ == "__main__":
    main()
