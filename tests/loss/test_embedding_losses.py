"""The losses on embeddings against float64 references, written from the papers' formulas with loops over rows."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from softlabel.errors import MismatchError, UsageError
from softlabel.loss.embeddings import attention_transfer, cosine_distance, embedding_mse, simple_recipe
from softlabel.loss.relations import (
    contrast,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    relational_kd,
    similarity_preserving,
)

Loss = Callable[..., Tensor]
ROWS = 9


def smooth_l1(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, 0.5 * x * x, x.abs() - 0.5)


def cosine_reference(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([1 - a @ b / (a.norm() * b.norm()) for a, b in zip(s, t, strict=True)]).mean()


def mse_reference(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([(a - b) ** 2 for a, b in zip(s, t, strict=True)]).mean()


def srd_reference(s: Tensor, t: Tensor) -> Tensor:
    norm = torch.nn.BatchNorm1d(s.shape[1], eps=1e-4, affine=False, dtype=s.dtype)
    return (norm(s) - norm(t)).abs().pow(4).sum().log()


def attention_reference(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([(a / a.norm() - b / b.norm()) ** 2 for a, b in zip(s, t, strict=True)]).mean()


def distance_reference(s: Tensor, t: Tensor) -> Tensor:
    def distances(x: Tensor) -> Tensor:
        pairs = list(itertools.product(range(len(x)), repeat=2))
        apart = torch.stack([x.new_zeros(()) if i == j else (x[i] - x[j]).norm() for i, j in pairs])
        return apart / (apart.sum() / (len(x) * (len(x) - 1)))

    return smooth_l1(distances(s) - distances(t)).mean()


def angle_reference(s: Tensor, t: Tensor) -> Tensor:
    def cosine(x: Tensor, i: int, j: int, k: int) -> Tensor:
        if i in (j, k):
            return x.new_zeros(())
        a, b = x[j] - x[i], x[k] - x[i]
        return a @ b / (a.norm() * b.norm())

    triplets = list(itertools.product(range(len(s)), repeat=3))
    return torch.stack([smooth_l1(cosine(s, *at) - cosine(t, *at)) for at in triplets]).mean()


def pkt_reference(s: Tensor, t: Tensor) -> Tensor:
    def shares(x: Tensor) -> Tensor:
        kernel = torch.stack([torch.stack([(a @ b / (a.norm() * b.norm()) + 1) / 2 for b in x]) for a in x])
        return torch.stack([row / row.sum() for row in kernel])

    p, q = shares(t), shares(s)
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


def sp_reference(s: Tensor, t: Tensor) -> Tensor:
    def rows(x: Tensor) -> Tensor:
        gram = torch.stack([torch.stack([a @ b for b in x]) for a in x])
        return torch.stack([row / row.norm() for row in gram])

    return ((rows(s) - rows(t)) ** 2).sum() / len(s) ** 2


def rkd_reference(s: Tensor, t: Tensor) -> Tensor:
    return 25 * distance_reference(s, t) + 50 * angle_reference(s, t)


ROW_BY_ROW: dict[str, tuple[Loss, Loss]] = {
    "cosine": (cosine_distance, cosine_reference),
    "mse": (embedding_mse, mse_reference),
    "srd": (simple_recipe, srd_reference),
    "at": (attention_transfer, attention_reference),
}
RELATIONS: dict[str, tuple[Loss, Loss]] = {
    "distance": (relational_distance, distance_reference),
    "angle": (relational_angle, angle_reference),
    "rkd": (relational_kd, rkd_reference),
    "pkt": (probabilistic_transfer, pkt_reference),
    "sp": (similarity_preserving, sp_reference),
}
LOSSES = {**ROW_BY_ROW, **RELATIONS}


def embeddings(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Of student and teacher; those of relations have widths of their own."""
    generator = torch.Generator().manual_seed(3)
    width = 4 if name in ROW_BY_ROW else 13
    s, t = torch.randn(ROWS, 4, generator=generator) + 0.3, torch.randn(ROWS, width, generator=generator)
    return s.to(dtype).requires_grad_(), t.to(dtype)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula(name: str, dtype: torch.dtype, masked: bool) -> None:
    """In value and gradient; the rows that a mask leaves out hold NaN."""
    loss, reference = LOSSES[name]
    s, t = embeddings(name, dtype)
    mask = None
    rows = torch.arange(ROWS)
    if masked:
        mask = (torch.arange(ROWS) % 4 != 1).clone()
        rows = rows[mask]
        with torch.no_grad():
            s[~mask], t[~mask] = torch.nan, torch.nan
    exact = s.detach().double()[rows].requires_grad_()
    expected = reference(exact, t.double()[rows])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # in which products of matrices would be rounded
        found = loss(s, t, mask=mask)
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.double(), expected.detach(), rtol=bound, atol=bound)
    (found * 1.5).backward()
    (expected * 1.5).backward()
    grad, wanted = s.grad.double()[rows], exact.grad
    bound = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1.7e-2}[dtype]
    torch.testing.assert_close(grad, wanted, rtol=0, atol=bound * float(wanted.abs().max()))
    if mask is not None:
        assert (s.grad[~mask] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    s, t = embeddings(name)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name][0](x, t), (s,))


