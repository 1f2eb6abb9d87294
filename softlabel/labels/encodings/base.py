"""What makes the columns of an encoding out of a teacher's answers, on the device, and reads them back.

R rows (one for each sample, or for each sample and member where members are kept), C classes, D width of the teacher's
last hidden layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.common.activation import Activation
from softlabel.store.columns import index_dtype
from softlabel.store.encodings import Encoding

Columns = dict[str, Tensor]

LOWEST_HALF = -65504.0
_TORCH = {"|u1": torch.uint8, "<u2": torch.uint16, "<i4": torch.int32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a teacher says of rows.

    Attributes:
        scaled_logits: float32 (R, C). Of a softmax the row's maximum is subtracted: near zero, where most of the
            probability is, float16 is finest; -inf masks a class. Of independent sigmoids they are as they are, finite.
        temperature: the store's, that the logits were divided by.
        seeds: int64 (R,), from each row's identity; there for an encoding that is drawn.
        hidden: (R, D), what enters the teacher's last linear layer; there for an encoding from it.
    """

    scaled_logits: Tensor
    temperature: float
    seeds: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How columns are decoded: to logits divided by `at`, of a store at `temperature`; `head` is the weight (C, D) and
    bias (C,) of the teacher's last linear layer."""

    num_classes: int
    temperature: float
    at: float
    head: tuple[Tensor, Tensor] | None = None
    activation: Activation = "softmax"

    @property
    def factor(self) -> float:
        return self.temperature / self.at


def decode_on_host(encoding: Encoding, columns: Mapping[str, Tensor], reading: Reading) -> Tensor:
    """By the store's decoder: float64 (R, C)."""
    head = reading.head
    extra = None if head is None else {"weight": head[0].cpu().numpy(), "bias": head[1].cpu().numpy()}
    arrays = {name: column.cpu().numpy() for name, column in columns.items()}
    decoded_RC = encoding.decode(arrays, num_classes=reading.num_classes, temperature=reading.temperature, extra=extra)
    device = next(iter(columns.values())).device
    return torch.from_numpy(decoded_RC).to(device).double() * reading.factor


def measure_decoded(encoding: Encoding, scaled_logits_RC: Tensor, decoded_RC: Tensor, factor: float) -> Tensor:
    """KL(teacher || decoded) in nats, float64 (R,); of rows that are drawn KL(decoded || teacher), since they give most
    classes no probability."""
    teacher_RC = scaled_logits_RC.double() * factor
    return _kl(decoded_RC, teacher_RC) if encoding.drawn else _kl(teacher_RC, decoded_RC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coder:
    """The teacher's side of an encoding.

    Attributes:
        encode: (encoding, answers) -> columns, name -> (R, W) on the same device.
        decode: (encoding, columns, reading) -> float64 (R, C) logits divided by `reading.at`, up to a constant per row.
        nats: (encoding, scaled_logits_RC, columns, reading) -> what the columns lose, float64 (R,), where there is a
            faster way than to decode them.
    """

    encode: Callable[[Any, Answers], Columns]
    decode: Callable[[Any, Mapping[str, Tensor], Reading], Tensor] = decode_on_host
    nats: Callable[[Any, Tensor, Mapping[str, Tensor], Reading], Tensor] | None = None


def decode_dense(encoding: Encoding, columns: Mapping[str, Tensor], reading: Reading) -> Tensor:
    return columns["logits"].double() * reading.factor


def to_half(values: Tensor) -> Tensor:
    # Beyond float16's range a finite logit stays finite, so that -inf always means a masked class.
    return torch.where(values == -torch.inf, values, values.clamp(LOWEST_HALF, -LOWEST_HALF)).half()


def to_ids(index_RK: Tensor, num_classes: int) -> Tensor:
    kind = _TORCH[index_dtype(num_classes)]
    assert num_classes - 1 <= torch.iinfo(kind).max
    return index_RK.to(kind)


def measure_sigmoids(scaled_logits_RC: Tensor, decoded_RC: Tensor, factor: float) -> Tensor:
    """KL(teacher || decoded) of independent outputs in nats, mean over the classes: float64 (R,)."""
    t_RC = scaled_logits_RC.double() * factor
    on_RC = t_RC.sigmoid() * (F.logsigmoid(t_RC) - F.logsigmoid(decoded_RC))
    off_RC = (-t_RC).sigmoid() * (F.logsigmoid(-t_RC) - F.logsigmoid(-decoded_RC))
    return (on_RC + off_RC).mean(dim=-1).clamp_min(0.0)


def _kl(teacher_RC: Tensor, decoded_RC: Tensor) -> Tensor:
    # The difference is of the size of float32's rounding, so float64 it is.
    log_p_RC = torch.log_softmax(teacher_RC, dim=-1)
    log_q_RC = torch.log_softmax(decoded_RC, dim=-1)
    p_RC = log_p_RC.exp()
    # A class that is masked on both sides has p = 0 and contributes nothing, where the product would be NaN.
    return torch.where(p_RC > 0, p_RC * (log_p_RC - log_q_RC), 0.0).sum(dim=-1).clamp_min(0.0)
