"""A small language model taught by a larger one, in a training loop of its own: labels once, then a plain loop.

The teacher labels every position of the documents once. Students of fewer layers then begin at random and learn from
the next tokens alone (hard), and from the teacher's labels too (soft). What is printed of each is the NLL in nats a
token on documents that were not trained on, and how far the student is from the teacher there.

    python pipelines/lm_student.py --teacher models/stories260k --data train.jsonl --eval-data test.jsonl --out runs/lm

Data are JSON lines or Parquet with texts, chats or token ids, for example 'chats.jsonl?messages=messages&key=id'. The
folders hard and soft in OUT are SPECs: run:OUT/soft is a teacher, and transformers reads them too. Needs the extra
'hf'.
"""

import argparse
import math
from pathlib import Path

import torch

import softlabel
from softlabel.dataset.tokenize import tokenize_source
from softlabel.loader.token_loader import TokenLoader
from softlabel.loss import linear_distillation_loss
from softlabel.models import LanguageModel, RunModel, build_model, save_run
from softlabel.models.teacher import student_preprocessing
from softlabel.store.encodings import TopK


def label(options: argparse.Namespace, data: str, name: str) -> softlabel.Store:
    """The teacher's labels of every position of some documents; they are made once."""
    folder = Path(options.out) / name
    softlabel.generate(
        data,
        teachers=[f"lm:{options.teacher}"],
        out=folder,
        max_length=options.max_length,
        encoding=TopK(k=options.top_k),
        temperature=1.0,
        device=options.device,
        progress=False,
    )
    return softlabel.open_store(folder)


def train(options: argparse.Namespace, labels: softlabel.Store | None, out: Path) -> None:
    """A student, from random weights to a run folder; without labels it learns from the next tokens alone."""
    torch.manual_seed(options.seed)
    spec = f"lm:{options.teacher}?init=random&layers={options.layers}"
    model = build_model(spec)
    assert isinstance(model, LanguageModel)
    device = torch.device(options.device)
    model.to(device).train()
    source = tokenize_source(softlabel.open_source(options.data), model.vocabulary, max_length=options.max_length)
    loader = TokenLoader(
        source, labels, batch_tokens=options.batch_tokens, pack=options.pack, seed=options.seed, tail="drop"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01, betas=(0.9, 0.95))
    for epoch in range(options.epochs):
        loader.set_epoch(epoch)  # an epoch may have a step more or fewer than another one
        total = tokens = 0.0
        for step, host_batch in enumerate(loader):
            batch = host_batch.to(device, non_blocking=True)
            done = (epoch + step / len(loader)) / options.epochs
            rate = options.lr * min(1.0, done * 20 + 0.01) * (1 + math.cos(math.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            # Positions begin at 0 in each document of a line, which keeps them apart.
            hidden_BLD = model.hidden(batch.tokens, None, batch.position_ids)
            loss = linear_distillation_loss(
                batch.at_places(hidden_BLD),
                model.head_weight,
                model.head_bias,
                batch.target,
                batch.hard_labels,
                temperature=1.0,
                soft_weight=0.0 if labels is None else options.soft_weight,
                hard_weight=1.0 if labels is None else 1.0 - options.soft_weight,
                soft_mask=batch.has_target,
                logit_scale=model.logit_scale,
                softcap=model.softcap,
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total, tokens = total + loss.item() * len(batch.places), tokens + len(batch.places)
        print(f"{out.name}: epoch {epoch + 1}/{options.epochs}  loss {total / tokens:.4f}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    transform = student_preprocessing(spec, model, "tokens").to_dict()
    save_run(out, model, RunModel(student=spec, num_classes=model.vocabulary.size, preprocessing=transform))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of a language model, as save_pretrained writes it")
    parser.add_argument("--data", required=True, help="documents to learn from, a SOURCE")
    parser.add_argument("--eval-data", required=True, help="documents to measure on")
    parser.add_argument("--out", required=True, help="folder for labels and students")
    parser.add_argument("--layers", type=int, default=2, help="of the students")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a document")
    parser.add_argument("--pack", type=int, default=1024, help="positions of a line, which takes several documents")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--top-k", type=int, default=32, help="tokens stored of a position; the rest is one")
    parser.add_argument("--soft-weight", type=float, default=0.9)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    labels, measured = label(options, options.data, "labels"), label(options, options.eval_data, "eval-labels")
    for name, store in (("hard", None), ("soft", labels)):
        train(options, store, Path(options.out) / name)
        found = softlabel.evaluate(
            Path(options.out) / name, options.eval_data, measured, device=options.device, progress=False
        )
        print(
            f"{name} labels: NLL {found.cross_entropy:.4f}, accuracy {found.accuracy:.4f}, agreement with the teacher "
            f"{found.agreement:.4f}, KL(teacher || student) {found.teacher_kl:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
