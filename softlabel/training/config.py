"""What a run is: its settings, and which of them are its identity."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_type_hints

from softlabel.common.arguments import check_values
from softlabel.errors import UsageError
from softlabel.inputs.base import InputKind
from softlabel.store.reader import Store
from softlabel.training.config_checks import check_combinations, check_lines, check_numbers
from softlabel.training.embedding_losses import EmbeddingLossName, ProjectorName
from softlabel.training.label_filter import LabelFilter, parse_confidence
from softlabel.training.losses import LossName


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train a student, or several that share one pass over the data.

    student, loss, temperature, soft_weight, soft_warmup, hard_weight, label_smoothing, optimizer, lr and weight_decay
    take several values.
    Every combination of them is a student; they share decoding, augmentation and the reading of labels, and each has a
    folder in `out`.

    Attributes:
        data: a SOURCE of images, labelled or not; several are trained on together.
        student: a SPEC; without a checkpoint it starts from random weights.
        out: the run folder; of several students, the folder of their run folders.
        labels: the store with the teacher's soft labels; absent: hard labels only.
        eval_data: a SOURCE on which accuracy is measured, and the perplexity of language models.
        source_ratio: of several sources, how many samples of each there are for one another, such as 1:7; an epoch then
            ends where the first source has been seen once. Absent: an epoch is every sample of all of them.
        streaming: read images and labels block by block, each once an epoch, for data that is not in memory; the order
            is then shuffled within windows of blocks.
        epochs: passes over the data.
        batch_size: samples a step, over all processes together; absent: 128.
        pack: of a language model: positions of a line, which takes as many documents as fit; they do not see each
            other.
        pad: of a language model: positions of a line, which takes one document and is filled up; in place of `pack`.
        batch_tokens: of a language model: positions a step, in whole lines, over all processes together; absent: 8192.
        accumulate: parts into which a batch is cut, one forward and backward pass each.
        loss: the soft term. kd: KL divergence; dkd: decoupled (Zhao et al. 2022); dist: correlations of rows and
            columns (Huang et al. 2022); mse: of logits; standardized: KL divergence of standardised logits (Sun et al.
            2024); js: Jensen-Shannon; reverse: KL divergence the other way round; wttm: a temperature for the teacher
            alone and weighted rows (Zheng and Yang 2024); mlkd: several temperatures, and correlations of rows and of
            classes (Jin et al. 2023). Each has published numbers that stand for options that are absent:
            --print_config shows them.
        temperature: of the soft term; absent: that of `loss`, of kd, js and reverse that of the store.
        combine: how the members of a store that keeps them apart become one teacher: the mean of their logits or of
            their probabilities, at the temperature of the soft term; or random: in every epoch one member for each
            sample, from the seed, its key and the epoch (Kaplun et al. 2022).
        weights: one number a member of such a store; equal when absent, 0 leaves a member out. Of random the
            probabilities of the members.
        soft_weight: of the soft term; absent: that of `loss`, of kd 0.9, with a store, 0 without.
        soft_warmup: epochs over which the weight of the soft term rises: in epoch e it is e / EPOCHS of it; absent:
            that of `loss`, of dkd 20, of others none.
        hard_weight: of the hard term; absent: that of `loss`, of kd 0.1, beside a soft term, 1 without.
        embedding_loss: between the student's embedding (what enters its last linear layer, or what the module of
            '?embedding=MODULE' in its SPEC gives) and the teacher's, of a store that has it. cosine, mse: of the
            projected embedding; simkd: mse, after which the student answers by the teacher's last layer (Chen et al.
            2022); srd: standardised (Miles and Mikolajczyk 2024); rkd: distances and angles (Park et al. 2019); pkt,
            sp: similarities (Passalis and Tefas 2018; Tung and Mori 2019); crd: contrasts (Tian et al. 2020); at: maps
            of attention (Zagoruyko and Komodakis 2017).
        embedding_weight: of it; absent: the published one of each, which --print_config shows.
        embedding_projector: what brings the student's embedding to the teacher's width for cosine, mse and srd: a
            linear layer, or two with a ReLU between them; absent: linear.
        difference_weight: of the squared distance between the differences of the student's logits along noise and the
            teacher's, of a store with views of noise-pair; 0: none.
        label_smoothing: of the hard term.
        mixup: alpha of mixup (Zhang et al. 2017), for hard labels alone; 0 is none.
        optimizer: sgd (with momentum), adamw, or dot, which is sgd with a momentum for each of the soft and the hard
            term, 0.075 above and below `momentum` (Zhao et al. 2023); absent: adamw for a language model, sgd for
            others.
        lr: the highest learning rate; absent: 0.1 for sgd and dot, 0.001 for adamw.
        momentum: of sgd and dot.
        nesterov: whether sgd looks ahead.
        weight_decay: of every parameter.
        clip_norm: gradients of a larger norm than this are scaled down to it.
        ema: decay of an exponential moving average of the weights, such as 0.999, which is then the student that is
            evaluated and saved.
        schedule: of the learning rate: cosine falls to 0, step falls at `lr_drops`, one-cycle rises for 30% of the run
            from lr / 25 and falls to lr / 250000, constant stays.
        warmup_epochs: over which the learning rate rises linearly; absent: 1, and none for one-cycle.
        lr_drops: epochs at which schedule step multiplies the learning rate by `lr_factor`; absent: at 1/2 and 3/4.
        lr_factor: see `lr_drops`.
        augment: crop-flip (pad by `crop_padding`, crop, mirror; the default of images), crop (without mirroring) or
            none. The soft labels are those of the un-augmented image. A store with views of its own takes none: its
            images are the views that the teacher saw.
        crop_padding: pixels on each side.
        view_order: of a store that has several views: cycle (epoch e: view e mod V) or random (each sample its own).
        check_views: compare the pixels of one in so many replayed views with what the teacher saw; 0 compares none.
        fix_labels: what becomes of a soft label whose most probable class is not the hard label: swap exchanges the two
            classes' logits (Wen et al. 2019), mask leaves the sample without a soft term. Absent: nothing.
        confidence: LO:HI; samples whose teacher's highest probability at temperature 1 is below LO or above HI have no
            soft term (Shen 2023, FerKD).
        missing: samples without a row in the store: error, skip, or hard-only.
        ignore_labels: do not use hard labels even if the data has them.
        eval_every: epochs from one evaluation to the next; the last epoch is always evaluated.
        patience: stop once the accuracy (of language models the perplexity) has not improved for so many evaluations;
            absent: never.
        select: which weights the finished student has: those of the last epoch, or of the best evaluation.
        keep_epochs: epochs after which the weights are also kept, each as a run of its own in the run folder: epoch-5.
        seed: of the student's weights, the order and the augmentation.
        precision: bf16 and fp16 use autocast; auto is fp32 on the CPU, bf16 on CUDA devices that have it, else fp16.
        compile: compile the student with torch.compile.
        sync_batchnorm: of several processes: normalise by the statistics of the whole batch.
        device: auto, cpu, cuda or cuda:N.
        students_at_once: of several students on the CPU: how many are trained at the same time, sharing its cores;
            absent: one for each core that torch uses.
        stack: of several students: train those of one architecture as one network, each with its own weights,
            statistics and optimiser state. Its results are those of each alone up to rounding, not bit for bit. off
            never does, on does or refuses, auto does where a short trial before the first step finds it faster.
        step: how the step of a student, or of a stack, is launched on a CUDA device: eager launches every kernel, graph
            one CUDA graph or refuses, auto a graph where a short trial finds it equal and faster. The results are those
            of eager steps up to rounding.
        workers: processes that read and decode; absent: chosen from the machine.
        cache: where decoded samples are kept: memory, which worker processes share, or device, which holds all of them
            and augments there with the same pixels.
        cache_mb: memory for decoded images in MiB; all or none are kept.
        checkpoint_minutes: how often a checkpoint is written within an epoch; one is written after every epoch.
        tensorboard: write TensorBoard events too.
        tracker: send metrics to wandb or mlflow too (extras of the same names), as their environment says.
        overwrite: start again where the folder holds another run or a finished one.
        progress: show a bar; absent: if standard error is a terminal.
    """

    data: str | list[str]
    student: str | list[str]
    out: str
    labels: str | None = None
    eval_data: str | None = None
    source_ratio: str | None = None
    streaming: bool = False
    epochs: int = 10
    batch_size: int | None = None
    pack: int | None = None
    pad: int | None = None
    batch_tokens: int | None = None
    accumulate: int = 1
    loss: LossName | list[LossName] = "kd"
    temperature: float | list[float] | None = None
    combine: Literal["logits", "probs", "random"] | None = None
    weights: list[float] | None = None
    soft_weight: float | list[float] | None = None
    soft_warmup: float | list[float] | None = None
    hard_weight: float | list[float] | None = None
    embedding_loss: EmbeddingLossName | list[EmbeddingLossName] = "none"
    embedding_weight: float | list[float] | None = None
    embedding_projector: ProjectorName | None = None
    difference_weight: float | list[float] = 0.0
    label_smoothing: float | list[float] = 0.0
    mixup: float = 0.0
    optimizer: Literal["sgd", "adamw", "dot"] | list[Literal["sgd", "adamw", "dot"]] | None = None
    lr: float | list[float] | None = None
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float | list[float] = 5e-4
    clip_norm: float | None = None
    ema: float | None = None
    schedule: Literal["cosine", "step", "one-cycle", "constant"] = "cosine"
    warmup_epochs: float | None = None
    lr_drops: list[float] | None = None
    lr_factor: float = 0.1
    augment: Literal["crop-flip", "crop", "none"] | None = None
    crop_padding: int = 4
    view_order: Literal["cycle", "random"] = "cycle"
    check_views: int = 256
    fix_labels: Literal["swap", "mask"] | None = None
    confidence: str | None = None
    missing: Literal["error", "skip", "hard-only"] = "error"
    ignore_labels: bool = False
    eval_every: int = 1
    patience: int | None = None
    select: Literal["last", "best"] = "last"
    keep_epochs: list[int] | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    sync_batchnorm: bool = False
    device: str = "auto"
    students_at_once: int | None = None
    stack: Literal["off", "on", "auto"] = "off"
    step: Literal["eager", "graph", "auto"] = "eager"
    workers: int | None = None
    cache: Literal["memory", "device"] = "memory"
    cache_mb: int = 4096
    checkpoint_minutes: float = 10.0
    tensorboard: bool = True
    tracker: Literal["wandb", "mlflow"] | None = None
    overwrite: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_values(asdict(self), get_type_hints(TrainConfig))
        object.__setattr__(self, "out", os.path.expanduser(self.out))
        for name in ("data", *GRID):
            value = getattr(self, name)
            if isinstance(value, list):
                if not value:
                    raise UsageError(f"{name}: expected at least one value, found none")
                if len(value) == 1:  # one value of an option that takes several
                    object.__setattr__(self, name, value[0])
        check_numbers(self, GRID)
        check_lines(self)
        has_lines = self.line is not None
        if has_lines and self.batch_tokens is None:
            object.__setattr__(self, "batch_tokens", 8192)
        if not self.of_documents and self.batch_size is None:
            object.__setattr__(self, "batch_size", 128)
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", "adamw" if has_lines else "sgd")
        check_combinations(self)

    @property
    def of_documents(self) -> bool:
        """Whether the options of a language model's batches are given."""
        return (self.pack, self.pad, self.batch_tokens) != (None, None, None)

    @property
    def line(self) -> int | None:
        """Positions of a line of a language model's batches."""
        return self.pad if self.pack is None else self.pack

    @property
    def source_counts(self) -> tuple[int, ...] | None:
        """`source_ratio` as whole numbers, one a source."""
        if self.source_ratio is None:
            return None
        found = tuple(int(part) for part in self.source_ratio.split(":") if part.isdecimal())
        sources = len(self.values("data"))
        if len(found) != sources or len(found) < 2 or min(found) < 1 or len(self.source_ratio.split(":")) != sources:
            raise UsageError(
                f"source_ratio: expected a whole number of at least 1 for each source of --data, such as 1:7 for two, "
                f"found {self.source_ratio!r} for {sources}"
            )
        return found

    def values(self, name: str) -> list[Any]:
        """The values of an option that takes several, as a list."""
        value = getattr(self, name)
        return list(value) if isinstance(value, list) else [value]

    @property
    def label_filter(self) -> LabelFilter | None:
        """`fix_labels` and `confidence` as what they do; None: nothing."""
        if self.fix_labels is None and self.confidence is None:
            return None
        confidence = None if self.confidence is None else parse_confidence(self.confidence)
        return LabelFilter(fix=self.fix_labels, confidence=confidence)

    def augmentation(self, store: Store | None, kind: InputKind) -> str:
        """`augment`, resolved. What it says beside a store that has views, or samples that take none, is refused where
        they meet."""
        if self.augment is not None:
            return self.augment
        has_views = store is not None and bool(store.run.view_columns)
        return "none" if has_views or not kind.takes("crop-flip") else "crop-flip"

    def shared_identity(self) -> dict[str, Any]:
        """The settings that all students have in common and that decide what their weights become."""
        found = {name: value for name, value in asdict(self).items() if name not in (*_NOT_IDENTITY, *GRID)}
        found = {name: value for name, value in found.items() if not is_later_default(name, value)}
        unused = ("batch_size",) if self.of_documents else ("pack", "pad", "batch_tokens")
        return {name: value for name, value in found.items() if name not in unused}


