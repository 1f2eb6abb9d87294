"""The learning rate of a step: a pure function of its number, so that a resumed run has no scheduler to restore."""

import math

from softlabel.training.config import TrainConfig

# Of the one-cycle policy (Smith and Topin 2017), the numbers that torch's OneCycleLR has.
_RISE, _START, _END = 0.3, 25.0, 1e4


def learning_rate(config: TrainConfig, peak: float, step: float, steps_per_epoch: int) -> float:
    """The learning rate of a step.

    Args:
        peak: the highest learning rate.
        step: from 0, over the whole run; between two of them where an epoch has more steps than `steps_per_epoch`.
        steps_per_epoch: optimiser steps.
    """
    total = config.epochs * steps_per_epoch
    if config.schedule == "one-cycle":
        return _one_cycle(peak, step, total)
    warmup = min(round((1.0 if config.warmup_epochs is None else config.warmup_epochs) * steps_per_epoch), total - 1)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        return peak * _half_cosine((step - warmup) / (total - warmup))
    if config.schedule == "step":
        drops = config.lr_drops if config.lr_drops is not None else [config.epochs / 2, config.epochs * 3 / 4]
        return peak * config.lr_factor ** sum(step >= round(epoch * steps_per_epoch) for epoch in drops)
    return peak


def _one_cycle(peak: float, step: float, total: int) -> float:
    start, end = peak / _START, peak / _START / _END
    top = max(_RISE * total - 1, 1.0)
    if step <= top:
        return peak + (start - peak) * _half_cosine(step / top)
    return end + (peak - end) * _half_cosine((step - top) / max(total - 1 - top, 1.0))


def _half_cosine(done: float) -> float:
    """From 1 to 0 while `done` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * done))
