"""Truncated labels at another temperature: softlabel's tails against what other trainers compute from T = 1.

python -m tests.benchmarks.experiment_retempering [--documents 16] [--k 8 16 32] [--temperatures 1 2 4]

All positions of documents under stories260k, whose exact softmax at each temperature is compared with three readings of
the same top-k labels, as a distribution over the k kept tokens and one outcome for all others:

    tails        encoding topk with a tail at every temperature, as a store has it
    renormalised p^(1/T) of the kept log-probabilities at T = 1, divided by its sum: axolotl, and DistillKit's "zero"
    bucket       the same with the leftover of T = 1 to the power of 1/T as one more outcome: DistillKit's
                 "symmetric_uniform"

Prints the mean total variation, 0 for equal and 1 for disjoint distributions.

R positions, K kept tokens, K1 these and all others together.
"""

import argparse

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.labels.encodings import encode
from softlabel.store.encodings import TopK
from tests.benchmarks.bench_draws import label_documents
from tests.support.shared_data import require_shared_data

F64 = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=16, help="of the test set, the first ones")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    options = parser.parse_args()
    logits_RC = label_documents(require_shared_data() / "stories260k", options.documents).numpy()
    print(f"{len(logits_RC):,} positions of {options.documents} documents, {logits_RC.shape[1]} tokens")
    print("| k, T | mass of the kept | tails | renormalised | bucket |\n|---|---|---|---|---|")
    for k in options.k:
        for temperature in options.temperatures:
            mass, errors = compare(logits_RC, k, temperature, tuple(options.temperatures))
            print(f"| {k}, {temperature:g} | {mass:.3f} | {' | '.join(f'{one:.4f}' for one in errors)} |")


def compare(logits_RC: F64, k: int, temperature: float, declared: tuple[float, ...]) -> tuple[float, list[float]]:
    """The true mass of the kept tokens, and the mean total variation of the three readings."""
    scaled_RC = torch.from_numpy(logits_RC - logits_RC.max(axis=1, keepdims=True)).float()
    encoding = TopK(k=k, temperatures=tuple(sorted({1.0, *declared})))
    columns = {name: one.numpy() for name, one in encode(scaled_RC, encoding, temperature=1.0).items()}
    index_RK, value_RK = columns["index"].astype(np.int64), columns["value"].astype(np.float64)
    tail_R = columns["tail"][:, encoding.temperatures.index(temperature)].astype(np.float64)
    exact_RK1 = append_rest(np.take_along_axis(normalise(logits_RC / temperature), index_RK, axis=1))
    tails_RK1 = normalise(np.concatenate([value_RK / temperature, tail_R[:, None]], axis=1))

    # What the others have: log-probabilities at T = 1.
    log_p_RK = np.log(np.take_along_axis(normalise(logits_RC), index_RK, axis=1))
    renormalised_RK = normalise(log_p_RK / temperature)
    left_R1 = np.maximum(1 - np.exp(log_p_RK).sum(axis=1, keepdims=True), 1e-300)
    bucket_RK1 = normalise(np.concatenate([log_p_RK, np.log(left_R1)], axis=1) / temperature)
    readings = [tails_RK1, append_rest(renormalised_RK), bucket_RK1]
    errors = [float(np.abs(one - exact_RK1).sum(axis=1).mean() / 2) for one in readings]
    return float(exact_RK1[:, :-1].sum(axis=1).mean()), errors


def normalise(logits: F64) -> F64:
    """Softmax over the last axis."""
    p: F64 = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    return p


def append_rest(p_RK: F64) -> F64:
    return np.concatenate([p_RK, 1 - p_RK.sum(axis=1, keepdims=True)], axis=1)


if __name__ == "__main__":
    main()
