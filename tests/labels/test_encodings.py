"""Every encoding keeps the contract of `softlabel.testing`; and what single encodings promise beyond it."""

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from softlabel.errors import MismatchError
from softlabel.labels.encodings import Reading, decode, encode
from softlabel.labels.fidelity import FidelityMeter
from softlabel.loss import TopKTarget, distillation_loss
from softlabel.store.encodings import Encoding, Float16, Float32, Head, Int8, Sampled, TopK
from softlabel.store.encodings.sampled import Draw
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import Combine, DatasetInfo, Member
from softlabel.store.strict_json import from_json, to_json
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer, write_shard
from softlabel.testing import EncodingCase, EncodingTests
from tests.support import format_reader
from tests.support.stores import FORMATS, draw_logits, make_run

T = 4.0
Columns = Mapping[str, np.ndarray[Any, Any]]


class EveryEncodingTests(EncodingTests):
    def decode(self, columns: Columns, encoding: Encoding, case: EncodingCase) -> Any:
        run = {
            "encoding": to_json(encoding),
            "num_classes": case.num_classes,
            "temperature": case.temperature,
            "combine": {"rule": "logits"},
        }
        return format_reader.decode(run, columns, case.extra)


class TestFloat32(EveryEncodingTests):
    @pytest.fixture
    def encoding(self) -> Encoding:
        return Float32()

    def bound(self, columns: Columns, encoding: Encoding, case: EncodingCase) -> Any:
        return 0.0


class TestFloat16(EveryEncodingTests):
    @pytest.fixture
    def encoding(self) -> Encoding:
        return Float16()

    def bound(self, columns: Columns, encoding: Encoding, case: EncodingCase) -> Any:
        return np.maximum(2.0**-11 * np.abs(case.scaled_logits), 2.0**-24)


class TestInt8(EveryEncodingTests):
    @pytest.fixture
    def encoding(self) -> Encoding:
        return Int8()

    def bound(self, columns: Columns, encoding: Encoding, case: EncodingCase) -> Any:
        return np.maximum(columns["scale"] * 0.5001 + 1e-5, 2.0**-11 * np.abs(case.scaled_logits))


class TestTopK(EveryEncodingTests):
    @pytest.fixture(
        params=[
            TopK(k=5, temperatures=(1.0, T)),
            TopK(k=1, temperatures=(T,)),
            TopK(k=10**6, temperatures=(T,)),
        ],
        ids=["5", "1", "all"],
    )
    def encoding(self, request: pytest.FixtureRequest) -> Encoding:
        return request.param

    def test_kept_classes_have_their_probability(self, encoding: TopK, case: EncodingCase) -> None:
        columns = {name: column.numpy() for name, column in case.encode(encoding).items()}
        index = columns["index"].astype(np.int64)
        order = np.argsort(-case.scaled_logits, axis=1, kind="stable")
        np.testing.assert_array_equal(index, order[:, : index.shape[1]])
        decoded = self.decode(columns, encoding, case)
        p, q = (torch.softmax(torch.from_numpy(x).double(), 1).numpy() for x in (case.scaled_logits, decoded))
        # Half a step of float16 at 8.
        np.testing.assert_allclose(np.take_along_axis(q, index, 1), np.take_along_axis(p, index, 1), rtol=4e-3)


class TestSampled(EveryEncodingTests):
    @pytest.fixture(
        params=[Sampled(samples=12, draw="systematic"), Sampled(samples=5, proposal=0.8, draw="independent")],
        ids=["systematic", "independent"],
    )
    def encoding(self, request: pytest.FixtureRequest) -> Encoding:
        return request.param


class TestHead(EveryEncodingTests):
    @pytest.fixture(params=[Head(width=6, hidden="float16"), Head(width=6, hidden="int8")], ids=["float16", "int8"])
    def encoding(self, request: pytest.FixtureRequest) -> Encoding:
        return request.param

    def test_decoded_logits_are_near_those_of_the_layer(self, encoding: Head, case: EncodingCase) -> None:
        columns = {name: column.numpy() for name, column in case.encode(encoding).items()}
        found = self.decode(columns, encoding, case)
        found = found - found.max(axis=1, keepdims=True)
        np.testing.assert_allclose(found, case.scaled_logits, atol=0.01 if encoding.hidden == "float16" else 0.2)


