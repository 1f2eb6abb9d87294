"""Systematic draws of the encoding `sampled` against independent ones: variance and places.

python -m tests.benchmarks.bench_draws [--rows 4096] [--classes 1000] [--repeats 5]

Random rows, a few classes of which stand out as those of trained teachers do.
"""

import argparse

import torch

from softlabel.labels.encodings import encode
from softlabel.store.encodings import Sampled
from tests.benchmarks.figures import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    scaled_RC = torch.randn(options.rows, options.classes, generator=generator)
    scaled_RC[:, :5] += torch.rand(options.rows, 5, generator=generator) * 12
    p_RC = torch.softmax(scaled_RC.double(), dim=1)
    for samples in (10, 16, 50):
        errors, places = {}, {}
        for draw in ("independent", "systematic"):
            encoding = Sampled(samples=samples, draw=draw)
            errors[draw] = places[draw] = 0.0
            for repeat in range(options.repeats):
                seeds_R = torch.arange(options.rows) + repeat * 1_000_003
                columns = encode(scaled_RC, encoding, seeds_R=seeds_R)
                mass_RC = torch.zeros_like(p_RC)
                mass_RC.scatter_add_(1, columns["index"].long(), columns["weight"].double())
                errors[draw] += ((mass_RC - p_RC) ** 2).sum(dim=1).mean().item() / options.repeats
                places[draw] += (columns["weight"] > 0).sum(dim=1).double().mean().item() / options.repeats
        used = f"places used {places['systematic']:.1f} / {places['independent']:.1f}"
        squared = f"squared error of p {errors['systematic']:.5f} / {errors['independent']:.5f}"
        report(
            f"variance of {samples} systematic draws / independent ones",
            errors["systematic"] / errors["independent"],
            goal=0.5,
            bound="at most",
            note=f"{squared}; {used}",
        )


if __name__ == "__main__":
    main()
