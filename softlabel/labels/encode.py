"""From scaled logits to the columns of a store, on the device, and what that costs.

Legend: R rows (one for each sample, or for each sample and member where members are kept), C classes, K kept classes,
S draws, D width of the teacher's last hidden layer, E temperatures with a known tail, X exact classes of an int8 row.
The layout of each encoding's columns is in ``store/columns.py`` and ``store/FORMAT.md``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.errors import UsageError
from softlabel.store.columns import EXACT, Encoding, index_dtype
from softlabel.store.manifest import Fidelity

Columns = dict[str, Tensor]

_LOWEST_HALF = -65504.0
_TORCH = {"|u1": torch.uint8, "<u2": torch.uint16, "<i4": torch.int32}
# int8 spends its 255 steps on the logits within this distance of the row's maximum, in logits at temperature 1 (and at
# least a quarter of it after scaling): further down a class has no probability at any temperature in use.
_INT8_RANGE = 128.0
_CHUNK = 64  # rows at a time, so that what is between two steps stays in a core's cache


def encode(
    scaled_logits_RC: Tensor, encoding: Encoding, *, temperature: float = 1.0, seeds_R: Tensor | None = None
) -> Columns:
    """The columns that a store keeps of these rows.

    Args:
        scaled_logits_RC: float32 (R, C), the row's maximum subtracted: near zero, where most of the probability is,
            float16 is finest. -inf masks a class.
        encoding: any but ``head``, which stores the teacher's hidden layer (see `encode_hidden`).
        temperature: the store's, that the logits were divided by.
        seeds_R: int64 (R,), from each row's identity; what ``sampled`` draws from.

    Returns:
        Name -> (R, W), on the same device.
    """
    match encoding.name:
        case "float32":
            return {"logits": scaled_logits_RC.float()}
        case "float16":
            return {"logits": _half(scaled_logits_RC)}
        case "int8":
            return _int8(scaled_logits_RC.float(), temperature)
        case "topk":
            return _topk(scaled_logits_RC, encoding, temperature)
        case "sampled":
            if seeds_R is None:
                raise UsageError("encoding 'sampled' needs a seed for every row, from its key")
            return _sampled(scaled_logits_RC, encoding, seeds_R)
        case _:
            raise UsageError(f"encoding {encoding.name!r} stores the teacher's hidden layer, not its logits")


def encode_hidden(hidden_RD: Tensor, encoding: Encoding) -> Columns:
    """The columns of encoding ``head``: float16 (R, D), or int8 (R, D) and a scale (R, 1) of its own for each row."""
    assert encoding.name == "head"
    if encoding.hidden == "float16":
        return {"hidden": hidden_RD.half()}
    scale_R1 = (hidden_RD.float().abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return {"hidden": (hidden_RD.float() / scale_R1).round().to(torch.int8), "hidden_scale": scale_R1}


def decode(
    columns: Mapping[str, Tensor],
    encoding: Encoding,
    *,
    num_classes: int,
    temperature: float,
    at: float | None = None,
    head: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What a reader gets back: float64 (R, C) logits divided by `at` (the store's temperature by default), up to a
    constant per row. Top-k spreads its tail evenly, unsampled classes are -inf. head: weight (C, D) and bias (C,)."""
    at = temperature if at is None else at
    sharpen = temperature / at
    match encoding.name:
        case "float32" | "float16":
            return columns["logits"].double() * sharpen
        case "int8":
            logits_RC = columns["q"].double() * columns["scale"].double() + columns["offset"].double()
            logits_RC.scatter_(1, columns["top_index"].long(), columns["top_value"].double())
            return logits_RC * sharpen
        case "topk":
            known = [place for place, t in enumerate(encoding.temperatures) if abs(t - at) <= 1e-6 * at]
            place, factor = (known[0], 1.0) if known else (encoding.temperatures.index(temperature), sharpen)
            left_out = max(1, num_classes - encoding.kept(num_classes))
            even_R1 = (columns["tail"][:, place : place + 1].double() - torch.tensor(float(left_out)).log()) * factor
            return even_R1.repeat(1, num_classes).scatter_(
                1, columns["index"].long(), columns["value"].double() * sharpen
            )
        case "sampled":
            weight_RC = torch.zeros(
                len(columns["index"]), num_classes, dtype=torch.float64, device=columns["index"].device
            )
            return weight_RC.scatter_add_(1, columns["index"].long(), columns["weight"].double()).log() * sharpen
        case "head":
            assert head is not None
            hidden_RD = columns["hidden"].double()
            if "hidden_scale" in columns:
                hidden_RD = hidden_RD * columns["hidden_scale"].double()
            return (hidden_RD @ head[0].double().T + head[1].double()) / at


