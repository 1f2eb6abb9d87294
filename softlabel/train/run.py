"""One run: its state, its steps, its checkpoints.

Legend: B batch, C classes, H and W pixels.

A run is a sequence of steps, each a pure function of (weights, optimiser state, step): the loader gives the batch of a
step, the configuration its learning rate. So a run that was interrupted anywhere goes on from its checkpoint as if
nothing had happened, bit for bit on one kind of processor with the same number of threads.
"""

import logging
import math
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from softlabel.dataset import IGNORE
from softlabel.errors import MismatchError, TrainingError
from softlabel.evaluate import Evaluation, autocast, measure
from softlabel.loader import Batch, SoftLabelLoader
from softlabel.loss import DistillationLoss, LossComponents
from softlabel.teacher import Preprocessing
from softlabel.train import files
from softlabel.train.config import TrainConfig
from softlabel.train.metrics import Board, EpochMetrics, Sums, write_csv

log = logging.getLogger("softlabel")

# On a GPU every look at a number makes the host wait: look for NaN this often, in steps, and after every epoch.
_LOOK_EVERY = 50


class Run:
    """A student in training."""

    def __init__(
        self,
        config: TrainConfig,
        loader: SoftLabelLoader,
        eval_loader: SoftLabelLoader | None,
        model: nn.Module,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: str,
    ) -> None:
        self.config, self.loader, self.eval_loader = config, loader, eval_loader
        self.preprocessing, self.device, self.precision = preprocessing, device, precision
        # Channels last is how convolutions are fastest on both kinds of device.
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forward = torch.compile(self.model) if config.compile else self.model
        self._optimizer = _optimizer(config, self.model)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._loss = None
        if config.soft > 0:
            self._loss = DistillationLoss(
                temperature=config.temperature or loader.temperature,
                soft_weight=config.soft,
                hard_weight=config.hard,
                label_smoothing=config.label_smoothing,
                components=True,
            )
        self.epoch = self.step = 0  # epochs done; steps done of the next one
        self.history: list[EpochMetrics] = []
        self._sums = Sums(device)
        self._seconds = 0.0  # of the unfinished epoch, before this process

    # ---- what people read ----

    def announce(self) -> None:
        """Say what is about to happen."""
        config, loader = self.config, self.loader
        parameters = sum(p.numel() for p in self.model.parameters())
        log.info("student %s: %s parameters, %s, %s", config.student, f"{parameters:,}", self.device, self.precision)
        log.info(
            "data %s: %s samples, %d steps of %d an epoch",
            loader.source.name,
            f"{loader.num_samples:,}",
            len(loader),
            config.batch_size,
        )
        if loader.store is not None:
            temperature = self._loss.temperature if self._loss is not None else loader.temperature
            log.info(
                "labels %s: T = %g, soft weight %g, hard weight %g",
                loader.store.path,
                temperature,
                config.soft,
                config.hard,
            )
            if config.augment != "none" and config.soft > 0:
                log.info("augmentation %s: the soft labels are those of the un-augmented images", config.augment)
        for count, why in (
            (loader.dataset.skipped_bad, "could not be read when the store was made"),
            (loader.dataset.skipped_missing, "have no row in the store"),
        ):
            if count:
                log.info("left out: %s samples that %s", f"{count:,}", why)
        if self.epoch or self.step:
            log.info("resuming after epoch %d, step %d of %d", self.epoch, self.step, len(loader))

    # ---- the loop ----

    def train(self, folder: Path) -> None:
        """All that is left to do. Raises KeyboardInterrupt after saving where it is."""
        config, steps = self.config, len(self.loader)
        board_folder = folder / files.BOARD if config.tensorboard else None
        done = self.epoch * steps + self.step
        bar = tqdm(
            total=config.epochs * steps * config.batch_size,
            initial=done * config.batch_size,
            unit="img",
            unit_scale=True,
            desc=config.student,
            disable=None if config.progress is None else not config.progress,
        )
        with bar, logging_redirect_tqdm(), Board(board_folder, resume_step=done) as board, _Interrupts() as interrupts:
            write_csv(folder / files.METRICS, self.history)
            while self.epoch < config.epochs:
                self._train_epoch(folder, bar, interrupts)
                metrics = self._finish_epoch()
                self.save(folder)
                write_csv(folder / files.METRICS, self.history)
                board.write(metrics)
                log.info("%s", metrics.line(config.epochs))
                if interrupts.pending and self.epoch < config.epochs:
                    raise KeyboardInterrupt

    def _train_epoch(self, folder: Path, bar: "tqdm[Any]", interrupts: "_Interrupts") -> None:
        self.model.train()
        started = saved = time.perf_counter()
        before = self._seconds
        self.loader.set_epoch(self.epoch, self.step)
        for batch in self.loader:
            self._step(batch.to(self.device, non_blocking=True))
            self.step += 1
            self._seconds = before + time.perf_counter() - started
            bar.update(len(batch))
            if self.device.type == "cpu" or self.step % _LOOK_EVERY == 0:
                self._check_finite()
            if self.step == len(self.loader):
                break
            if interrupts.pending:
                self.save(folder)
                log.info("interrupted after step %d of epoch %d; saved", self.step, self.epoch + 1)
                raise KeyboardInterrupt
            if time.perf_counter() - saved > 60 * self.config.checkpoint_minutes:
                self._check_finite()
                self.save(folder)
                saved = time.perf_counter()
        self._check_finite()

    def _step(self, batch: Batch) -> None:
        rate = self.config.learning_rate(self.epoch * len(self.loader) + self.step, len(self.loader))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        images_BCHW = self.preprocessing.normalize(batch.images).contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.precision):
            logits_BC = self._forward(images_BCHW)
        logits_BC = self._checked(logits_BC).float()
        parts = self._losses(logits_BC, batch)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(parts.total).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        with torch.no_grad():
            labelled_B = batch.labels != IGNORE
            labelled = labelled_B.sum()
            rows, soft_rows = len(batch), 0 if self._loss is None else _count(batch)
            correct = (logits_BC.argmax(dim=1) == batch.labels).sum()
            self._sums.add(
                rows, parts.total * rows, soft_rows, parts.soft * soft_rows, labelled, parts.hard * labelled, correct
            )

    def _losses(self, logits_BC: Tensor, batch: Batch) -> LossComponents:
        if self._loss is not None:
            assert batch.target is not None
            parts = self._loss(logits_BC, batch.target, batch.labels, soft_mask=batch.has_target)
            assert isinstance(parts, LossComponents)
            return parts
        # As in the distillation loss, the mean is over labelled rows, and 0 where there is none.
        labelled = (batch.labels != IGNORE).sum().clamp_min(1)
        smoothing = self.config.label_smoothing
        hard = F.cross_entropy(logits_BC, batch.labels, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")
        hard = hard / labelled
        return LossComponents(self.config.hard * hard, torch.zeros_like(hard), hard.detach())

    def _checked(self, logits_BC: Any) -> Tensor:
        if not isinstance(logits_BC, Tensor) or logits_BC.dim() != 2:
            shape = tuple(logits_BC.shape) if isinstance(logits_BC, Tensor) else type(logits_BC).__name__
            raise MismatchError(f"student {self.config.student}: expected logits (B, C), found {shape}")
        return logits_BC

    def _check_finite(self) -> None:
        if not self._sums.finite:
            raise TrainingError(
                f"student {self.config.student}: the loss is not finite (found at step {self.step} of epoch "
                f"{self.epoch + 1}); lower --lr (it is {self.config.peak_lr:g}), lengthen --warmup-epochs or use "
                f"--precision fp32. The last checkpoint is from before"
            )

    def _finish_epoch(self) -> EpochMetrics:
        steps = len(self.loader)
        means = self._sums.means()
        evaluation, eval_seconds = self._evaluate()
        trained = int(self._sums.values[0])
        loss = means.pop("loss")
        assert loss is not None
        metrics = EpochMetrics(
            epoch=self.epoch + 1,
            step=(self.epoch + 1) * steps,
            lr=self.config.learning_rate((self.epoch + 1) * steps - 1, steps),
            loss=loss,
            **{name: value if name != "soft_loss" or self._loss is not None else None for name, value in means.items()},
            seconds=self._seconds + eval_seconds,
            images_per_second=trained / self._seconds if self._seconds else math.nan,
            eval_accuracy=evaluation.accuracy if evaluation is not None else None,
            eval_cross_entropy=evaluation.cross_entropy if evaluation is not None else None,
            eval_calibration_error=evaluation.calibration_error if evaluation is not None else None,
        )
        self.history.append(metrics)
        self.epoch, self.step, self._seconds = self.epoch + 1, 0, 0.0
        self._sums = Sums(self.device)
        return metrics

    def _evaluate(self) -> tuple[Evaluation | None, float]:
        if self.eval_loader is None:
            return None, 0.0
        started = time.perf_counter()
        self.model.eval()
        found = measure(
            self.model,
            self.eval_loader,
            preprocessing=self.preprocessing,
            device=self.device,
            precision=self.precision,
            source=self.eval_loader.source,
        )
        return found, time.perf_counter() - started

    # ---- checkpoints ----

    def save(self, folder: Path) -> None:
        """Write where the run is: everything that a step depends on, and what people will want to see of it."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        files.save_checkpoint(
            folder,
            {
                "format": 1,
                "epoch": self.epoch,
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
                "rng": rng,
                "loader": self.loader.state_dict(),
                "sums": self._sums.values.tolist(),
                "seconds": self._seconds,
                "history": [asdict(epoch) for epoch in self.history],
            },
        )

    def resume(self, folder: Path) -> int:
        """Take up the checkpoint in the folder, if there is one; returns the epochs that are done."""
        state = files.load_checkpoint(folder)
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.epoch, self.step, self._seconds = state["epoch"], state["step"], state["seconds"]
        self._sums = Sums(self.device, state["sums"])
        self.history = [EpochMetrics(**epoch) for epoch in state["history"]]
        return self.epoch


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.peak_lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=config.peak_lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _count(batch: Batch) -> int | Tensor:
    """Samples that have soft labels."""
    return len(batch) if batch.has_target is None else batch.has_target.sum()


class _Interrupts:
    """Turns Ctrl-C and SIGTERM into a flag that is looked at between steps; a second one interrupts at once.

    Only the main thread may do that; elsewhere signals stay as they are.
    """

    def __init__(self) -> None:
        self.pending = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True
