"""The losses of `train --loss`: what the soft term is, and the published numbers that it is used with.

Legend: B batch, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from softlabel.loss import (
    decoupled_kd,
    dist_loss,
    jensen_shannon,
    mse_logits,
    multi_level_kd,
    reverse_kl,
    standardized_kl,
    weighted_ttm,
)
from softlabel.loss.multi_level import TEMPERATURES
from softlabel.loss.targets import Target

LossName = Literal["kd", "dkd", "dist", "mse", "standardized", "js", "reverse", "wttm", "mlkd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss between a student's logits and a target.

    Attributes:
        compute: (logits (B, C), target, labels int64 (B,), temperature, weight (B,) or None) -> a scalar, the mean over
            the rows that it is of; of a loss of batches, whose rows all count, without weights. None: the distillation
            loss, which computes its hard term, too.
        of: whose mean it is: rows with a soft label, those of them that have a hard label, or the batch as a whole.
        temperature: where none is given; None: that of the store.
        fixed: temperatures that it has always, in place of one that is given.
        own: whether the temperature is that of the loss alone, so that any target has it.
        also: temperatures at which it needs the target beside.
        soft_weight, hard_weight, soft_warmup: where none is given.
        takes_top_k: whether labels with the most probable classes alone are enough.
        source: where the numbers are from.
    """

    compute: Callable[[Tensor, Target, Tensor, float, Tensor | None], Tensor] | None
    of: Literal["rows", "labelled rows", "batch"] = "rows"
    temperature: float | None = None
    fixed: tuple[float, ...] = ()
    own: bool = False
    also: tuple[float, ...] = ()
    soft_weight: float = 0.9
    hard_weight: float = 0.1
    soft_warmup: float = 0.0
    takes_top_k: bool = False
    source: str


LOSSES: dict[LossName, Loss] = {
    "kd": Loss(compute=None, takes_top_k=True, source="mdistiller, KD: CE 0.1, KD 0.9"),
    "dkd": Loss(
        compute=lambda z, t, y, temperature, w: decoupled_kd(z, t, y, temperature=temperature, weight=w),
        of="labelled rows",
        temperature=4.0,
        soft_weight=1.0,
        hard_weight=1.0,
        soft_warmup=20.0,
        source="mdistiller, DKD: CE 1, alpha 1, beta 8, T 4, warm-up of 20 epochs",
    ),
    "dist": Loss(
        compute=lambda z, t, y, temperature, w: dist_loss(z, t, temperature=temperature),
        of="batch",
        temperature=4.0,
        soft_weight=2.0,
        hard_weight=1.0,
        source="torchdistill, DIST: CE 1, weight 2; T 4 of the TTM code for CIFAR-100",
    ),
    "mse": Loss(
        compute=lambda z, t, y, temperature, w: mse_logits(z, t, weight=w),
        fixed=(1.0,),
        soft_weight=1.0,
        hard_weight=0.0,
        source="Kim et al. 2021: logits alone, mean over classes as in their code",
    ),
    "standardized": Loss(
        compute=lambda z, t, y, temperature, w: standardized_kl(z, t, temperature=temperature, weight=w),
        temperature=2.0,
        own=True,
        soft_weight=9.0,
        source="logit-standardization-KD: CE 0.1, KD 9, T 2",
    ),
    "js": Loss(
        compute=lambda z, t, y, temperature, w: jensen_shannon(z, t, temperature=temperature, weight=w),
        takes_top_k=True,
        source="Agarwal et al. 2024, GKD: beta 0.5; for classes none are published, weights as of kd",
    ),
    "reverse": Loss(
        compute=lambda z, t, y, temperature, w: reverse_kl(z, t, temperature=temperature, weight=w),
        takes_top_k=True,
        source="for classes none are published, weights as of kd",
    ),
    "wttm": Loss(
        compute=lambda z, t, y, temperature, w: weighted_ttm(z, t, temperature=temperature, weight=w),
        temperature=5.0,
        also=(1.0,),
        soft_weight=2.0,
        hard_weight=1.0,
        takes_top_k=True,
        source="Zheng and Yang 2024, table 8, resnet110 to resnet20: gamma 0.2, beta 2",
    ),
    "mlkd": Loss(
        compute=lambda z, t, y, temperature, w: multi_level_kd(z, t),
        of="batch",
        fixed=TEMPERATURES,
        also=(1.0,),
        source="mdistiller's MLKD (weak view): CE 0.1, 0.9 for each part, T 2, 3, 4, 5, 6",
    ),
}
assert set(LOSSES) == set(get_args(LossName))