def test_topk_tails_are_exact_at_declared_temperatures() -> None:
    logits = torch.from_numpy(draw_logits(50, 200))
    scaled = logits / T
    scaled = scaled - scaled.amax(dim=1, keepdim=True)
    columns = encode(scaled, TopK(k=10, temperatures=(1.0, T, 7.5)), temperature=T)
    for place, t in enumerate((1.0, T, 7.5)):
        raw = logits.double().numpy() / t
        p = np.exp(raw - raw.max(axis=1, keepdims=True))
        left = p.sum(axis=1) - np.take_along_axis(p, columns["index"].long().numpy(), 1).sum(axis=1)
        np.testing.assert_allclose(np.exp(columns["tail"][:, place].double().numpy()), left, rtol=1e-5)


@pytest.mark.parametrize(
    "temperature", [T, T * (1 + 0.9e-6), T * (1 - 0.9e-6), T * (1 + 1.1e-6), T * (1 - 1.1e-6), 1.0]
)
def test_the_loss_knows_the_temperatures_that_the_store_knows(temperature: float) -> None:
    encoding = TopK(k=2, temperatures=(T,))
    scaled = torch.from_numpy(draw_logits(3, 7))
    columns = encode(scaled - scaled.amax(dim=1, keepdim=True), encoding, temperature=T)
    target = TopKTarget(**columns, tail_temperatures=encoding.temperatures, temperature=T, num_classes=7)
    with nullcontext() if encoding.knows(temperature) else pytest.raises(MismatchError, match="its tail is known"):
        distillation_loss(torch.zeros(3, 7), target, temperature=temperature, soft_weight=1.0, hard_weight=0.0)


def draw_points(seed: int, count: int) -> Any:
    """float64 (count,): outputs 1, 2, ... of the published SplitMix64, by the integers of Python."""
    found, limit = [], 1 << 64
    for step in range(1, count + 1):
        state = (seed + step * 0x9E3779B97F4A7C15) % limit
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % limit
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % limit
        found.append(((state ^ (state >> 31)) >> 11) * 2.0**-53)
    return np.array(found)


@pytest.mark.parametrize(("draw", "proposal"), [("independent", 0.7), ("systematic", None), ("systematic", 0.7)])
def test_draws_are_unbiased_with_the_variance_of_their_kind(draw: Draw, proposal: float | None) -> None:
    rows, classes, samples, repeats = 50, 25, 12, 20_000
    scaled_RC = torch.from_numpy(draw_logits(rows, classes)) / 1.5
    encoding = Sampled(samples=samples, proposal=proposal, draw=draw)
    p_RC = torch.softmax(scaled_RC.double(), dim=1)
    q_RC = torch.softmax(scaled_RC.double() * (proposal or 1.0), dim=1)
    part_RC = samples * q_RC % 1
    # Of S q expected draws of a class: binomial, or one of the two whole numbers beside it.
    counts_RC = samples * q_RC * (1 - q_RC) if draw == "independent" else part_RC * (1 - part_RC)
    variance_RC = (p_RC / q_RC / samples) ** 2 * counts_RC
    found = []
    for row in range(rows):
        seeds = torch.arange(repeats) * 104_729 + row
        columns = encode(scaled_RC[row].expand(repeats, -1), encoding, seeds_R=seeds)
        index, weight = columns["index"].long(), columns["weight"].double()
        mass = torch.zeros(repeats, classes, dtype=torch.float64).scatter_add_(1, index, weight)
        assert (((mass.mean(dim=0) - p_RC[row]).abs() - 1e-6) < 5 * (variance_RC[row] / repeats).sqrt()).all()
        assert ((weight > 0).sum(dim=1) == (mass > 0).sum(dim=1)).all(), "a class has two places"
        found.append(mass.var(dim=0).sum().item())
    np.testing.assert_allclose(found, variance_RC.sum(dim=1).numpy(), rtol=0.05)


