"""topk on the teacher's side.

R rows, C classes, K kept classes.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from softlabel.labels.encodings.base import Answers, Coder, Reading, to_half, to_ids
from softlabel.store.encodings import TopK
from softlabel.store.encodings.base import find_temperature

# Numbers at a time, so that what is between two steps stays in a core's cache, and elsewhere fits the memory.
_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}
_LEAST = -1e5  # exp of it is 0


def encode(encoding: TopK, answers: Answers) -> dict[str, Tensor]:
    scaled_logits_RC = answers.scaled_logits
    num_classes = scaled_logits_RC.shape[1]
    value_RK, index_RK = scaled_logits_RC.topk(encoding.kept(num_classes), dim=1)
    tails = []
    for rows in _cut(scaled_logits_RC):
        others_RC = scaled_logits_RC[rows].double().scatter_(1, index_RK[rows], -torch.inf)
        sums = [torch.logsumexp(others_RC * (answers.temperature / t), dim=1) for t in encoding.temperatures]
        tails.append(torch.stack(sums, dim=1).float())
    return {
        "index": to_ids(index_RK, num_classes),
        "value": to_half(value_RK),
        "tail": torch.cat(tails),
    }


def decode(encoding: TopK, columns: Mapping[str, Tensor], reading: Reading) -> Tensor:
    value_RK, even_R1 = _read(encoding, columns, reading)
    return even_R1.repeat(1, reading.num_classes).scatter_(1, columns["index"].long(), value_RK)


def measure_kept(encoding: TopK, scaled_logits_RC: Tensor, columns: Mapping[str, Tensor], reading: Reading) -> Tensor:
    """KL(teacher || decoded) in nats, float64 (R,), in a fraction of the time that decoding takes.

    With p the teacher, and v and r what is read of the kept classes and of each other one, it is
    E_p[log p] - (sum over the kept p v + (1 - sum over the kept p) r) + log of the sum of exponentials of v and r.
    """
    value_RK, even_R1 = _read(encoding, columns, reading)
    others = reading.num_classes - value_RK.shape[1]
    found = []
    for rows in _cut(scaled_logits_RC):
        v_RK, r_R1 = value_RK[rows], even_R1[rows]
        t_RC = scaled_logits_RC[rows].double().mul_(reading.factor)
        log_p_RC = torch.log_softmax(t_RC, dim=1)
        p_RK = log_p_RC.gather(1, columns["index"][rows].long()).exp_()
        p_RC = torch.exp(log_p_RC, out=t_RC)
        # A masked class has p = 0, whose product with -inf would be NaN.
        own_R1 = torch.linalg.vecdot(p_RC, log_p_RC.clamp_min_(_LEAST))[:, None]
        read_R1 = torch.where(p_RK > 0, p_RK * v_RK, 0.0).sum(dim=1, keepdim=True)
        whole_R1 = torch.logsumexp(v_RK, dim=1, keepdim=True)
        if others:
            rest_R1 = (1.0 - p_RK.sum(dim=1, keepdim=True)).clamp_min_(0.0)
            # Where all others are masked, the rest is a rounding error.
            read_R1 += torch.where(r_R1 > -torch.inf, rest_R1 * r_R1, 0.0)
            whole_R1 = torch.logaddexp(whole_R1, r_R1 + math.log(others))
        found.append((own_R1 - read_R1 + whole_R1).clamp_min_(0.0)[:, 0])
    return torch.cat(found)


def _cut(scaled_logits_RC: Tensor) -> Iterator[slice]:
    rows, classes = scaled_logits_RC.shape
    step = max(1, _CHUNK[scaled_logits_RC.device.type] // classes)
    for start in range(0, max(1, rows), step):
        yield slice(start, start + step)


def _read(encoding: TopK, columns: Mapping[str, Tensor], reading: Reading) -> tuple[Tensor, Tensor]:
    """Logits at `reading.at`, float64: of the kept classes (R, K), and of each of the others (R, 1)."""
    place, factor = find_temperature(encoding.temperatures, reading.at), 1.0
    if place is None:  # the tail is taken from the store's temperature there, as if it were one class
        place, factor = find_temperature(encoding.temperatures, reading.temperature), reading.factor
    assert place is not None, reading
    left_out = max(1, reading.num_classes - encoding.kept(reading.num_classes))
    even_R1 = (columns["tail"][:, place : place + 1].double() - math.log(left_out)) * factor
    value_RK = columns["value"].double() * reading.factor
    return value_RK, even_R1


CODER = Coder(encode=encode, decode=decode, nats=measure_kept)
