"""Whether the settings of a run make sense together; `config` is a `TrainConfig`, whose module imports this one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from softlabel.errors import UsageError
from softlabel.training.dot import DELTA
from softlabel.training.embedding_losses import EMBEDDING_LOSSES
from softlabel.training.label_filter import parse_confidence
from softlabel.training.losses import LOSSES

_AT_LEAST: Mapping[str, float] = {
    "epochs": 1,
    "batch_size": 1,
    "pack": 1,
    "pad": 1,
    "batch_tokens": 1,
    "accumulate": 1,
    "soft_weight": 0,
    "soft_warmup": 0,
    "hard_weight": 0,
    "difference_weight": 0,
    "mixup": 0,
    "lr": 0,
    "momentum": 0,
    "weight_decay": 0,
    "warmup_epochs": 0,
    "lr_factor": 0,
    "crop_padding": 0,
    "eval_every": 1,
    "patience": 1,
    "students_at_once": 1,
    "cache_mb": 0,
    "check_views": 0,
    "checkpoint_minutes": 0,
    "workers": 0,
}


def check_numbers(config: Any, grid: Sequence[str]) -> None:
    """Numbers are in their ranges, and the values of options that take several (`grid`) differ."""
    for name, least in _AT_LEAST.items():
        for value in config.values(name):
            if value is not None and not least <= value < math.inf:
                raise UsageError(f"{name}: expected a number of at least {least}, found {value}")
    for name in ("temperature", "clip_norm", "embedding_weight"):
        for value in config.values(name):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name}: expected a number above 0, found {value}")
    for value in config.values("label_smoothing"):
        if not 0 <= value <= 1:
            raise UsageError(f"label_smoothing: expected a number from 0 to 1, found {value}")
    if config.ema is not None and not 0 < config.ema < 1:
        raise UsageError(f"ema: expected a number between 0 and 1, found {config.ema}")
    for epoch in config.keep_epochs or []:
        if not 1 <= epoch <= config.epochs:
            raise UsageError(f"keep_epochs: expected epochs from 1 to {config.epochs}, found {epoch}")
    if config.confidence is not None:
        parse_confidence(config.confidence)
    for name in grid:
        values = config.values(name)
        if len(set(values)) < len(values):
            raise UsageError(f"{name}: expected different values, found {values}")


def check_lines(config: Any) -> None:
    """The options of a language model's batches fit each other."""
    if config.pack is not None and config.pad is not None:
        raise UsageError(
            f"pack and pad: expected one of them, the positions of a line, found {config.pack} and {config.pad}; give "
            "--pack for several documents a line, or --pad for one"
        )
    if config.of_documents and config.batch_size is not None:
        raise UsageError(
            f"batch_size: {config.batch_size} counts samples, a language model's batches are counted in tokens; give "
            "--batch-tokens alone"
        )


def _list_soft_options(config: Any) -> list[str]:
    """Options of the soft term that are given."""
    given = {"loss": config.loss != "kd", "temperature": config.temperature is not None}
    given["soft_warmup"] = config.soft_warmup not in (None, 0)
    given |= {"fix_labels": config.fix_labels is not None, "confidence": config.confidence is not None}
    return [name for name, is_given in given.items() if is_given]


def _check_dot(config: Any) -> None:
    """What needs one gradient of a step, where there are two."""
    if not DELTA <= config.momentum < 1 - DELTA:
        raise UsageError(
            f"momentum: dot has {DELTA} more and less for its two terms, expected {DELTA} to {1 - DELTA}, found "
            f"{config.momentum}"
        )
    for name, is_given in (("clip_norm", config.clip_norm is not None), ("compile", config.compile)):
        if is_given:
            raise UsageError(
                f"{name}: is of one gradient a step, optimizer dot has two; leave --{name.replace('_', '-')} out, or "
                "use sgd"
            )