def _half(values: Tensor) -> Tensor:
    # Beyond float16's range a finite logit stays finite, so that -inf always means a masked class.
    return torch.where(values == -torch.inf, values, values.clamp_min(_LOWEST_HALF)).half()


def _ids(index_RK: Tensor, num_classes: int) -> Tensor:
    kind = _TORCH[index_dtype(num_classes)]
    assert num_classes - 1 <= torch.iinfo(kind).max
    return index_RK.to(kind)


def _int8(scaled_logits_RC: Tensor, temperature: float) -> Columns:
    num_classes = scaled_logits_RC.shape[1]
    top_value_RX, top_index_RX = scaled_logits_RC.topk(min(EXACT, num_classes), dim=1)
    lowest = -_INT8_RANGE / min(temperature, 4.0)
    others_RC = scaled_logits_RC.clamp_min(lowest).scatter(1, top_index_RX, torch.nan)
    high_R1 = others_RC.nan_to_num(nan=-torch.inf).amax(dim=1, keepdim=True).nan_to_num(neginf=0.0)
    low_R1 = others_RC.nan_to_num(nan=torch.inf).amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)
    scale_R1 = (high_R1 - low_R1) / 254
    scale_R1 = torch.where(scale_R1 > 0, scale_R1, 1.0)
    offset_R1 = (high_R1 + low_R1) / 2
    steps_RC = ((others_RC - offset_R1) / scale_R1).round().clamp(-127, 127)
    return {
        "q": steps_RC.nan_to_num(nan=127.0).to(torch.int8),
        "scale": scale_R1,
        "offset": offset_R1,
        "top_index": _ids(top_index_RX, num_classes),
        "top_value": _half(top_value_RX),
    }


def _topk(scaled_logits_RC: Tensor, encoding: Encoding, temperature: float) -> Columns:
    num_classes = scaled_logits_RC.shape[1]
    value_RK, index_RK = scaled_logits_RC.topk(encoding.kept(num_classes), dim=1)
    others_RC = scaled_logits_RC.double().scatter(1, index_RK, -torch.inf)
    tails = [torch.logsumexp(others_RC * (temperature / t), dim=1) for t in encoding.temperatures]
    return {
        "index": _ids(index_RK, num_classes),
        "value": _half(value_RK),
        "tail": torch.stack(tails, dim=1).float(),
    }


def _sampled(scaled_logits_RC: Tensor, encoding: Encoding, seeds_R: Tensor) -> Columns:
    """S draws from softmax(proposal * scaled logits), each with weight p / (q * S), equal ones merged into one."""
    assert encoding.samples is not None
    samples, num_classes = encoding.samples, scaled_logits_RC.shape[1]
    p_RC = torch.softmax(scaled_logits_RC.double(), dim=1)
    q_RC = torch.softmax(scaled_logits_RC.double() * (encoding.proposal or 1.0), dim=1)
    upto_RC = q_RC.cumsum(dim=1)
    at_RS = _uniform(seeds_R, samples) * upto_RC[:, -1:]
    drawn_RS = torch.searchsorted(upto_RC, at_RS, right=True).clamp_max(num_classes - 1).sort(dim=1).values
    weight_RS = (p_RC.gather(1, drawn_RS) / q_RC.gather(1, drawn_RS)) / samples
    first_RS = torch.ones_like(drawn_RS, dtype=torch.bool)
    first_RS[:, 1:] = drawn_RS[:, 1:] != drawn_RS[:, :-1]
    place_RS = first_RS.cumsum(dim=1) - 1
    merged_RS = torch.zeros_like(weight_RS).scatter_add_(1, place_RS, weight_RS)
    index_RS = torch.zeros_like(drawn_RS).scatter_(1, place_RS, drawn_RS)
    return {"index": _ids(index_RS, num_classes), "weight": merged_RS.float()}


def _uniform(seeds_R: Tensor, count: int) -> Tensor:
    """float64 (R, count) in [0, 1): SplitMix64 of (seed, position), the same on every device and in every batch."""
    step, one, two = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # as signed 64-bit numbers
    position_S = torch.arange(1, count + 1, device=seeds_R.device, dtype=torch.int64)
    state_RS = seeds_R[:, None] + position_S * step
    for shift, factor in ((30, one), (27, two)):
        state_RS = (state_RS ^ _right(state_RS, shift)) * factor
    return _right(state_RS ^ _right(state_RS, 31), 11).double() * 2.0**-53