@pytest.mark.parametrize("name", LOSSES)
def test_equal_embeddings_have_no_loss(name: str) -> None:
    s, _ = embeddings(name)
    if name == "srd":
        assert LOSSES[name][0](s, s.detach()) == -math.inf  # the logarithm of no distance at all
        return
    found = LOSSES[name][0](s, s.detach())
    found.backward()
    assert abs(float(found.detach())) < 1e-12
    assert s.grad.abs().max() < 1e-6


def test_worked_examples() -> None:
    """Two and three points whose loss can be computed by hand."""
    s, t = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[4.0, 3.0], [1.0, 0.0]])
    assert float(cosine_distance(s, t)) == pytest.approx(((1 - 24 / 25) + 1) / 2)
    assert float(embedding_mse(s, t)) == pytest.approx((1 + 1 + 1 + 4) / 4)
    # Standardised, two rows are +1 and -1 in every dimension, here of opposite signs in the second.
    s, t = torch.tensor([[1.0, 5.0], [-1.0, 1.0]]), torch.tensor([[8.0, -3.0], [2.0, 3.0]])
    assert float(simple_recipe(s, t, eps=0.0)) == pytest.approx(math.log(2 * 2**4))
    assert float(attention_transfer(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 7.0]]))) == pytest.approx(0.2)
    # The student's points on a line at 0, 1 and 3, the teacher's in a triangle of 3, 4 and 5.
    s, t = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    apart = [1 / 2 - 3 / 4, 3 / 2 - 4 / 4, 2 / 2 - 5 / 4]
    assert float(relational_distance(s, t)) == pytest.approx(2 * sum(0.5 * x * x for x in apart) / 9)
    # Cosines at the three points: of the line 1, -1 and 1; of the triangle 0, 3/5 and 4/5.
    loss = [0.5 * 1**2, 1.6 - 0.5, 0.5 * 0.2**2]
    assert float(relational_angle(s, t)) == pytest.approx(2 * sum(loss) / 27)
    # Of two rows at right angles the kernel is (1, 1/2), of two equal ones (1, 1).
    right, equal = torch.eye(2), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    kl = 0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))
    assert float(probabilistic_transfer(right, equal)) == pytest.approx(2 * kl / 4, rel=1e-5)
    # Rows of the Gram matrices, normalised: (1, 0) and (0, 1); (1, 2) / sqrt(5) twice.
    a, b = 1 / math.sqrt(5), 2 / math.sqrt(5)
    assert float(similarity_preserving(right, equal)) == pytest.approx(
        ((1 - a) ** 2 + b * b + a * a + (1 - b) ** 2) / 4
    )


def test_relations_do_not_change_with_how_embeddings_lie() -> None:
    """Moving, turning and scaling a student's embedding changes neither its distances nor its angles."""
    s, t = embeddings("rkd")
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(relational_kd(3 * s @ turn + 5, t), relational_kd(s, t))


def test_equal_rows_have_no_direction() -> None:
    """Their distance and their cosines are 0, and their gradient is finite."""
    s, t = embeddings("rkd", torch.float32)
    s = s.detach()
    s[3] = s[7] = s[1]
    s.requires_grad_()
    relational_kd(s, t).backward()
    assert s.grad.isfinite().all()
    assert s.grad.abs().max() < 100


def test_triplets_of_groups() -> None:
    """Those of 4, 4 and 1 rows: the mean over all triplets that there are."""
    s, t = embeddings("angle")
    parts = [(angle_reference(s[part], t[part]), len(s[part])) for part in (slice(0, 4), slice(4, 8), slice(8, 9))]
    expected = sum(loss * rows**3 for loss, rows in parts) / sum(rows**3 for _, rows in parts)
    torch.testing.assert_close(relational_angle(s, t, triplet_rows=4), expected)


