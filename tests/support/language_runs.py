"""Documents, their labels by a language model, and runs of students that learn from them.

N documents, L tokens of one, C tokens of the vocabulary, K kept ones.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from softlabel import TrainConfig
from softlabel.inputs.vocabulary import read_vocabulary
from softlabel.models import LanguageModel, build_model
from softlabel.store.encodings import TopK
from softlabel.store.token_rows import TokenRun
from softlabel.store.writer import Committer
from tests.support.documents import Documents, make_token_run
from tests.support.stores import write_store

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "small", "birds", "in", "its", "own", "tree"]
LONGEST = 48
T = 2.0


def write_documents(path: Path, count: int = 40, seed: int = 0, words: int = 8) -> list[str]:
    """Sentences of one to a few words as JSON lines; returns them."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, words + 1))) for _ in range(count)]
    lines = [json.dumps({"id": f"doc-{number:03d}", "text": text}) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return texts


def compute_answers(model: LanguageModel, ids: Sequence[NDArray[Any]]) -> list[NDArray[np.float64]]:
    """The logits (L, C) of each document by itself, by transformers in float64."""
    network = model.network.double().eval()
    with torch.no_grad():
        found = [network(input_ids=torch.from_numpy(one)[None].long()).logits[0] for one in ids]
    return [one[:, : model.vocabulary.size].numpy() for one in found]


def write_labels(
    root: Path, teacher: Path, texts: Sequence[str], *, top_k: int | None = None, temperature: float = T
) -> list[NDArray[np.float64]]:
    """A store of a teacher's answers to documents, every token or the `top_k` most probable ones; returns the
    logits."""
    model, vocabulary = build_model(f"lm:{teacher}"), read_vocabulary(teacher)
    assert isinstance(model, LanguageModel)
    ids = [np.array(one.ids, "<i4") for one in vocabulary.tokenizer.load().encode_batch(list(texts))]
    answers = compute_answers(model, ids)
    scaled = [(one - one.max(axis=1, keepdims=True)) / temperature for one in answers]
    tokens = TokenRun(tokenizer=vocabulary.fingerprint, max_length=LONGEST, bos=vocabulary.bos)
    changes = {} if top_k is None else {"encoding": TopK(k=top_k, temperatures=(temperature,))}
    run = make_token_run(
        samples=len(ids), classes=vocabulary.size, tokens=tokens, temperature=temperature, shard_rows=16, **changes
    )
    content = np.array([xxhash.xxh3_64_intdigest(one.tobytes()) for one in ids], np.uint64)
    documents = Documents(
        run=run,
        keys=[f"doc-{number:03d}" for number in range(len(ids))],
        ids=ids,
        masks=[np.ones(len(one), np.uint8) for one in ids],
        content=content,
        logits=[[one.astype(np.float32) for one in scaled]],
        columns=None if top_k is None else _keep_largest(scaled, top_k),
    )
    write_store(root, run, documents, fidelity=None)
    with Committer.open(root, run, {"device": "cpu"}) as committer:
        committer.add_extra("tokenizer", vocabulary.tokenizer.content, "json")
    return answers


def _keep_largest(scaled: Sequence[NDArray[np.float64]], k: int) -> dict[str, list[list[NDArray[Any]]]]:
    columns: dict[str, list[list[NDArray[Any]]]] = {"index": [[]], "value": [[]], "tail": [[]]}
    for one in scaled:
        order = np.argsort(-one, axis=1, kind="stable")
        kept, rest = order[:, :k], np.take_along_axis(one, order[:, k:], axis=1)
        columns["index"][0].append(kept.astype("<u2"))
        columns["value"][0].append(np.take_along_axis(one, kept, axis=1).astype("<f2"))
        columns["tail"][0].append(np.log(np.exp(rest).sum(axis=1, keepdims=True)).astype("<f4"))
    return columns


def make_settings(folder: Path, out: Path, **changes: object) -> dict[str, object]:
    given = {
        "data": f"{folder / 'data.jsonl'}?key=id",
        "labels": folder / "labels",
        "student": f"lm:{folder / 'teacher'}?init=random&layers=1",
        "out": out,
        "epochs": 3,
        "pack": 64,
        "batch_tokens": 256,
        "lr": 0.003,
        "device": "cpu",
        "tensorboard": False,
        "progress": False,
        **changes,
    }
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def make_config(folder: Path, out: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**make_settings(folder, out, **changes))  # type: ignore[arg-type]
