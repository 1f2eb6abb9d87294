"""A student in a LightningModule, trained from soft labels on disk; its folder is a SPEC like any other run.

    softlabel train    --data digits --student "zoo:resnet20?resize=16&crop=16" --out runs/teacher
    softlabel generate --data digits --teacher run:runs/teacher --out labels/digits
    python pipelines/lightning_student.py --data digits --labels labels/digits \
        --student "zoo:resnet8?resize=16&crop=16" --out runs/lightning

On several devices every process builds a loader for its own part of each global batch; Lightning's sampler stays off.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

import softlabel
from softlabel.loader import Batch
from softlabel.models import RunModel, build_model, save_run
from softlabel.models.teacher import student_preprocessing


class Student(lightning.LightningModule):
    """Any softlabel student SPEC, with the soft+hard loss."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.store = softlabel.open_store(options.labels)
        self.model = build_model(options.student, num_classes=self.store.run.num_classes)
        self.preprocessing = student_preprocessing(options.student, self.model)
        self.loss = softlabel.DistillationLoss(
            temperature=self.store.run.temperature,
            soft_weight=options.soft_weight,
            hard_weight=options.hard_weight,
            components=True,
        )

    def train_dataloader(self) -> softlabel.SoftLabelLoader:
        return softlabel.SoftLabelLoader(
            self.options.data,
            self.store,
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            tail="drop",
            preprocessing=self.preprocessing,
            workers=self.options.workers,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def training_step(self, batch: Batch, index: int) -> Tensor:
        logits_BC = self.model(self.preprocessing.normalize(batch.inputs))
        parts = self.loss(
            logits_BC.float(), batch.target, batch.labels, weight=batch.weight, soft_mask=batch.has_target
        )
        shown = {"soft": parts.soft, "hard": parts.hard}
        self.log_dict(shown, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(batch))
        return parts.total

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def save(self, folder: Path) -> None:
        """Write what `run:FOLDER` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        described = RunModel(
            student=self.options.student,
            num_classes=self.store.run.num_classes,
            preprocessing=self.preprocessing.to_dict(),
        )
        save_run(folder, self.model, described)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="SOURCE of the images")
    parser.add_argument("--labels", required=True, help="store with their soft labels")
    parser.add_argument("--student", required=True, help="SPEC of the student")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained student")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128, help="over all devices together")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--soft-weight", type=float, default=0.9)
    parser.add_argument("--hard-weight", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=0, help="processes that read and decode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    options = parser.parse_args()
    lightning.seed_everything(options.seed, verbose=False)
    student = Student(options)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator=options.accelerator,
        use_distributed_sampler=False,
        default_root_dir=options.out,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(student)
    if trainer.is_global_zero:
        student.save(options.out)
        found = softlabel.evaluate(options.out, options.data, labels=options.labels, progress=False)
        print(f"{options.out}: accuracy {found.accuracy:.4f}, agreement with the teacher {found.agreement:.4f}")
        print(f"use it as a SPEC: run:{options.out}")


if __name__ == "__main__":
    main()
