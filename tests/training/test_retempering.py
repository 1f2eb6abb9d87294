"""Labels of documents at temperatures that the store was not made at: exact, or refused.

L tokens of a document, P positions, D width, V tokens of the vocabulary.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import softlabel
from softlabel.dataset import open_source
from softlabel.dataset.tokenize import tokenize_source
from softlabel.errors import MismatchError
from softlabel.inputs.vocabulary import read_vocabulary
from softlabel.loader.token_batch import TokenBatch
from softlabel.loader.token_loader import TokenLoader
from softlabel.loss import distillation_loss
from softlabel.models import LanguageModel, build_model
from softlabel.store.encodings import Encoding, Float32, Head, TopK
from tests.support.commands import run_softlabel
from tests.support.language_models import write_language_model
from tests.support.language_runs import LONGEST, compute_answers, write_documents

ENCODINGS: dict[str, Encoding] = {"topk": TopK(k=8, temperatures=(1.0, 4.0)), "head": Head(), "dense": Float32()}


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, documents, and stores of three encodings at T = 1."""
    folder = tmp_path_factory.mktemp("stories")
    write_language_model(folder / "teacher", "llama", tie_word_embeddings=True)
    write_documents(folder / "data.jsonl", count=12)
    for name, encoding in ENCODINGS.items():
        softlabel.generate(
            f"{folder}/data.jsonl?key=id",
            teachers=[f"lm:{folder}/teacher"],
            out=folder / name,
            encoding=encoding,
            temperature=1.0,
            max_length=LONGEST,
            preflight=False,
        )
    return folder


def read_batch(folder: Path, labels: str) -> TokenBatch:
    vocabulary = read_vocabulary(folder / "teacher")
    source = tokenize_source(open_source(f"{folder}/data.jsonl?key=id"), vocabulary, max_length=LONGEST)
    (batch,) = TokenLoader(source, folder / labels, batch_tokens=12 * LONGEST, pad=LONGEST)
    return batch


def compute_exact(folder: Path, labels: str, batch: TokenBatch) -> np.ndarray:
    """The teacher's logits (P, V) at the places of a batch, float64; for `head` from the stored hidden layer."""
    with softlabel.open_store(folder / labels) as store:
        rows = store.take(store.lookup(batch.keys))
    if labels == "head":
        weight = load_file(folder / "teacher" / "model.safetensors")["model.embed_tokens.weight"]
        return rows.columns["hidden"].astype(np.float64) @ weight.astype(np.float64).T
    model = build_model(f"lm:{folder}/teacher")
    assert isinstance(model, LanguageModel)
    ids = np.split(rows.columns["tokens"][:, 0].astype("<i4"), np.cumsum(rows.lengths)[:-1])
    return np.concatenate(compute_answers(model, ids))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("labels", ["head", "dense"])
def test_hidden_layers_and_all_logits_take_every_temperature(labels: str, temperature: float, stories: Path) -> None:
    batch = read_batch(stories, labels)
    exact_PV = compute_exact(stories, labels, batch)
    assert batch.target is not None
    student_PV = np.random.default_rng(0).normal(0, 2, exact_PV.shape)
    log_p_PV, log_q_PV = (
        one / temperature - np.logaddexp.reduce(one / temperature, axis=1, keepdims=True)
        for one in (exact_PV, student_PV)
    )
    expected = temperature**2 * (np.exp(log_p_PV) * (log_p_PV - log_q_PV)).sum(axis=1)
    found = distillation_loss(
        *(torch.from_numpy(student_PV), batch.target),
        temperature=temperature,
        soft_weight=1,
        hard_weight=0,
        reduction="none",
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_an_undeclared_temperature_of_kept_tokens_is_refused(stories: Path, tmp_path: Path) -> None:
    batch = read_batch(stories, "topk")
    assert batch.target is not None
    logits_PV = torch.zeros(len(batch.places), batch.target.num_classes)
    for temperature in (1.0, 4.0):
        loss = distillation_loss(logits_PV, batch.target, temperature=temperature, soft_weight=1, hard_weight=0)
        assert torch.isfinite(loss)
    with pytest.raises(MismatchError, match="known at temperature 1, 4, found a loss with temperature 2"):
        distillation_loss(logits_PV, batch.target, temperature=2.0, soft_weight=1, hard_weight=0)
    failed = run_softlabel(
        *("train", "--data", f"{stories}/data.jsonl?key=id", "--labels", stories / "topk", "--temperature", 2),
        *("--student", f"lm:{stories}/teacher?init=random", "--pad", LONGEST, "--batch-tokens", 4 * LONGEST),
        *("--epochs", 1, "--device", "cpu", "--out", tmp_path / "run"),
        code=2,
    )
    assert "known at temperature 1, 4, found a loss with temperature 2" in failed.stderr
    assert not list((tmp_path / "run").glob("*.safetensors"))
