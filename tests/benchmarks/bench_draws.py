"""Systematic draws of the encoding `sampled` against independent ones: variance and places.

python -m tests.benchmarks.bench_draws [--rows 4096] [--classes 1000] [--repeats 5] [--documents 16]

Of random rows, a few classes of which stand out as those of trained teachers do, and of every position of documents
under a trained language model, where there is one.

R rows, C classes.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

from softlabel.labels.encodings import encode
from softlabel.store.encodings import Sampled
from tests.benchmarks.figures import report
from tests.support.llama_reference import compute_logits, read_llama
from tests.support.shared_data import find_shared_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--documents", type=int, default=16)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    scaled_RC = torch.randn(options.rows, options.classes, generator=generator)
    scaled_RC[:, :5] += torch.rand(options.rows, 5, generator=generator) * 12
    compare(f"{options.classes} random classes", scaled_RC, options.repeats)
    folder = find_shared_data()
    if folder is None or not (folder / "stories260k").is_dir():
        report("positions of stories260k", None, note="no stories260k; set SOFTLABEL_DATA to a folder that has it")
    else:
        compare("stories260k", label_documents(folder / "stories260k", options.documents), options.repeats)


def label_documents(folder: Path, count: int) -> Tensor:
    """Logits (R, C) of all positions of so many documents."""
    model, tokenizer = read_llama(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with open(folder / "test.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, count)]
    return torch.from_numpy(np.concatenate([compute_logits(model, tokenizer.encode(text).ids) for text in texts]))


def compare(name: str, scaled_RC: Tensor, repeats: int) -> None:
    p_RC = torch.softmax(scaled_RC.double(), dim=1)
    for samples in (10, 16, 50):
        errors, places = {}, {}
        for draw in ("independent", "systematic"):
            encoding = Sampled(samples=samples, draw=draw)
            errors[draw] = places[draw] = 0.0
            for repeat in range(repeats):
                columns = encode(scaled_RC, encoding, seeds_R=torch.arange(len(scaled_RC)) + repeat * 1_000_003)
                mass_RC = torch.zeros_like(p_RC)
                mass_RC.scatter_add_(1, columns["index"].long(), columns["weight"].double())
                errors[draw] += ((mass_RC - p_RC) ** 2).sum(dim=1).mean().item() / repeats
                places[draw] += (columns["weight"] > 0).sum(dim=1).double().mean().item() / repeats
        used = f"places used {places['systematic']:.1f} / {places['independent']:.1f}"
        squared = f"squared error of p {errors['systematic']:.5f} / {errors['independent']:.5f}"
        report(
            f"{name}: variance of {samples} systematic / independent draws",
            errors["systematic"] / errors["independent"],
            goal=0.5,
            bound="at most",
            note=f"{squared}; {used}",
        )


if __name__ == "__main__":
    main()
