"""Labels of the positions of documents, end to end, against a bare forward pass over batches sorted by length.

python -m tests.benchmarks.bench_documents [--documents 500] [--repeats 3] [--batch 8] [--encoding topk]

stories260k has 260,032 parameters and 512 tokens, so that what is done to a row weighs more than with any real model.
`--width 512 --layers 4` makes a random Llama of that size with the same tokenizer.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch

import softlabel
from softlabel.store.encodings import Encoding, Float16, Head, TopK
from tests.benchmarks.figures import report
from tests.benchmarks.timing import interleaved
from tests.support.shared_data import require_shared_data

LONGEST = 320
ENCODINGS: dict[str, Encoding] = {"topk": TopK(k=32, temperatures=(1.0,)), "float16": Float16(), "head": Head()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="documents of a batch of the bare pass")
    parser.add_argument("--encoding", choices=list(ENCODINGS), default="topk")
    parser.add_argument("--width", type=int, default=0, help="of a random Llama; 0: stories260k")
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    import transformers

    stories = require_shared_data() / "stories260k"
    work = Path(tempfile.mkdtemp(prefix="softlabel-bench-"))
    try:
        folder, named = stories, "stories260k"
        if options.width:
            folder, named = work / "teacher", f"a Llama of width {options.width}, {options.layers} layers"
            write_llama(stories, folder, width=options.width, layers=options.layers)
        tokenizer = tokenizers.Tokenizer.from_file(str(stories / "tokenizer.json"))
        lines = (stories / "train.jsonl").read_text().splitlines()[: options.documents]
        ids = sorted((tokenizer.encode(json.loads(line)["text"]).ids[:LONGEST] for line in lines), key=len)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        batches = []
        for start in range(0, len(ids), options.batch):
            part = ids[start : start + options.batch]
            padded = torch.zeros(len(part), len(part[-1]), dtype=torch.int64)
            mask = torch.zeros_like(padded)
            for row, one in enumerate(part):
                padded[row, : len(one)], mask[row, : len(one)] = torch.tensor(one), 1
            batches.append({"input_ids": padded.to(device), "attention_mask": mask.to(device)})

        def forward() -> None:
            with torch.inference_mode():
                for batch in batches:
                    answers = model(**batch, use_cache=False).logits
                answers.cpu()

        def generate() -> None:
            shutil.rmtree(work / "store", ignore_errors=True)
            softlabel.generate(
                f"{stories}/train.jsonl?rows=0:{options.documents}",
                teachers=[f"lm:{folder}"],
                out=work / "store",
                temperature=1.0,
                max_length=LONGEST,
                encoding=ENCODINGS[options.encoding],
                preflight=False,
                progress=False,
            )

        seconds = interleaved({"forward": forward, "generate": generate}, options.repeats)
        positions = sum(map(len, ids))
        words = ", ".join(f"{side} {positions / value:,.0f} tokens/s" for side, value in seconds.items())
        report(
            f"generate / bare forward, {named}, {options.encoding}, {positions:,} tokens",
            seconds["forward"] / seconds["generate"],
            goal=0.9,
            note=words,
        )
    finally:
        shutil.rmtree(work)


def write_llama(stories: Path, folder: Path, *, width: int, layers: int) -> None:
    """A random Llama with the tokenizer of the stories."""
    import transformers

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories / name, folder / name)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
