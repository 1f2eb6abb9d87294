"""The losses once more, row by row in float64, written without a look at the package's own.

Slow on purpose. Every function returns a differentiable float64 number; probabilities are explicit vectors over all
classes (or over the kept classes and "the rest"), and a class without teacher mass is left out of a sum by name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from softlabel.loss import DenseTarget, HeadTarget, Int8Target, SampledTarget, TopKTarget


def log_probs(logits: Tensor) -> Tensor:
    """log softmax of one row."""
    return logits - torch.logsumexp(logits, 0)


def kl(p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats."""
    has_mass = p > 0
    return (p[has_mass] * (p[has_mass].log() - log_q[has_mass])).sum()


def teacher_logits(target: object, row: int) -> tuple[Tensor, float]:
    """(scaled logits of the row in float64, the temperature they are scaled by)."""
    if isinstance(target, Tensor):
        return target[row].double(), 1.0
    if isinstance(target, DenseTarget):
        return target.scaled_logits[row].double(), target.temperature
    if isinstance(target, Int8Target):
        values = target.q[row].double() * target.scale[row].double() + target.offset[row].double()
        for place, value in zip(target.top_index[row].tolist(), target.top_value[row].tolist(), strict=True):
            values[place] = value
        return values, target.temperature
    assert isinstance(target, HeadTarget)
    hidden = target.hidden[row].double()
    if target.hidden_scale is not None:
        hidden = hidden * target.hidden_scale[row].double()
    values = target.weight.double().mv(hidden)
    return (values if target.bias is None else values + target.bias.double()), 1.0


def teacher_probs(target: object, row: int, temperature: float) -> Tensor:
    scaled, own = teacher_logits(target, row)
    return log_probs(scaled * (own / temperature)).exp()


def soft_row(z: Tensor, target: object, row: int, temperature: float, tail: str) -> Tensor:
    """T^2 * KL(teacher || student) of one row; a sampled target's cross-entropy."""
    log_q = log_probs(z.double() / temperature)
    if isinstance(target, SampledTarget):
        value = torch.zeros((), dtype=torch.float64)
        for place, weight in zip(target.index[row].tolist(), target.weight[row].double(), strict=True):
            if weight != 0:
                value = value - weight * log_q[place]
    elif isinstance(target, TopKTarget):
        value = _top_k_row(log_q, target, row, temperature, tail)
    else:
        value = kl(teacher_probs(target, row, temperature), log_q)
    return temperature**2 * value


def _top_k_row(log_q: Tensor, target: TopKTarget, row: int, temperature: float, tail: str) -> Tensor:
    classes = log_q.shape[0]
    places = target.index[row].long()
    kept = (target.value[row].double() * target.temperature / temperature).exp()
    column = target.tail_temperatures.index(temperature)
    rest = target.tail[row, column].double().exp()
    named = set(places.tolist())
    others = torch.tensor(sorted(set(range(classes)) - named), dtype=torch.long)
    if tail == "renormalize" or len(others) == 0:
        return kl(kept / kept.sum(), log_q[places])
    whole = kept.sum() + rest
    if tail == "ghost":
        log_q_rest = torch.logsumexp(log_q[others], 0)
        return kl(torch.cat([kept, rest[None]]) / whole, torch.cat([log_q[places], log_q_rest[None]]))
    p = torch.zeros(classes, dtype=torch.float64)
    p[places] = kept / whole
    p[others] = rest / whole / len(others)
    return kl(p, log_q)


def hard_row(z: Tensor, label: int, smoothing: float) -> Tensor:
    return F.cross_entropy(z.double()[None], torch.tensor([label]), label_smoothing=smoothing)


def distillation(
    logits: Tensor,
    target: object,
    labels: Tensor | None,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    soft_mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    tail: str = "ghost",
) -> Tensor:
    """The whole loss: weighted mean over rows with a target, plus weighted mean over labelled rows."""
    terms: list[list[Tensor]] = [[], []]
    masses = [[0.0], [0.0]]
    for row, z in enumerate(logits.unbind(0)):
        w = 1.0 if weight is None else float(weight[row])
        nothing = torch.zeros((), dtype=torch.float64)
        has_soft = soft_weight != 0 and w != 0 and (soft_mask is None or bool(soft_mask[row]))
        has_hard = hard_weight != 0 and w != 0 and labels is not None and int(labels[row]) != ignore_index
        terms[0].append(w * soft_row(z, target, row, temperature, tail) if has_soft else nothing)
        terms[1].append(
            w * hard_row(z, int(labels[row]), label_smoothing) if has_hard and labels is not None else nothing
        )
        masses[0].append(w * has_soft)
        masses[1].append(w * has_hard)
    per_row = [torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64) for rows in terms]
    if reduction == "none":
        return soft_weight * per_row[0] + hard_weight * per_row[1]
    sums = [rows.sum() for rows in per_row]
    if reduction == "mean":
        sums = [total / (sum(mass) or 1.0) for total, mass in zip(sums, masses, strict=True)]
    return soft_weight * sums[0] + hard_weight * sums[1]


def soft_cross_entropy_row(z: Tensor, p: Tensor, temperature: float) -> Tensor:
    return -(temperature**2) * (p * log_probs(z.double() / temperature)).sum()


def reverse_kl_row(z: Tensor, p: Tensor, temperature: float) -> Tensor:
    q = log_probs(z.double() / temperature).exp()
    return temperature**2 * kl(q, p.log())


def jensen_shannon_row(z: Tensor, p: Tensor, temperature: float, beta: float) -> Tensor:
    q = log_probs(z.double() / temperature).exp()
    mixture = beta * p + (1 - beta) * q
    return temperature**2 * (beta * kl(p, mixture.log()) + (1 - beta) * kl(q, mixture.log()))


def dkd_row(z: Tensor, t: Tensor, label: int, temperature: float, target_weight: float, others_weight: float) -> Tensor:
    """Zhao et al. 2022, equations 4 to 7: binary target / not target, and the other classes among themselves."""
    p, q = torch.softmax(t.double() / temperature, 0), torch.softmax(z.double() / temperature, 0)
    rest = [c for c in range(len(z)) if c != label]
    tckd = kl(torch.stack([p[label], p[rest].sum()]), torch.stack([q[label], q[rest].sum()]).log())
    nckd = kl(p[rest] / p[rest].sum(), (q[rest] / q[rest].sum()).log())
    return temperature**2 * (target_weight * tckd + others_weight * nckd)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def dist(z: Tensor, t: Tensor, temperature: float, inter: float, intra: float) -> Tensor:
    """Huang et al. 2022: 1 - correlation of each row, and of each class over the batch, of the probabilities."""
    q, p = torch.softmax(z.double() / temperature, 1), torch.softmax(t.double() / temperature, 1)
    rows = sum(1 - pearson(q[i], p[i]) for i in range(len(q))) / len(q)
    columns = sum(1 - pearson(q[:, c], p[:, c]) for c in range(q.shape[1])) / q.shape[1]
    return temperature**2 * (inter * rows + intra * columns)


def standardized(logits: Tensor) -> Tensor:
    """Sun et al. 2024: zero mean and unit deviation of each row, with the 1e-7 of the authors' code."""
    rows = [(row - row.mean()) / (1e-7 + row.std()) for row in logits.double()]
    return torch.stack(rows)
