"""Language models as students: what they compute, what they leave behind, and that an interruption changes nothing.

N documents, B lines, L positions of a line, P positions that count, V tokens.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import softlabel
from softlabel import train
from softlabel.dataset import open_source
from softlabel.dataset.tokenize import tokenize_source
from softlabel.errors import MismatchError, SpecError, UsageError
from softlabel.loader.token_loader import TokenLoader
from softlabel.models import build_model
from softlabel.models.from_lm import LanguageModel
from tests.support.language_models import write_language_model, write_tokenizer
from tests.support.language_runs import LONGEST, T, make_config, make_settings, write_documents, write_labels
from tests.support.training_runs import (
    finish_training,
    have_equal_weights,
    read_history,
    read_weights,
    start_training,
    wait_for_file,
)

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with tied embeddings and more rows than tokens, 40 documents, and a store of its answers."""
    folder = tmp_path_factory.mktemp("stories")
    write_language_model(folder / "teacher", "llama", rows=270, tie_word_embeddings=True)
    texts = write_documents(folder / "data.jsonl")
    write_labels(folder / "labels", folder / "teacher", texts)
    write_labels(folder / "top8", folder / "teacher", texts, top_k=8)
    return folder


# ---- what it computes ----


@pytest.mark.parametrize("lines", [{"pack": 64}, {"pack": None, "pad": 48}])
def test_equals_a_plain_loop(stories: Path, tmp_path: Path, lines: dict[str, int | None]) -> None:
    """The same steps in plain torch and transformers, float64: each document by itself, logits of all positions."""
    given = make_config(stories, tmp_path / "run", epochs=2, seed=5, accumulate=2, clip_norm=1.0, **lines)
    result = train(given)

    torch.manual_seed(5)
    model = build_model(given.student)
    assert isinstance(model, LanguageModel)
    network = model.network.double()
    source = tokenize_source(open_source(given.data), model.vocabulary, max_length=LONGEST)
    loader = TokenLoader(source, stories / "labels", batch_tokens=256, seed=5, tail="drop", **lines)
    optimiser = torch.optim.AdamW(network.parameters(), lr=given.lr, weight_decay=5e-4)
    steps, warmup = len(loader), len(loader)
    losses: list[list[float]] = [[], []]
    right = agreed = 0
    for epoch in range(2):
        for step, batch in enumerate(loader):
            done = epoch * steps + step
            share = (done + 1) / (warmup + 1) if done < warmup else math.cos(math.pi * (done - warmup) / steps) / 2 + 0.5
            optimiser.param_groups[0]["lr"] = given.lr * share
            z, next_token = [], []
            for sample in batch.samples.tolist():
                ids = torch.from_numpy(source.read([sample])[0].raw.ids.astype(np.int64))
                z.append(network(input_ids=ids[None]).logits[0, :, : model.vocabulary.size])
                next_token.append(torch.cat([ids[1:], torch.tensor([-100])]))
            z_PV, y_P = torch.cat(z), torch.cat(next_token)
            teacher_PV = batch.target.scaled_logits.double()
            p, log_p = teacher_PV.softmax(1), teacher_PV.log_softmax(1)
            soft = T**2 * (p * (log_p - (z_PV / T).log_softmax(1))).sum(1).mean()
            hard = -z_PV.log_softmax(1)[y_P >= 0].gather(1, y_P[y_P >= 0, None]).mean()
            loss = 0.9 * soft + 0.1 * hard
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            losses[epoch].append(loss.item())
            if epoch == 1:
                right += int((z_PV.argmax(1) == y_P).sum())
                agreed += int((z_PV.argmax(1) == teacher_PV.argmax(1)).sum())
    for name, value in read_weights(tmp_path / "run").items():
        expected = network.state_dict()[name].float()
        assert torch.allclose(value, expected, rtol=1e-3, atol=2e-4), name
    # The mean over positions, of which steps have different numbers.
    assert [epoch.loss for epoch in result.history] == pytest.approx([np.mean(one) for one in losses], rel=2e-2)
    last, positions = result.history[-1], int(source.lengths.sum())
    assert last.loss == pytest.approx(0.9 * last.soft_loss + 0.1 * last.hard_loss, rel=1e-3)
    assert last.teacher_agreement == pytest.approx(agreed / positions, abs=0.01)
    assert last.train_accuracy == pytest.approx(right / (positions - len(source)), abs=0.01)