def test_systematic_draws_vary_less_than_half_as_much() -> None:
    scaled_RC = torch.from_numpy(draw_logits(2000, 200))
    p_RC, seeds_R = torch.softmax(scaled_RC.double(), dim=1), torch.arange(2000)
    errors = {}
    for draw in get_args(Draw):
        columns = encode(scaled_RC, Sampled(samples=50, draw=draw), seeds_R=seeds_R)
        mass = torch.zeros_like(p_RC).scatter_add_(1, columns["index"].long(), columns["weight"].double())
        torch.testing.assert_close(mass.sum(dim=1), torch.ones(2000, dtype=torch.float64))
        errors[draw] = ((mass - p_RC) ** 2).sum().item()
    assert errors["systematic"] < errors["independent"] / 2


@pytest.mark.parametrize("draw", ["independent", "systematic"])
@pytest.mark.parametrize("samples", [1, 7, 50])
def test_a_draw_is_where_its_point_lies_on_the_sums_of_the_proposal(draw: Draw, samples: int) -> None:
    scaled_RC = torch.from_numpy(draw_logits(20, 9))
    scaled_RC[:, -1] = -torch.inf
    # The largest random number: 49 and it would round up to 50, the point at which the masked class begins.
    seeds = [*range(19), find_largest_seed()]
    columns = encode(scaled_RC, Sampled(samples=samples, draw=draw), seeds_R=torch.tensor(seeds).long())
    for row, seed in enumerate(seeds):
        points = draw_points(seed % 2**64, samples)
        if draw == "systematic":
            points = np.minimum((np.arange(samples) + points[0]) / samples, np.nextafter(1, 0))
        upto = np.cumsum(torch.softmax(scaled_RC[row].double(), dim=0).numpy())
        counts = np.histogram(points * upto[-1], bins=np.concatenate([[0], upto]))[0]
        index, weight = columns["index"][row].numpy(), columns["weight"][row].numpy()
        used = int((counts > 0).sum())
        np.testing.assert_array_equal(index[:used], np.flatnonzero(counts))
        np.testing.assert_allclose(weight[:used], counts[counts > 0] / samples, rtol=1e-6)
        assert not index[used:].any()
        assert not weight[used:].any()


def find_largest_seed() -> int:
    """The seed, as a signed number, whose first output is 2^64 - 1: SplitMix64 backwards."""
    limit, state = 1 << 64, (1 << 64) - 1
    state ^= (state >> 31) ^ (state >> 62)
    for factor, shift in ((0x94D049BB133111EB, 27), (0xBF58476D1CE4E5B9, 30)):
        state = state * pow(factor, -1, limit) % limit
        state ^= (state >> shift) ^ (state >> 2 * shift)
    seed = (state - 0x9E3779B97F4A7C15) % limit
    assert draw_points(seed, 1)[0] == 1 - 2.0**-53
    return seed - limit if seed >= limit // 2 else seed


def test_ids_reach_the_last_class_of_every_index_type() -> None:
    for classes, kind in ((256, torch.uint8), (257, torch.uint16), (65_536, torch.uint16), (65_537, torch.int32)):
        scaled = torch.full((2, classes), -3.0)
        scaled[:, classes - 1] = 0
        for encoding in (TopK(k=2, temperatures=(1.0,)), Int8()):
            columns = encode(scaled, encoding)
            index = columns["index" if encoding.name == "topk" else "top_index"]
            assert index.dtype == kind
            assert index[:, 0].long().tolist() == [classes - 1] * 2


