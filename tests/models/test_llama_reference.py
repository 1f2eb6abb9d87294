"""The forward pass in numpy that language models are tested against is itself right.

L positions, V tokens of the vocabulary.
"""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from scipy.special import logsumexp

from tests.support.language_models import find_stories
from tests.support.llama_reference import compute_logits, describe, measure_nll, read_llama, write_unpermuted

# Stated with the data: 0.39189 nats over its 43 predictions, 2.04 if q and k are not permuted.
SENTENCE = (
    "Once upon a time, there was a little girl named Lily. She loved to play with her toys in the park. One day, she "
    "saw a big red ball."
)


def encode(folder: Path, text: str) -> list[int]:
    ids: list[int] = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return ids


def test_published_likelihoods(tmp_path: Path) -> None:
    stories = find_stories()
    ids = encode(stories, SENTENCE)
    logits_LV = compute_logits(read_llama(stories), ids)
    assert len(ids) == 44
    assert measure_nll(logits_LV, ids) == pytest.approx(0.39189, abs=5e-6)
    assert min(measure_nll(logits_LV, ids, shift) for shift in (0, 2)) > 8, "a shift by one is far worse"
    broken = write_unpermuted(stories, tmp_path / "broken")
    assert measure_nll(compute_logits(read_llama(broken), ids), ids) == pytest.approx(2.04, abs=5e-3)
    with torch.no_grad():
        network = transformers.AutoModelForCausalLM.from_pretrained(broken).eval()
        loss = network(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert loss == pytest.approx(2.04, abs=5e-3)


def check_logits(folder: Path, documents: list[list[int]]) -> None:
    model = read_llama(folder)
    network = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for ids in documents:
        with torch.no_grad():
            expected = network(input_ids=torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(compute_logits(model, ids), expected, atol=1e-4, rtol=0)


def test_logits_equal_those_of_transformers() -> None:
    stories = find_stories()
    with open(stories / "test.jsonl", encoding="utf-8") as file:
        check_logits(stories, [encode(stories, json.loads(line)["text"]) for line in islice(file, 4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_another_shape_equal_those_of_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    """A last layer of its own, heads wider than their share, three heads to a group, another base of the rotation."""
    config = transformers.LlamaConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=28,
        vocab_size=50,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.LlamaForCausalLM(config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    network.to(dtype).save_pretrained(tmp_path)
    check_logits(tmp_path, [list(range(40)), [7]])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_distribution_adds_up(temperature: float) -> None:
    logits_LV = np.random.default_rng(0).normal(0, 4, (30, 50))
    found = describe(logits_LV, k=8, temperature=temperature)
    top = torch.from_numpy(logits_LV).topk(8)
    np.testing.assert_array_equal(found.index, top.indices.numpy())
    largest_L1 = top.values[:, :1].numpy()
    np.testing.assert_allclose(found.value, (top.values.numpy() - largest_L1) / temperature)
    np.testing.assert_allclose(found.log_sum_exp, logsumexp(logits_LV / temperature, axis=1))
    others_LV = np.sort(logits_LV, axis=1)[:, :-8]
    np.testing.assert_allclose(found.tail, logsumexp((others_LV - largest_L1) / temperature, axis=1))
    assert np.isneginf(describe(logits_LV, k=50).tail).all()
