"""The term of a student's loss on the differences of its logits along noise.

Legend: B batch, C classes, K directions.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from softlabel.inputs.base import Inputs
from softlabel.loader import Batch
from softlabel.loss.differences import difference_loss
from softlabel.training.embedding_objective import mask_of


def measure_differences(model: nn.Module, copies: Inputs, batch: Batch) -> Tensor:
    """`difference_loss` of some rows, mean over those that the store has.

    Noisy copies are normalised by the statistics of their own batch and leave no trace in those that the student
    keeps: a student is evaluated on samples without noise.

    Args:
        model: the student.
        copies: what it takes of B 2 K noisy copies.
        batch: of B rows.
    """
    assert batch.difference is not None
    with _keeping_statistics(model):
        logits_NC = copies.call(model)
    rows, _, classes = batch.difference.shape
    logits_BJC = logits_NC.float().view(rows, -1, classes)
    return difference_loss(logits_BJC, batch.difference, mask=mask_of(batch, logits_NC.device))


@contextmanager
def _keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms normalise by their batch, and keep the statistics of earlier ones, inside the block."""
    norms = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
