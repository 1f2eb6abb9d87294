"""A Hugging Face model in a Hugging Face Trainer, with softlabel's loss and labels that are joined by key.

    softlabel train    --data images.parquet --student "zoo:resnet20?resize=16&crop=16" --out runs/teacher
    softlabel generate --data images.parquet --teacher run:runs/teacher --out labels/images
    python pipelines/hf_trainer.py --data images.parquet --labels labels/images --out runs/vit

The data is a Parquet file in the Hugging Face image layout; the key of an image is its path, as for the labels.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import default_collate
from transformers import PreTrainedModel, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import softlabel


class DistillationTrainer(Trainer):
    """The Trainer with one method replaced: the loss comes from the teacher's soft labels and the hard ones."""

    def __init__(self, *args: Any, distillation: softlabel.DistillationLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation
        # The loss is a mean over its batch: the Trainer has to divide it where it accumulates gradients.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        outputs = model(pixel_values=inputs["pixel_values"])
        target = inputs["target"].to(outputs.logits.device)
        loss = self.distillation(outputs.logits.float(), target, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class Collate:
    """Rows of the dataset -> pixels, labels and the target of their keys: one gather from the store a batch."""

    def __init__(self, join: softlabel.LabelJoin, size: int) -> None:
        self.join, self.size = join, size

    def pixels(self, image: dict[str, Any]) -> Tensor:
        opened = PILImage.open(io.BytesIO(image["bytes"])).convert("RGB").resize((self.size, self.size))
        return torch.from_numpy(np.array(opened)).permute(2, 0, 1).float() / 127.5 - 1

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_collate([{"pixel_values": self.pixels(row["image"]), "labels": row["label"]} for row in rows])
        return {**batch, "target": self.join.target([row["image"]["path"] for row in rows])}


def student(classes: int, size: int) -> PreTrainedModel:
    """A small vision transformer for small images."""
    config = ViTConfig(
        image_size=size, patch_size=size // 4, num_labels=classes, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128,
    )  # fmt: skip
    return ViTForImageClassification(config)


def accuracy(model: PreTrainedModel, data: Dataset, collate: Collate) -> float:
    """Of the hard labels."""
    model.eval()
    right = 0
    for start in range(0, len(data), 256):
        rows = [data[place] for place in range(start, min(start + 256, len(data)))]
        pixels_BCHW = torch.stack([collate.pixels(row["image"]) for row in rows]).to(model.device)
        with torch.inference_mode():
            found_B = model(pixel_values=pixels_BCHW).logits.argmax(dim=1).cpu()
        right += int((found_B == torch.tensor([row["label"] for row in rows])).sum())
    return right / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Parquet file with images, labels and paths")
    parser.add_argument("--labels", required=True, help="store with their soft labels")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained student")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--soft-weight", type=float, default=0.9)
    parser.add_argument("--hard-weight", type=float, default=0.1)
    parser.add_argument("--size", type=int, default=16, help="pixels on each side")
    options = parser.parse_args()
    set_seed(0)
    data = load_dataset("parquet", data_files=options.data, split="train").cast_column("image", Image(decode=False))
    join = softlabel.LabelJoin(options.labels)
    collate = Collate(join, options.size)
    arguments = TrainingArguments(
        output_dir=str(options.out), num_train_epochs=options.epochs, learning_rate=options.lr, seed=0, report_to=[],
        per_device_train_batch_size=options.batch_size, save_strategy="no", logging_strategy="epoch",
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student(join.store.run.num_classes, options.size),
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        distillation=softlabel.DistillationLoss(
            temperature=join.temperature, soft_weight=options.soft_weight, hard_weight=options.hard_weight
        ),
    )
    trainer.train()
    trainer.save_model()
    print(f"{options.out}: accuracy {accuracy(trainer.model, data, collate):.4f} on the {len(data):,} training images")


if __name__ == "__main__":
    main()
