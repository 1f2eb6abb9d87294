"""Small language models and tokenizers in folders, as transformers writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, processors

from tests.support.shared_data import find_shared_data

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}\n"
    "  {%- if message['role'] == 'assistant' %}A: {% generation %}{{ message['content'] }}{% endgeneration %}\n"
    "  {%- else %}{{ message['role'] | upper }}: {{ message['content'] | tojson }}{% endif %}\n\n"
    "{% endfor %}"
)


def find_stories() -> Path:
    """The folder of a trained language model; the test skips where there is none."""
    folder = find_shared_data()
    if folder is None or not (folder / "stories260k" / "model.safetensors").is_file():
        pytest.skip("no stories260k; set SOFTLABEL_DATA to a folder that has it")
    return folder / "stories260k"


def write_tokenizer(
    folder: Path, *, template: str | None = None, in_config: bool = True, added: Sequence[str] = (), **flags: Any
) -> Path:
    """A tokenizer of bytes that adds <s> at the beginning unless its config says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*special, *alphabet, "ca", "cat"])}
    built = tokenizers.Tokenizer(models.BPE(vocab, [("c", "a"), ("ca", "t")], unk_token="<unk>"))
    built.add_special_tokens([*special, *added])
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    built.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": "<unk>",
        **flags,
    }
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None and in_config:
        config["chat_template"] = template
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_bigrams(folder: Path, texts: Sequence[str]) -> NDArray[np.float64]:
    """A language model that knows how often a token follows another one in texts; returns log-probabilities (V, V)."""
    write_tokenizer(folder)
    encode = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    size, width = 263, 264  # an even width for each of four heads
    counts_VV = np.full((size, size), 0.01)
    for text in texts:
        ids = encode(text).ids
        np.add.at(counts_VV, (ids[:-1], ids[1:]), 1)
    log_p_VV = np.log(counts_VV / counts_VV.sum(axis=1, keepdims=True))
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    network = transformers.LlamaForCausalLM(config)
    state = network.state_dict()
    # A token is a direction of its own, to which the layer adds nothing; the norm before the last layer keeps it.
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        state[f"model.layers.0.{name}.weight"].zero_()
    state["model.embed_tokens.weight"].copy_(torch.eye(size, width) * width**0.5)
    state["lm_head.weight"].zero_()[:, :size] = torch.from_numpy(log_p_VV.T / width**0.5)
    network.save_pretrained(folder)
    return log_p_VV


def write_language_model(
    folder: Path, architecture: str, *, rows: int = 263, template: str | None = None, **fields: Any
) -> Path:
    """A small language model of an architecture with random weights, whose last layer has so many rows."""
    write_tokenizer(folder, template=template)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "vocab_size": rows,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if "n_embd" in fields:
        sizes = {"vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(architecture, **{**sizes, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in network.parameters():  # biases begin at 0, and nothing would see them
            torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder)
    return folder