def test_memory_of_angles_is_bounded() -> None:
    """At B = 256, D = 512 both networks' differences of all pairs would be 268 MB, and B^3 cosines 67 MB."""
    held: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = func(*args, **(kwargs or {}))
            held.extend(one.nbytes for one in (found if isinstance(found, tuple) else (found,)) if torch.is_tensor(one))
            return found

    s, t = torch.randn(256, 512, requires_grad=True), torch.randn(256, 512)
    with Watch():
        relational_angle(s, t).backward()
    assert max(held) < 8e6


def contrast_reference(a: Tensor, p: Tensor, n: Tensor, counts: Tensor, samples: int, z: float | None) -> Tensor:
    """Equation 18, anchor by anchor, with the normalisation of the authors' code."""
    h = {}
    for i in range(len(a)):
        h[i] = [torch.exp(a[i] @ p[i] / 0.07)], [torch.exp(a[i] @ n[k] / 0.07) for k in range(len(n)) if counts[i, k]]
    if z is None:
        z = samples * float(torch.stack([x for near, far in h.values() for x in (*near, *far)]).mean().detach())
    total = a.new_zeros(())
    for near, far in h.values():
        noise = len(far) / samples
        total = total - (near[0] / z / (near[0] / z + noise)).log()
        total = total - sum((noise / (x / z + noise)).log() for x in far)
    return total / len(a)


@pytest.mark.parametrize("z", [None, 40.0])
def test_contrast_equals_the_formula(z: float | None) -> None:
    a, p, n = (torch.nn.functional.normalize(torch.randn(rows, 6, dtype=torch.float64)) for rows in (5, 5, 8))
    a.requires_grad_()
    counts = torch.rand(5, 8) < 0.7
    scale = None if z is None else torch.tensor(z, dtype=torch.float64)
    found, _ = contrast(a, p, n, samples=50, scale=scale, counts_BK=counts)
    torch.testing.assert_close(found, contrast_reference(a, p, n, counts, 50, z))
    fixed = torch.tensor(40.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: contrast(x, p, n, samples=50, scale=fixed, counts_BK=counts)[0], (a,))
    chosen = torch.tensor([True, False, True, True, False])
    with torch.no_grad():
        masked, _ = contrast(a, p, n, samples=50, scale=scale, counts_BK=counts, mask=chosen)
        torch.testing.assert_close(
            masked, contrast_reference(a[chosen], p[chosen], n, counts[chosen], 50, z), rtol=1e-9, atol=1e-9
        )


def test_shared_negatives_estimate_what_own_ones_do() -> None:
    """The mean over draws that a batch shares is the one over draws for each anchor."""
    generator = torch.Generator().manual_seed(0)
    a, bank = (torch.nn.functional.normalize(torch.randn(rows, 6, generator=generator)) for rows in (4, 300))
    p, scale = bank[:4], torch.tensor(900.0)
    shared, own = [], []
    for _ in range(400):
        shared.append(contrast(a, p, bank[torch.randint(300, (16,), generator=generator)], samples=300, scale=scale)[0])
        for i in range(4):
            n = bank[torch.randint(300, (16,), generator=generator)]
            own.append(contrast(a[i : i + 1], p[i : i + 1], n, samples=300, scale=scale)[0])
    one, other = torch.stack(shared), torch.stack(own)
    spread = math.sqrt(float(one.var()) / len(one) + float(other.var()) / len(other))
    assert abs(float(one.mean() - other.mean())) < 4 * spread


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "srd"])
def test_rows_that_are_not_there_cost_nothing(name: str) -> None:
    s, t = embeddings(name)
    found = LOSSES[name][0](s, t, mask=torch.zeros(ROWS, dtype=torch.bool))
    found.backward()
    assert float(found.detach()) == 0
    assert (s.grad == 0).all()


def test_mistakes_are_named() -> None:
    s, t = embeddings("cosine")
    with pytest.raises(MismatchError, match="expected the teacher's width 3, found 4"):
        cosine_distance(s, t[:, :3])
    with pytest.raises(MismatchError, match=r"expected \(B, D\)"):
        relational_kd(s, t[:5])
    with pytest.raises(MismatchError, match="mask: expected bool"):
        similarity_preserving(s, t, mask=torch.ones(ROWS))
    with pytest.raises(UsageError, match="at least 2 rows"):
        simple_recipe(s[:1], t[:1])
    with pytest.raises(UsageError, match="triplet_rows"):
        relational_kd(s, t, triplet_rows=2)
    with pytest.raises(UsageError, match="temperature: expected at least"):
        contrast(s, t, t, samples=3, temperature=0.01)
    with pytest.raises(MismatchError, match="contrast"):
        contrast(s, t, t[:, :2], samples=3)
