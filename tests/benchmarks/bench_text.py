"""Labels of texts, end to end, against a bare forward pass over batches that are sorted by length.

python -m tests.benchmarks.bench_text [--texts 9662] [--repeats 3] [--batch 32]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import torch

import softlabel
from tests.benchmarks.timing import interleaved
from tests.support.shared_data import require_shared_data
from tests.support.texts import add_head, minilm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=9662)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    work = Path(tempfile.mkdtemp(prefix="softlabel-bench-"))
    try:
        shutil.copytree(minilm(), work / "teacher")
        add_head(work / "teacher")
        path = require_shared_data() / "text" / "sentence_polarity" / "train.parquet"
        texts = pq.read_table(path)["text"].to_pylist()[: options.texts]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = AutoModelForSequenceClassification.from_pretrained(work / "teacher").eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(work / "teacher")
        encoded = sorted(tokenizer(texts)["input_ids"], key=len)
        starts = range(0, len(encoded), options.batch)
        batches = [
            tokenizer.pad({"input_ids": encoded[start : start + options.batch]}, return_tensors="pt").to(device)
            for start in starts
        ]

        def forward() -> None:
            with torch.inference_mode():
                for batch in batches:
                    answers = model(**batch).logits
                answers.cpu()

        def generate() -> None:
            shutil.rmtree(work / "store", ignore_errors=True)
            softlabel.generate(
                f"{path}?rows=0:{options.texts}",
                teachers=[f"text:{work / 'teacher'}"],
                out=work / "store",
                batch_size=options.batch,
                preflight=False,
                progress=False,
            )

        seconds = interleaved({"forward": forward, "generate": generate}, options.repeats)
        print(f"{options.texts} sentences, MiniLM, batch {options.batch}, {device}, {torch.get_num_threads()} threads:")
        print(f"  bare forward {options.texts / seconds['forward']:,.0f} texts/s, ", end="")
        print(f"generate {options.texts / seconds['generate']:,.0f} texts/s")
        print(f"  generate / bare = {seconds['forward'] / seconds['generate']:.3f}   (goal: at least 0.9)")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