# Whose several values make several students, in the order in which their names have them.
GRID = (
    "student",
    "optimizer",
    "lr",
    "weight_decay",
    "label_smoothing",
    "loss",
    "temperature",
    "soft_weight",
    "soft_warmup",
    "hard_weight",
    "embedding_loss",
    "embedding_weight",
    "difference_weight",
)

# Options that runs of earlier versions do not name in their identity, with what those did.
_LATER: Mapping[str, Any] = {
    "fix_labels": None,
    "confidence": None,
    "loss": "kd",
    "soft_warmup": 0.0,
    "embedding_loss": "none",
    "embedding_weight": 0.0,
    "embedding_projector": None,
    "difference_weight": 0.0,
}


def is_later_default(name: str, value: Any) -> bool:
    """Whether a setting is what every run was before there was the option: identities do not name it."""
    return name in _LATER and value == _LATER[name]


# Where things lie (data and store are compared by what they hold), and what only changes speed or what is reported.
_NOT_IDENTITY = {
    "data",
    "out",
    "labels",
    "eval_data",
    "device",
    "workers",
    "cache",
    "cache_mb",
    "checkpoint_minutes",
} | {
    "check_views",
    "keep_epochs",
    "tensorboard",
    "tracker",
    "students_at_once",
    "stack",
    "step",
    "overwrite",
    "progress",
}
