"""Whether the labels of a store are enough for the losses of students, before the first step."""

from collections.abc import Sequence

import numpy as np

from softlabel.errors import MismatchError, UsageError
from softlabel.labels.combine import Combination
from softlabel.loader.target import make_target
from softlabel.loss.targets import retemper_factor
from softlabel.store.reader import Store
from softlabel.training.grid import StudentConfig
from softlabel.training.label_filter import LabelFilter
from softlabel.training.losses import LOSSES, Loss


def check_losses(
    configs: Sequence[StudentConfig],
    store: Store,
    combination: Combination | None,
    label_filter: LabelFilter | None,
    *,
    has_labels: bool,
) -> None:
    """Hold every student's loss, and what changes the labels, against the labels of a store.

    Args:
        configs: of the students.
        store: of the labels.
        combination: how its members become one teacher.
        label_filter: what changes the labels.
        has_labels: whether any sample has a hard label.

    Raises:
        UsageError: a loss or a change is not defined for such labels.
        MismatchError: the labels do not know a temperature of it.
    """
    used = [one for one in configs if one.soft_weight > 0 and LOSSES[one.loss].compute is not None]
    needed: list[tuple[str, float]] = []
    for config in used:
        loss, own = LOSSES[config.loss], config.temperature or store.run.temperature
        _check_loss(config.loss, loss, store, has_labels=has_labels)
        temperatures = () if loss.own else loss.fixed or (own,)
        needed += [(f"loss {config.loss}", one) for one in (*temperatures, *loss.also)]
    if label_filter is not None:
        _check_filter(label_filter, store, has_labels=has_labels)
        needed += [("confidence", 1.0)] if label_filter.confidence is not None else []
    if not needed or not len(store) or not store.run.encoding.labels:
        return
    row = np.zeros(1, np.int64)
    target = make_target(store.run, store.take(row).columns, extra=store.extra, combination=combination, members=row)
    for subject, temperature in needed:
        try:
            retemper_factor(target, temperature)
        except MismatchError as error:
            raise MismatchError(f"{subject}: {store.url}: {error}") from None


def _check_loss(name: str, loss: Loss, store: Store, *, has_labels: bool) -> None:
    run, remedy = store.run, "use --loss kd, or a store with a dense encoding"
    if run.activation == "sigmoid":
        raise UsageError(
            f"loss {name}: compares softmaxes over the classes, {store.url} has independent outputs; use --loss kd"
        )
    if run.encoding.drawn:
        raise UsageError(
            f"loss {name}: needs the teacher's probabilities, {store.url} has classes drawn from them; {remedy}"
        )
    if run.encoding.sparse and not loss.takes_top_k:
        raise UsageError(f"loss {name}: needs every class, {store.url} has the most probable ones; {remedy}")
    if loss.of == "labelled rows" and not has_labels:
        raise UsageError(f"loss {name}: is defined by the hard label, which no sample has; use another loss")


def _check_filter(label_filter: LabelFilter, store: Store, *, has_labels: bool) -> None:
    run, option = store.run, "confidence" if label_filter.fix is None else "fix_labels"
    if run.activation == "sigmoid" or run.encoding.drawn:
        what = "independent outputs" if run.activation == "sigmoid" else "classes drawn from the teacher"
        raise UsageError(
            f"{option}: needs the teacher's most probable class, {store.url} has {what}; leave "
            f"--{option.replace('_', '-')} out"
        )
    if label_filter.fix == "swap" and run.encoding.sparse:
        raise UsageError(
            f"fix_labels: swap needs the teacher's logit of the label, {store.url} has the most probable ones alone; "
            "give --fix-labels mask, or a store with a dense encoding"
        )
    if label_filter.fix is not None and not has_labels:
        raise UsageError("fix_labels: compares soft labels with hard ones, which no sample has; leave --fix-labels out")
