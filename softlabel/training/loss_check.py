"""Whether the labels of a store are enough for the losses of students, before the first step."""

from collections.abc import Sequence

import numpy as np

from softlabel.errors import MismatchError, UsageError
from softlabel.labels.combine import Combination
from softlabel.loader.target import make_target
from softlabel.loss.targets import retemper_factor
from softlabel.store.reader import Store
from softlabel.training.grid import StudentConfig
from softlabel.training.losses import LOSSES


def check_losses(
    configs: Sequence[StudentConfig], store: Store, combination: Combination | None, *, has_labels: bool
) -> None:
    """Hold every student's loss against the labels that it will see.

    Args:
        configs: of the students.
        store: of the labels.
        combination: how its members become one teacher.
        has_labels: whether any sample has a hard label.

    Raises:
        UsageError: a loss is not defined for such labels.
        MismatchError: the labels do not know a temperature of a loss.
    """
    run = store.run
    used = [one for one in configs if one.soft_weight > 0 and LOSSES[one.loss].compute is not None]
    for config in used:
        loss, remedy = LOSSES[config.loss], "use --loss kd, or a store with a dense encoding"
        if run.activation == "sigmoid":
            raise UsageError(
                f"loss {config.loss}: compares softmaxes over the classes, {store.url} has independent outputs; use "
                "--loss kd"
            )
        if run.encoding.drawn:
            raise UsageError(
                f"loss {config.loss}: needs the teacher's probabilities, {store.url} has classes drawn from them; "
                f"{remedy}"
            )
        if run.encoding.sparse and not loss.takes_top_k:
            raise UsageError(f"loss {config.loss}: needs every class, {store.url} has the most probable ones; {remedy}")
        if loss.of == "labelled rows" and not has_labels:
            raise UsageError(f"loss {config.loss}: is defined by the hard label, which no sample has; use another loss")
    if not used or not len(store):
        return
    target = make_target(run, store.take(np.zeros(1, np.int64)).columns, extra=store.extra, combination=combination)
    for config in used:
        loss, own = LOSSES[config.loss], config.temperature or run.temperature
        for temperature in (*([] if loss.own else loss.fixed or (own,)), *loss.also):
            try:
                retemper_factor(target, temperature)
            except MismatchError as error:
                raise MismatchError(f"loss {config.loss}: {store.url}: {error}") from None