def _right(values: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(slots=True, kw_only=True)
class FidelityMeter:
    """KL(teacher || decoded) in nats over the rows seen, at T = 1 and at the stored temperature.

    An average of probabilities does not exist at T = 1; its figure there is that of the logits which the average stands
    for at its own temperature. Sampled rows give most classes no probability: theirs is KL(decoded || teacher).
    """

    temperature: float
    encoding: Encoding = field(default_factory=Encoding)
    rows: int = 0
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    worst: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))

    def add(
        self, scaled_logits_RC: Tensor, columns: Mapping[str, Tensor], head: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Measure rows: the scaled logits before encoding and the columns that hold them."""
        if len(scaled_logits_RC):
            nats_2R = self.measure(scaled_logits_RC, columns, head)
            self.add_measured(nats_2R.cpu().numpy())

    def add_measured(self, nats_2R: NDArray[np.float64]) -> None:
        """Take in what `measure` found for some rows, in the order of the rows."""
        if nats_2R.shape[1]:
            self.rows += nats_2R.shape[1]
            self.total = self.total + nats_2R.sum(axis=1)
            self.worst = np.maximum(self.worst, nats_2R.max(axis=1))

    def measure(
        self, scaled_logits_RC: Tensor, columns: Mapping[str, Tensor], head: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Nats of each row at T = 1 and at the stored temperature: float64 (2, R), on the device. Changes nothing."""
        nats = {}
        for at in {1.0, self.temperature}:
            sharpen = self.temperature / at
            if self.encoding.name == "float32":
                nats[at] = scaled_logits_RC.new_zeros(len(scaled_logits_RC), dtype=torch.float64)
            elif self.encoding.name == "float16":
                nats[at] = _kl_rounded(scaled_logits_RC, columns["logits"], sharpen)
            else:
                decoded_RC = decode(
                    columns,
                    self.encoding,
                    num_classes=scaled_logits_RC.shape[1],
                    temperature=self.temperature,
                    at=at,
                    head=head,
                )
                teacher_RC = scaled_logits_RC.double() * sharpen
                sampled = self.encoding.name == "sampled"
                nats[at] = _kl(decoded_RC, teacher_RC) if sampled else _kl(teacher_RC, decoded_RC)
        return torch.stack([nats[1.0], nats[self.temperature]])

    def result(self) -> Fidelity | None:
        if not self.rows:
            return None
        mean_2, worst_2 = (self.total / self.rows).tolist(), self.worst.tolist()
        return Fidelity(mean_t1=mean_2[0], worst_t1=worst_2[0], mean_t=mean_2[1], worst_t=worst_2[1])


def _kl(teacher_RC: Tensor, decoded_RC: Tensor) -> Tensor:
    # The difference is of the size of float32's rounding, so float64 it is.
    log_p_RC = torch.log_softmax(teacher_RC, dim=-1)
    log_q_RC = torch.log_softmax(decoded_RC, dim=-1)
    p_RC = log_p_RC.exp()
    # A class that is masked on both sides has p = 0 and contributes nothing, where the product would be NaN.
    return torch.where(p_RC > 0, p_RC * (log_p_RC - log_q_RC), 0.0).sum(dim=-1).clamp_min(0.0)


def _kl_rounded(scaled_logits_RC: Tensor, half_RC: Tensor, sharpen: float) -> Tensor:
    """KL(softmax(sharpen * z) || softmax(sharpen * half(z))): float64 (R,), a tenth of `_kl`'s time.

    With d the rounding errors, KL = log E_p[exp d] - E_p[d] = log1p(m + g) - m, where m = E_p[d] and
    g = E_p[exp(d) - 1 - d] is a sum of positive terms: in float32 both are exact enough, and an error of m cancels.
    """
    found = []
    for z_RC, h_RC in zip(torch.split(scaled_logits_RC, _CHUNK), torch.split(half_RC, _CHUNK), strict=True):
        finite_RC = z_RC.clamp_min(_LOWEST_HALF)  # p is 0 down there, masked classes with it
        d_RC = h_RC.float().clamp_min_(_LOWEST_HALF).sub_(finite_RC)
        if sharpen != 1.0:
            d_RC.mul_(sharpen)
            finite_RC = finite_RC.mul_(sharpen)
        p_RC = torch.softmax(finite_RC, dim=-1)
        m_R = torch.linalg.vecdot(p_RC, d_RC).double()
        # |d| is at most 2**-11 of |z|, and p is 0 long before d leaves the series' range of a few hundredths.
        d_RC.clamp_(-1, 1)
        series_RC = (d_RC / 24).add_(1 / 6).mul_(d_RC).add_(0.5).mul_(d_RC).mul_(d_RC)
        g_R = torch.linalg.vecdot(p_RC, series_RC).double()
        found.append((torch.log1p(m_R + g_R) - m_R).clamp_min_(0.0))
    return torch.cat(found)
