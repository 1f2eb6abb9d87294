"""What a run is: its settings, which of them are its identity, and the learning rate that follows from them."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from softlabel.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train a student.

    Attributes:
        data: a SOURCE of images, labelled or not.
        student: a SPEC; without a checkpoint it starts from random weights.
        out: the run folder.
        labels: the store with the teacher's soft labels; absent: hard labels only.
        eval_data: a SOURCE on which accuracy is measured after every epoch.
        epochs: passes over the data.
        batch_size: samples a step.
        temperature: of the soft term; absent: that of the store.
        mix_rule: how the members of a store that keeps them apart become one teacher: the mean of their logits or of
            their probabilities, at the temperature of the soft term.
        mix_weights: one number a member of such a store; equal when absent, 0 leaves a member out.
        soft_weight: of the soft term; absent: 0.9 with a store, 0 without.
        hard_weight: of the hard term; absent: 0.1 with a store, 1 without.
        label_smoothing: of the hard term.
        optimizer: sgd (with momentum) or adamw.
        lr: the highest learning rate; absent: 0.1 for sgd, 0.001 for adamw.
        momentum: of sgd.
        nesterov: whether sgd looks ahead.
        weight_decay: of every parameter.
        warmup_epochs: over which the learning rate rises linearly; then it falls to 0 along a cosine.
        augment: crop-flip (pad by `crop_padding`, crop, mirror), crop (without mirroring) or none. The soft labels
            are those of the un-augmented image.
        crop_padding: pixels on each side.
        missing: samples without a row in the store: error, skip, or hard-only.
        ignore_labels: do not use hard labels even if the data has them.
        seed: of the student's weights, the order and the augmentation.
        precision: bf16 and fp16 use autocast; auto is fp32 on the CPU, bf16 on CUDA devices that have it, else fp16.
        compile: compile the student with torch.compile.
        device: auto, cpu, cuda or cuda:N.
        workers: processes that read and decode; absent: chosen from the machine.
        cache_mb: memory for decoded images in MiB; all or none are kept.
        checkpoint_minutes: how often a checkpoint is written within an epoch; one is written after every epoch.
        tensorboard: write TensorBoard events too.
        overwrite: start anew where the folder holds another run or a finished one.
        progress: show a bar; absent: if standard error is a terminal.
    """

    data: str
    student: str
    out: str
    labels: str | None = None
    eval_data: str | None = None
    epochs: int = 10
    batch_size: int = 128
    temperature: float | None = None
    mix_rule: Literal["logits", "probs"] | None = None
    mix_weights: list[float] | None = None
    soft_weight: float | None = None
    hard_weight: float | None = None
    label_smoothing: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    warmup_epochs: float = 1.0
    augment: Literal["crop-flip", "crop", "none"] = "crop-flip"
    crop_padding: int = 4
    missing: Literal["error", "skip", "hard-only"] = "error"
    ignore_labels: bool = False
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    device: str = "auto"
    workers: int | None = None
    cache_mb: int = 4096
    checkpoint_minutes: float = 10.0
    tensorboard: bool = True
    overwrite: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        at_least = {
            "epochs": (self.epochs, 1),
            "batch_size": (self.batch_size, 1),
            "soft_weight": (self.soft_weight, 0),
            "hard_weight": (self.hard_weight, 0),
            "lr": (self.lr, 0),
            "momentum": (self.momentum, 0),
            "weight_decay": (self.weight_decay, 0),
            "warmup_epochs": (self.warmup_epochs, 0),
            "crop_padding": (self.crop_padding, 0),
            "cache_mb": (self.cache_mb, 0),
            "checkpoint_minutes": (self.checkpoint_minutes, 0),
            "workers": (self.workers, 0),
        }
        for name, (value, least) in at_least.items():
            if value is not None and not least <= value < math.inf:
                raise UsageError(f"{name}: expected a number of at least {least}, found {value}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UsageError(f"temperature: expected a number above 0, found {self.temperature}")
        if not 0 <= self.label_smoothing <= 1:
            raise UsageError(f"label_smoothing: expected a number from 0 to 1, found {self.label_smoothing}")
        if self.soft and self.labels is None:
            raise UsageError(f"soft_weight: {self.soft_weight} needs soft labels; give --labels STORE")
        if self.soft == 0 and self.hard == 0:
            raise UsageError("soft_weight and hard_weight: both are 0, there is nothing to learn from")

    @property
    def soft(self) -> float:
        """The soft term's weight, resolved."""
        return self.soft_weight if self.soft_weight is not None else (0.9 if self.labels is not None else 0.0)

    @property
    def hard(self) -> float:
        """The hard term's weight, resolved."""
        return self.hard_weight if self.hard_weight is not None else (0.1 if self.labels is not None else 1.0)

    @property
    def peak_lr(self) -> float:
        """The highest learning rate, resolved."""
        return self.lr if self.lr is not None else {"sgd": 0.1, "adamw": 1e-3}[self.optimizer]

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run: a linear rise, then half a cosine to 0."""
        total = self.epochs * steps_per_epoch
        warmup = min(round(self.warmup_epochs * steps_per_epoch), total - 1)
        if step < warmup:
            return self.peak_lr * (step + 1) / (warmup + 1)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    def identity(self) -> dict[str, Any]:
        """The settings that decide what the weights become; a run is resumed only if they are the same."""
        given = asdict(self) | {"soft_weight": self.soft, "hard_weight": self.hard, "lr": self.peak_lr}
        return {name: value for name, value in given.items() if name not in _NOT_IDENTITY}


# Where things lie (data and store are compared by what they hold), and what only changes speed or what is reported.
_NOT_IDENTITY = {"data", "out", "labels", "eval_data", "device", "workers", "cache_mb", "checkpoint_minutes"} | {
    "tensorboard",
    "overwrite",
    "progress",
}