def check_combinations(config: Any) -> None:
    """Options that need another one, or exclude it: nothing that was asked for is ignored."""
    soft = [weight for weight in config.values("soft_weight") if weight != 0]  # None stands for 0.9 with a store
    without_soft = config.labels is None or 0 in config.values("soft_weight")
    if without_soft and 0 in config.values("hard_weight") and "none" in config.values("embedding_loss"):
        raise UsageError("soft_weight and hard_weight: both are 0, there is nothing to learn from")
    _check_embedding_options(config)
    _check_difference_options(config)
    if config.labels is None:
        for name in _list_soft_options(config):
            if name != "temperature":
                raise UsageError(
                    f"{name}: {getattr(config, name)} is of the soft term, which needs soft labels; give --labels "
                    f"STORE, or leave --{name.replace('_', '-')} out"
                )
        if any(config.values("soft_weight")):
            raise UsageError(f"soft_weight: {config.soft_weight} needs soft labels; give --labels STORE")
        if config.temperature is not None:
            raise UsageError(
                f"temperature: {config.temperature} is that of the soft term, which needs soft labels; give --labels "
                "STORE, or leave --temperature out"
            )
    elif not soft and (named := _list_soft_options(config)):
        raise UsageError(f"{named[0]}: soft_weight is 0, so there is no soft term whose {named[0]} it could be")
    elif config.temperature is not None and all(LOSSES[name].fixed for name in config.values("loss")):
        raise UsageError(
            f"temperature: loss {config.loss} has temperatures of its own, found {config.temperature}; leave "
            "--temperature out"
        )
    if "dot" in config.values("optimizer"):
        _check_dot(config)
    if config.mixup and config.labels is not None and soft:
        raise UsageError(
            "mixup: a mixed sample has no soft label in the store; use it with hard labels alone (without --labels, or "
            "--soft-weight 0)"
        )
    if config.cache == "device" and config.workers:
        raise UsageError(
            f"workers: a cache on a device is filled by this process, found {config.workers}; leave --workers out"
        )
    if config.schedule == "one-cycle" and config.warmup_epochs is not None:
        raise UsageError("warmup_epochs: schedule one-cycle rises by itself; leave --warmup-epochs out")
    if config.schedule != "step" and config.lr_drops is not None:
        raise UsageError(f"lr_drops: only schedule step has drops, found schedule {config.schedule}")
    if config.eval_data is None:
        for name, given in (("patience", config.patience is not None), ("select best", config.select == "best")):
            if given:
                raise UsageError(f"{name}: the accuracy has to be measured for it; give --eval-data SOURCE")
    if config.source_counts is not None and config.streaming:
        raise UsageError(
            "source_ratio: data that is read block by block has one order; leave --source-ratio or --streaming out"
        )
    if config.line is not None and (config.batch_tokens or 0) < config.line:
        raise UsageError(
            f"batch_tokens: expected at least a line of {config.line} positions, found {config.batch_tokens}; a batch "
            "is whole lines"
        )
    size = config.batch_size or (config.batch_tokens or 1) // (config.line or 1)
    if config.accumulate > size:
        lines = " lines" if config.of_documents else ""
        raise UsageError(f"accumulate: a batch of {size}{lines} cannot be cut into {config.accumulate} parts")


def _check_difference_options(config: Any) -> None:
    """A term on differences along noise has labels, of samples that are not mixed."""
    if not any(config.values("difference_weight")):
        return
    if config.labels is None:
        raise UsageError(
            f"difference_weight: {config.difference_weight} needs the teacher's differences along noise; give --labels "
            "STORE, of 'softlabel generate --augment noise-pair'"
        )
    if config.mixup:
        raise UsageError("mixup: a mixed sample has no differences in the store; leave --mixup out")


def _check_embedding_options(config: Any) -> None:
    """The options of a loss on embeddings have one, and it has labels."""
    used = [name for name in config.values("embedding_loss") if name != "none"]
    if not used:
        for name in ("embedding_weight", "embedding_projector"):
            if (value := getattr(config, name)) is not None:
                raise UsageError(
                    f"{name}: {value} is of a loss on embeddings, found none; give --embedding-loss NAME, or leave "
                    f"--{name.replace('_', '-')} out"
                )
        return
    if config.labels is None:
        raise UsageError(
            f"embedding_loss: {', '.join(used)} needs the teacher's embeddings; give --labels STORE, of 'softlabel "
            "generate --also embedding'"
        )
    if config.mixup:
        raise UsageError("mixup: a mixed sample has no embedding in the store; leave --mixup or --embedding-loss out")
    projecting = [name for name in used if EMBEDDING_LOSSES[name].projects]
    if config.embedding_projector is not None and not projecting:
        raise UsageError(
            f"embedding_projector: {', '.join(used)} compares how embeddings lie, in which none is projected to "
            "another; leave --embedding-projector out"
        )
    if config.embedding_projector == "mlp" and "simkd" in used:
        raise UsageError(
            "embedding_projector: with simkd a linear one and the teacher's last layer become the student's, which mlp "
            "could not; give linear"
        )
