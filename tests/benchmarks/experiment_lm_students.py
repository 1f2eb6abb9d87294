"""Students of a language model by what they learn from: next tokens, the teacher at work beside them, or stored labels.

python -m tests.benchmarks.experiment_lm_students [--tokens 1000000] [--epochs 1] [--seeds 3] --out FOLDER

Students of 2 layers and width 32 learn from documents of stories260k with its labels at temperature 1. Printed of each:
the NLL of the next token and KL(teacher || student) in nats a token, exact, on 200 documents that were not trained on,
and the CPU time of an epoch. What is in FOLDER already is taken as it is.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import softlabel
from softlabel.dataset.tokenize import tokenize_source
from softlabel.loader.token_batch import TokenBatch
from softlabel.loader.token_loader import TokenLoader
from softlabel.loss import linear_distillation_loss
from softlabel.loss.targets import DenseTarget, Target, TopKTarget
from softlabel.models import LanguageModel, build_model
from softlabel.store.encodings import Encoding, Head, Sampled, TopK
from tests.support.shared_data import require_shared_data

LONGEST, LINE = 320, 512
STUDENT = "init=random&layers=2&hidden_size=32&intermediate_size=96&num_attention_heads=4&num_key_value_heads=4"
STORED: dict[str, Encoding] = {"topk 32 and its tail": TopK(k=32), "sampled 16": Sampled(samples=16), "head": Head()}
RENORMALISED = "top 8, renormalised"
KINDS = ("next tokens", "teacher beside it", *STORED, RENORMALISED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    stories = require_shared_data() / "stories260k"
    teacher = build_model(f"lm:{stories}")
    assert isinstance(teacher, LanguageModel)
    teacher.eval().requires_grad_(requires_grad=False)
    whole = tokenize_source(
        softlabel.open_source(f"{stories}/train.jsonl?key=id"), teacher.vocabulary, max_length=LONGEST
    )
    documents = int((whole.lengths.cumsum() < options.tokens).sum())
    data = f"{stories}/train.jsonl?key=id&rows=0:{documents}"
    for name, encoding in STORED.items():
        softlabel.generate(
            data,
            teachers=[f"lm:{stories}"],
            out=options.out / name,
            encoding=encoding,
            temperature=1.0,
            max_length=LONGEST,
            preflight=False,
        )
    test = tokenize_source(
        softlabel.open_source(f"{stories}/test.jsonl?key=id&rows=0:200"), teacher.vocabulary, max_length=LONGEST
    )
    results = options.out / "results.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    for seed in range(options.seeds):
        for kind in KINDS:
            if (run := f"{kind}, seed {seed}") not in found:
                torch.manual_seed(seed)
                student = build_model(f"lm:{stories}?{STUDENT}&seed={seed}")
                assert isinstance(student, LanguageModel)
                seconds = train(kind, student, teacher, data, seed, options)
                found[run] = {**measure(student, teacher, test), "seconds": seconds}
                results.write_text(json.dumps(found, indent=1))
            print(f"{run}: " + ", ".join(f"{name} {value:.4f}" for name, value in found[run].items()), flush=True)
    print(f"{documents:,} documents, {options.epochs} epoch(s); mean ± standard deviation over seeds")
    for kind in KINDS:
        runs = [found[f"{kind}, seed {seed}"] for seed in range(options.seeds)]
        words = [
            f"{name} {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
            for name in ("nll", "kl", "seconds")
            if len(values := [one[name] for one in runs]) > 1
        ]
        print(f"{kind:24s} {', '.join(words)}")


def train(
    kind: str, student: LanguageModel, teacher: LanguageModel, data: str, seed: int, options: argparse.Namespace
) -> float:
    """Returns the CPU seconds of an epoch."""
    source = tokenize_source(softlabel.open_source(data), teacher.vocabulary, max_length=LONGEST)
    store = options.out / ("topk 32 and its tail" if kind == RENORMALISED else kind)
    loader = TokenLoader(
        source, store if store.exists() else None, batch_tokens=options.batch_tokens, pack=LINE, seed=seed, tail="drop"
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr, weight_decay=0.01, betas=(0.9, 0.95))
    make_target = find_target(kind, teacher)
    soft = 0.0 if kind == "next tokens" else 1.0
    started = time.process_time()
    for epoch in range(options.epochs):
        loader.set_epoch(epoch)
        steps = len(loader)
        for step, batch in enumerate(loader):
            done = (epoch + step / steps) / options.epochs
            for group in optimizer.param_groups:
                group["lr"] = options.lr * min(1.0, done * 20 + 0.01) * (1 + math.cos(math.pi * done)) / 2
            hidden_BLD = student.hidden(batch.tokens, None, batch.position_ids)
            loss = linear_distillation_loss(
                batch.at_places(hidden_BLD),
                student.head_weight,
                None,
                make_target(batch),
                batch.hard_labels,
                temperature=1.0,
                soft_weight=soft,
                hard_weight=1.0 - soft,
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
    return (time.process_time() - started) / options.epochs


def find_target(kind: str, teacher: LanguageModel) -> Callable[[TokenBatch], Target | None]:
    """What a batch is compared with."""

    def online(batch: TokenBatch) -> Target:
        with torch.no_grad():
            hidden = teacher.hidden(batch.tokens, None, batch.position_ids)
            return DenseTarget(
                scaled_logits=teacher.logits(batch.at_places(hidden)), temperature=1.0, retemperable=True
            )

    def renormalised(batch: TokenBatch) -> Target:
        stored = batch.target
        assert isinstance(stored, TopKTarget)
        logits_PC = torch.full((len(stored.index), stored.num_classes), -math.inf)
        kept = stored.value.float().argsort(dim=1, descending=True)[:, :8]
        logits_PC.scatter_(1, stored.index.long().gather(1, kept), stored.value.float().gather(1, kept))
        return DenseTarget(scaled_logits=logits_PC, temperature=1.0, retemperable=True)

    return {"teacher beside it": online, RENORMALISED: renormalised}.get(kind, lambda batch: batch.target)


@torch.no_grad()
def measure(student: LanguageModel, teacher: LanguageModel, source: Any) -> dict[str, float]:
    """NLL of the next tokens, and KL(teacher || student), in nats a token."""
    student.eval()
    nll: list[Tensor] = []
    kl: list[Tensor] = []
    for batch in TokenLoader(source, batch_tokens=8192, pack=LINE, shuffle=False):
        ours, theirs = (
            torch.log_softmax(model.logits(batch.at_places(model.hidden(batch.tokens, None, batch.position_ids))), -1)
            for model in (student, teacher)
        )
        known = batch.hard_labels >= 0
        nll.append(F.nll_loss(ours[known], batch.hard_labels[known], reduction="none"))
        kl.append((theirs.exp() * (theirs - ours)).sum(dim=-1))
    return {"nll": float(torch.cat(nll).mean()), "kl": float(torch.cat(kl).mean())}


if __name__ == "__main__":
    main()
