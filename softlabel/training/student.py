"""One student of a pass: its weights, its steps, its metrics, its checkpoints.

What a step computes is `RowStudent`'s, of samples with one label each, or `TokenStudent`'s, of documents.

A student is a sequence of steps, each a pure function of (weights, optimiser state, step): the loader gives the batch
of a step, the configuration its learning rate. So a student that was interrupted anywhere goes on from its checkpoint
as if nothing had happened, bit for bit on one kind of processor with the same number of threads.
"""

import contextlib
import copy
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softlabel.common.activation import Activation
from softlabel.errors import TrainingError
from softlabel.evaluation.language import TokenEvaluation
from softlabel.evaluation.metrics import Evaluation
from softlabel.evaluation.multi_label import MultiLabelEvaluation
from softlabel.inputs.base import InputTransform
from softlabel.loss import LossComponents
from softlabel.models import RunModel, network_of, save_run
from softlabel.training import rng, run_folder
from softlabel.training.distributed import Ranks
from softlabel.training.ema import Average
from softlabel.training.grid import StudentConfig
from softlabel.training.metrics import EpochMetrics, Sums
from softlabel.training.objective import count_soft
from softlabel.training.optimizer import build_optimizer, describe_state
from softlabel.training.schedule import learning_rate
from softlabel.training.step import Counts, Step
from softlabel.training.sync_batchnorm import synchronize

log = logging.getLogger("softlabel")

# On a GPU every look at a number makes the host wait, and several processes have to agree: look for NaN this often, in
# steps, and after every epoch.
_LOOK_EVERY = 50


