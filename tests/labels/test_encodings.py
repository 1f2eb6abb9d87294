"""Every encoding keeps the contract of `softlabel.testing`; and what single encodings promise beyond it."""

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabel.errors import MismatchError
from softlabel.labels.encodings import Reading, decode, encode
from softlabel.labels.fidelity import FidelityMeter
from softlabel.loss import TopKTarget, distillation_loss
from softlabel.store.encodings import Encoding, Float16, Float32, Head, Int8, Sampled, TopK
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
    @pytest.fixture(params=[Sampled(samples=12), Sampled(samples=5, proposal=0.8)], ids=["teacher", "flatter"])
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


def test_sampling_is_unbiased_and_follows_from_the_seed_alone() -> None:
    scaled = torch.from_numpy(draw_logits(3, 30)) / T
    scaled = scaled - scaled.amax(dim=1, keepdim=True)
    p = torch.softmax(scaled.double(), dim=1).numpy()
    for proposal in (None, 0.7):
        encoding = Sampled(samples=20, proposal=proposal)
        repeats = 4000
        seeds = torch.arange(3 * repeats) * 104_729
        columns = encode(scaled.repeat(repeats, 1), encoding, seeds_R=seeds)
        mass = torch.zeros(3 * repeats, 30).scatter_add_(1, columns["index"].long(), columns["weight"])
        mean = mass.reshape(repeats, 3, 30).double().mean(dim=0).numpy()
        # Five standard errors of a mean of 80,000 draws.
        assert (np.abs(mean - p) < 5 * np.sqrt(p / (20 * repeats)) * 1.5 + 1e-6).all()
        assert all(
            len(set(row[w > 0].tolist())) == int((w > 0).sum())
            for row, w in zip(columns["index"].long()[:50], columns["weight"][:50], strict=True)
        )
        alone = encode(scaled[1:2], encoding, seeds_R=seeds[4:5])
        for name in alone:
            assert torch.equal(alone[name][0], columns[name][4])


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


def test_encodings_that_make_no_sense_are_refused() -> None:
    for wrong, why in (
        ({"name": "topk"}, "k: missing field"),
        ({"name": "topk", "k": 0, "temperatures": [1.0]}, "k: expected at least 1, found 0"),
        ({"name": "float16", "k": 3}, "k: unknown field"),
        ({"name": "sampled"}, "samples: missing field"),
        ({"name": "sampled", "samples": 3, "proposal": 0.0}, "proposal: expected above 0"),
        ({"name": "topk", "k": 3, "temperatures": [-1.0]}, "temperatures: expected numbers above 0"),
        ({"name": "head", "width": 3, "hidden": "float64"}, "hidden: expected one of float16, int8"),
        ({"k": 3}, "name: missing field"),
        ({"name": "bf16"}, "name: expected one of float32, float16"),
    ):
        with pytest.raises(ValueError, match=why):
            from_json(Encoding, wrong)
    with pytest.raises(ValueError, match="needs 'width'"):
        make_run(encoding=Head())
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