def test_int8_stays_below_a_ten_thousandth_nat() -> None:
    """Rows like those of real ImageNet teachers: a few classes stand out, the others trail off."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(512, 1000, generator=generator) * torch.linspace(0.5, 3, 512)[:, None]
    logits[:, :5] += torch.rand(512, 5, generator=generator) * 12
    for t in (1.0, 4.0):
        scaled = logits / t - (logits / t).amax(dim=1, keepdim=True)
        meter = FidelityMeter(temperature=t, encoding=Int8())
        meter.add(scaled, encode(scaled, meter.encoding, temperature=t))
        result = meter.result()
        assert result is not None
        assert result.worst_t < 1e-4, (t, result)


@pytest.mark.parametrize("encoding", [Float32(), Float16(), Int8()], ids=lambda encoding: encoding.name)
def test_probabilities_of_extreme_and_masked_logits(encoding: Encoding) -> None:
    scaled = torch.zeros(4, 12)
    scaled[0, 1:] = -1e4
    scaled[1, 1:] = -torch.inf
    scaled[2, 5:] = -torch.inf
    scaled[3] = torch.linspace(0, -1e6, 12)
    columns = encode(scaled, encoding, temperature=T)
    decoded = decode(columns, encoding, Reading(num_classes=12, temperature=T, at=T))
    torch.testing.assert_close(torch.softmax(decoded, 1), torch.softmax(scaled.double(), 1), atol=1e-4, rtol=0)


def test_a_store_that_does_not_name_its_draws_is_of_independent_ones() -> None:
    old = {"name": "sampled", "samples": 3}
    assert from_json(Encoding, old) == Sampled(samples=3, draw="independent")
    assert to_json(Sampled(samples=3, draw="independent")) == old
    assert to_json(Sampled(samples=3, draw="systematic")) == {**old, "draw": "systematic"}


def test_encodings_that_make_no_sense_are_refused() -> None:
    for wrong, why in (
        ({"name": "topk"}, "k: missing field"),
        ({"name": "topk", "k": 0, "temperatures": [1.0]}, "k: expected at least 1, found 0"),
        ({"name": "float16", "k": 3}, "k: unknown field"),
        ({"name": "sampled"}, "samples: missing field"),
        ({"name": "sampled", "samples": 3, "proposal": 0.0}, "proposal: expected above 0"),
        ({"name": "sampled", "samples": 3, "draw": "random"}, "draw: expected one of independent, systematic"),
        ({"name": "topk", "k": 3, "temperatures": [-1.0]}, "temperatures: expected numbers above 0"),
        ({"name": "head", "width": 3, "hidden": "float64"}, "hidden: expected one of float16, int8"),
        ({"k": 3}, "name: missing field"),
        ({"name": "bf16"}, "name: expected one of float32, float16"),
    ):
        with pytest.raises(ValueError, match=why):
            from_json(Encoding, wrong)
    with pytest.raises(ValueError, match="needs 'width'"):
        make_run(encoding=Head())
    with pytest.raises(ValueError, match="needs 'draw'"):
        make_run(encoding=Sampled(samples=3))
    with pytest.raises(ValueError, match="draw: expected independent or systematic, found 'random'"):
        Sampled(samples=3, draw="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lack 4\.0"):
        make_run(encoding=TopK(k=3, temperatures=(1.0,)))
    with pytest.raises(ValueError, match="one teacher"):
        make_run(encoding=Head(width=6), combine=Combine(rule="keep"), members=(Member(spec="a", sha256="a"),) * 2)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["q", "scale", "top_index", "top_value"])
def test_wrong_values_are_found(tmp_path: Path, format: str, name: str) -> None:
    run = make_run(format, samples=20, classes=9, encoding=Int8())
    columns = {one: a.numpy() for one, a in encode(torch.randn(20, 9) - 9, run.encoding, temperature=T).items()}
    columns["top_value"] -= columns["top_value"].max(axis=1, keepdims=True)
    columns[name] = columns[name].copy()
    if name == "q":
        columns[name][3] = 1  # any byte is a value: nothing to find
    else:
        columns[name][3] = {"scale": np.nan, "top_index": 9, "top_value": np.inf}[name]
    run = dataclasses.replace(run, shard_rows=20, dataset=DatasetInfo(kind="x", rows=20, fingerprint="f"))
    with Committer.open(tmp_path / "s", run) as committer:
        rows = Rows(keys=[str(row) for row in range(20)], columns=columns)
        committer.commit(write_shard(tmp_path / "s", run, committer.missing()[0], rows))
        committer.finish()
    problems = verify_store(tmp_path / "s").problems
    assert len(problems) == (name != "q")
    assert all(f"row 3 of a block: `{name}`" in problem for problem in problems)