class Student(ABC):
    """A student in training.

    Args:
        config: its settings.
        model: with the weights that it starts from.
        preprocessing: how its samples are prepared.
        ranks: the processes that train it together.
        precision: fp32, bf16 or fp16.
        temperature: of the soft term.
        steps: of the first epoch, by which the schedule counts; those of another one may be more or fewer.
    """

    def __init__(
        self,
        config: StudentConfig,
        model: nn.Module,
        preprocessing: InputTransform,
        *,
        ranks: Ranks,
        precision: str,
        temperature: float,
        steps: int,
    ) -> None:
        self.config, self.preprocessing, self.ranks = config, preprocessing, ranks
        self.shared, self.device, self.precision = config.shared, ranks.device, precision
        self.steps = self._scheduled_steps = steps  # of the epoch at hand
        self.temperature = temperature
        self.folder = Path(config.out)
        if ranks.several and config.shared.sync_batchnorm:
            model = synchronize(model)
        # Of a student that starts from another run: that one's folder need not stay.
        self._network = network_of(RunModel(student=config.network, num_classes=0, preprocessing={}))
        self.model: nn.Module = model.to(self.device, memory_format=preprocessing.memory_format)  # type: ignore[call-overload]
        self.average = Average(self.model, config.shared.ema) if config.shared.ema is not None else None
        self._parallel: nn.parallel.DistributedDataParallel | None = None
        if ranks.several:
            places = [self.device] if self.device.type == "cuda" else None
            self._parallel = nn.parallel.DistributedDataParallel(self._make_forward(), device_ids=places)
        forward: Any = self._parallel or self._make_forward()
        self._forward = torch.compile(forward) if config.shared.compile else forward
        self.optimizer = build_optimizer(config, self._list_trained())
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._random = rng.seeded(self.device, config.shared.seed, ranks.rank)
        self.draws_random_numbers = False  # known once it has made a step
        self.epoch = self.step = 0  # epochs done; steps done of the next one
        self.history: list[EpochMetrics] = []
        self.best: float | None = None
        self._evaluations_since = 0
        self.failure: str | None = None
        self.seconds = 0.0  # of the unfinished epoch
        self._sums = Sums(self.device)

    def _make_forward(self) -> nn.Module:
        """What is called in a step: the model, or a module around it."""
        return self.model

    def _list_trained(self) -> list[nn.Parameter]:
        """The parameters that the optimiser changes."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # ---- steps ----

    @property
    def place(self) -> tuple[int, int]:
        """Epochs done, and steps done of the next one."""
        return self.epoch, self.step

    @property
    def steps_done(self) -> int:
        """Steps since the start of the run."""
        return (self.history[-1].step if self.history else 0) + self.step

    @property
    def is_done(self) -> bool:
        """Whether it has had its epochs, or learns nothing more."""
        patience = self.shared.patience
        return self.epoch >= self.shared.epochs or (patience is not None and self._evaluations_since >= patience)

    def advance(self, work: Step, *, alone: bool) -> None:
        """Make the step, unless it is another student's, or this one has failed.

        Args:
            alone: no other student makes a step at the same time, so that random numbers may be drawn.
        """
        if self.failure is not None or self.place != (work.epoch, work.step):
            return
        if alone:
            with self.drawing():
                self._advance(work)
        else:
            before = rng.state_of(self.device)
            self._advance(work)
            if not rng.same(before, rng.state_of(self.device)):
                raise TrainingError(
                    f"student {self.config.student}: it draws random numbers in some steps only, which several "
                    "students cannot do at the same time; use --students-at-once 1"
                )

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """The global generators are this student's meanwhile: students of one pass do not disturb one another."""
        with rng.kept(self.device):
            rng.restore(self._random, self.device)
            yield
            after = rng.state_of(self.device)
        self.draws_random_numbers |= not rng.same(after, self._random)
        self._random = after

    def _advance(self, work: Any) -> None:
        self.begin_step()
        for part, here in work.parts:
            # Of several parts only the last one's backward pass sends gradients.
            wait = self._parallel is not None and part != work.parts[-1][0]
            with self._parallel.no_sync() if wait and self._parallel is not None else contextlib.nullcontext():
                self._backward(work, part, here)
        self.end_step()

    def begin_step(self) -> None:
        """What comes before the forward pass."""
        self.model.train()
        rate = self._learning_rate(self.step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # a graph reads it where it is
            else:
                group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)

    def end_step(self) -> None:
        """What comes once the parameters have their gradients."""
        self.change()
        self.note_step()

    def change(self) -> None:
        """Change the parameters by their gradients."""
        self.clip()
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def clip(self) -> None:
        """Scale the gradients down to the norm that they may have."""
        if self.shared.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._list_trained(), self.shared.clip_norm)

    def note_step(self) -> None:
        """What comes once the parameters have changed."""
        if self.average is not None:
            self.average.update(self.model)
        self.step += 1
        if (self.device.type == "cpu" and not self.ranks.several) or self.step % _LOOK_EVERY == 0:
            self.look()

    def _learning_rate(self, step: int) -> float:
        """Of a step of the epoch at hand."""
        steps = self._scheduled_steps
        done = step if self.steps == steps else step * steps / self.steps
        return learning_rate(self.shared, self.config.lr, self.epoch * steps + done, steps)

    @abstractmethod
    def _backward(self, work: Any, part: Any, here: Counts) -> None:
        """The forward and backward pass of a part of a step, and what the epoch's sums get from it."""

    def look(self) -> None:
        """Note that the student has failed, if its loss is not a number any more."""
        if self.failure is None and not bool(self.ranks.sum_tensor(self._sums.values).isfinite().all()):
            self.failure = (
                f"student {self.config.student}: the loss is not finite (found at step {self.step} of epoch "
                f"{self.epoch + 1}); lower --lr (it is {self.config.lr:g}), lengthen --warmup-epochs or use "
                f"--precision fp32. The last checkpoint is from before"
            )

    # ---- epochs ----

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and saved: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.model

    def finish_epoch(self, evaluation: Evaluation | None, eval_seconds: float) -> EpochMetrics:
        """Close the epoch whose last step was made."""
        sums = Sums(torch.device("cpu"), self.ranks.sum_tensor(self._sums.values).tolist())
        means = sums.means(soft=self.config.soft_weight > 0)
        metrics = EpochMetrics(
            epoch=self.epoch + 1,
            step=self.steps_done,
            lr=self._learning_rate(self.steps - 1),
            loss=means.pop("loss") or 0.0,
            **means,
            seconds=self.seconds + eval_seconds,
            images_per_second=sums.units / self.seconds if self.seconds else math.nan,
            eval_accuracy=evaluation.accuracy if evaluation is not None else None,
            eval_cross_entropy=evaluation.cross_entropy if evaluation is not None else None,
            eval_calibration_error=evaluation.calibration_error if evaluation is not None else None,
            eval_map=evaluation.mean_average_precision if isinstance(evaluation, MultiLabelEvaluation) else None,
            eval_perplexity=evaluation.perplexity if isinstance(evaluation, TokenEvaluation) else None,
        )
        self.history.append(metrics)
        if metrics.score is not None:
            if self.best is None or metrics.score > self.best:
                self.best, self._evaluations_since = metrics.score, 0
                if self.ranks.is_first:
                    self._keep_best()
            else:
                self._evaluations_since += 1
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self._sums.clear()
        return metrics

    def _keep_best(self) -> None:
        """Write the weights of the best evaluation so far."""
        run_folder.save_weights(self.folder / run_folder.BEST, self.evaluated)

    @torch.no_grad()
    def _add_sums(
        self,
        losses: LossComponents,
        here: Counts,
        whole: Counts,
        correct: Tensor,
        agreed: Tensor | int,
        *,
        labelled: Tensor | int,
        teacher_sums: Tensor | None,
    ) -> None:
        """Take a part of a step into the figures of the epoch.

        Its losses are means over the part, times what they are means of: summed over parts and processes they are the
        whole's.

        Args:
            labelled: rows with a hard label that had an answer, of which `correct` are right; rows that count for
                nothing may have none.
        """
        self._sums.add(
            here.units,
            here.rows,
            losses.total * (whole.rows / self.ranks.world_size),
            count_soft(self.config, here),
            losses.soft * count_soft(self.config, here),
            labelled,
            losses.hard * here.hard,
            correct,
            agreed,
            teacher_sums=teacher_sums,
            filtered=(here.stored, here.soft, here.comparable, here.differ) if here.stored else None,
        )

    # ---- files ----

    def save(self) -> None:
        """Write where the student is: everything that a step depends on, and what is shown of it."""
        random = self.ranks.gather(self._random)
        sums = self.ranks.sum_tensor(self._sums.values).tolist()
        if not self.ranks.is_first:
            return
        run_folder.save_checkpoint(self.folder, self._state(random, sums))

    def _state(self, random: list[rng.State], sums: list[float]) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": describe_state(self.optimizer),
            "scaler": self._scaler.state_dict(),
            "random": random,
            "sums": sums,
            "seconds": self.seconds,
            "best": self.best,
            "evaluations_since": self._evaluations_since,
            "history": [asdict(epoch) for epoch in self.history],
        }

    def resume(self) -> None:
        """Take up the checkpoint in the folder, if there is one."""
        state = run_folder.load_checkpoint(self.folder)
        if state is not None:
            self._restore(state)

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Afterwards the student is as it was before, whatever steps were made."""
        before = self._state([self._random], self._sums.values.tolist())
        before = copy.deepcopy(run_folder.own_memory(before))
        try:
            yield
        finally:
            self._restore(before)
            self.failure = None

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self.ranks.rank < len(state["random"]):  # more processes than before: the others begin with their own
            self._random |= state["random"][self.ranks.rank]
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.best, self._evaluations_since = state["best"], state["evaluations_since"]
        # What all processes have summed up so far is one of them's from here on.
        self._sums = Sums(self.device, state["sums"] if self.ranks.is_first else None)
        self.history = [EpochMetrics(**epoch) for epoch in state["history"]]

    def publish(self, num_classes: int, activation: Activation) -> None:
        """Write the finished student, so that its folder is a SPEC."""
        if self.shared.select == "best":
            run_folder.load_weights(self.folder / run_folder.BEST, self.evaluated)
        self._write_run(self.folder, num_classes, activation)

    def keep_if_asked(self, num_classes: int, activation: Activation) -> None:
        """Write the student as a run of its own if the weights after the epoch that has ended are to be kept."""
        if self.epoch in (self.shared.keep_epochs or []):
            self._write_run(run_folder.kept_folder(self.folder, self.epoch), num_classes, activation)

    def _write_run(self, folder: Path, num_classes: int, activation: Activation) -> None:
        description = replace(
            self._network,
            num_classes=num_classes,
            preprocessing=self.preprocessing.to_dict(),
            activation=activation,
        )
        try:
            folder.mkdir(exist_ok=True)
            save_run(folder, self.evaluated, description)
        except OSError as error:
            raise TrainingError(
                f"{folder}: the student cannot be written: {error}; the same command resumes"
            ) from error
