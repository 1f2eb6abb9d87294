"""Every encoding, in every format: what is read is what was encoded, within the bound that the encoding states."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from softlabel.errors import StoreError
from softlabel.labels.encodings import Reading, encode
from softlabel.labels.encodings import decode as torch_decode
from softlabel.labels.fidelity import FidelityMeter
from softlabel.store.encodings import Encoding, Float16, Float32, Head, Int8, Sampled, TopK
from softlabel.store.formats.base import Rows
from softlabel.store.manifest import Combine, DatasetInfo, Member, Run
from softlabel.store.open import open_store
from softlabel.store.strict_json import from_json
from softlabel.store.verify import verify_store
from softlabel.store.writer import Committer, write_shard
from tests.support import format_reader
from tests.support.stores import FORMATS, make_run

T = 4.0
ENCODINGS = (
    Float32(),
    Float16(),
    Int8(),
    TopK(k=5, temperatures=(1.0, T)),
    TopK(k=1, temperatures=(T,)),
    TopK(k=10**6, temperatures=(T,)),
    Sampled(samples=12),
    Sampled(samples=5, proposal=0.8),
    Head(width=6, hidden="float16"),
    Head(width=6, hidden="int8"),
)
NAMES = [" ".join([e.title, getattr(e, "hidden", "")]).strip() for e in ENCODINGS]


def teacher(rows: int, classes: int, members: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=generator) * 2
    weight, bias = torch.randn(classes, 6, generator=generator), torch.randn(classes, generator=generator)
    logits = torch.randn(rows * members, classes, generator=generator) * 4
    return {"hidden": hidden, "weight": weight, "bias": bias, "logits": logits}


def write(root: Path, run: Run, said: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Encode and write; the columns as encoded."""
    hidden = run.encoding.from_hidden
    scaled = (said["hidden"] @ said["weight"].T + said["bias"] if hidden else said["logits"]) / T
    scaled = scaled - scaled.amax(dim=1, keepdim=True)
    seeds = torch.arange(len(scaled)) * 7919
    columns = encode(scaled, run.encoding, temperature=T, seeds_R=seeds, hidden_RD=said["hidden"])
    stored = {name: column.reshape(run.dataset.rows, -1).numpy() for name, column in columns.items()}
    meter = FidelityMeter(temperature=T, encoding=run.encoding)
    meter.add(scaled, columns, head=(said["weight"], said["bias"]))
    with Committer.open(root, run) as committer:
        if hidden:
            with pytest.raises(StoreError):
                committer.finish()
            arrays = {"weight": said["weight"].numpy(), "bias": said["bias"].numpy()}
            committer.add_extra("head", safetensors.numpy.save(arrays))
        for plan in committer.missing():
            part = slice(plan.start, plan.stop)
            rows = Rows(
                keys=[f"{index}.jpg" for index in range(plan.start, plan.stop)],
                columns={name: column[part] for name, column in stored.items()},
            )
            committer.commit(write_shard(root, run, plan, rows, fidelity=meter.result()))
        committer.finish()
    return {**columns, "scaled": scaled}


def bound(encoding: Encoding, scaled: np.ndarray[Any, Any], columns: dict[str, torch.Tensor]) -> Any:
    """How far a decoded logit may lie from the true one, by what the encoding says of itself."""
    match encoding.name:
        case "float32":
            return 0.0
        case "float16":
            return np.maximum(2.0**-11 * np.abs(scaled), 2.0**-24)
        case "int8":
            return np.maximum(columns["scale"].numpy() * 0.5001 + 1e-5, 2.0**-11 * np.abs(scaled))
    raise AssertionError


def kl(p_logits: np.ndarray[Any, Any], q_logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    p_logits, q_logits = p_logits.astype(np.float64), q_logits.astype(np.float64)
    log_p = p_logits - np.log(np.exp(p_logits).sum(axis=1, keepdims=True))
    log_q = q_logits - np.log(np.exp(q_logits).sum(axis=1, keepdims=True))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=NAMES)
@pytest.mark.parametrize("classes", [7, 300])
def test_what_was_encoded_is_what_is_read(tmp_path: Path, format: str, encoding: Encoding, classes: int) -> None:
    run = make_run(format, samples=40, classes=classes, encoding=encoding)
    columns = write(tmp_path / "s", run, teacher(40, classes))
    scaled = columns.pop("scaled")
    store = open_store(tmp_path / "s", verify="full")
    rows = store.take(range(40))
    for name, column in columns.items():
        np.testing.assert_array_equal(rows.columns[name], column.reshape(40, -1).numpy())
        assert rows.columns[name].dtype == column.numpy().dtype
    found = rows.scaled_logits
    streamed = np.concatenate([part.scaled_logits for part in store.stream()])
    np.testing.assert_array_equal(found, streamed)
    said = teacher(40, classes)
    by_torch = torch_decode(
        columns, encoding, Reading(num_classes=classes, temperature=T, at=T, head=(said["weight"], said["bias"]))
    ).numpy()
    np.testing.assert_allclose(found, by_torch, rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(format_reader.read_store(tmp_path / "s")["scaled_logits"], found, rtol=1e-6, atol=1e-6)

    true = scaled.numpy()
    if encoding.name in ("float32", "float16", "int8"):
        assert (np.abs(found - true) <= bound(encoding, true, columns)).all()
    elif encoding.name == "head":
        np.testing.assert_allclose(
            found - found.max(axis=1, keepdims=True), true, atol=0.01 if encoding.hidden == "float16" else 0.2
        )
    elif encoding.name == "topk":
        p = np.exp(true.astype(np.float64))
        p /= p.sum(axis=1, keepdims=True)
        q = np.exp(found.astype(np.float64))
        q /= q.sum(axis=1, keepdims=True)
        index = rows.columns["index"].astype(np.int64)
        assert (index == np.argsort(-true, axis=1, kind="stable")[:, : index.shape[1]]).all()
        np.testing.assert_allclose(
            np.take_along_axis(q, index, 1), np.take_along_axis(p, index, 1), rtol=4e-3
        )  # half a float16 step at 8
    totals = store.manifest.totals.fidelity
    assert totals is not None
    if encoding.name not in ("sampled",):
        nats = kl(true, found)
        assert totals.worst_t == pytest.approx(nats.max(), rel=0.02, abs=1e-9)
        assert totals.mean_t == pytest.approx(nats.mean(), rel=0.02, abs=1e-9)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("encoding", ENCODINGS[:8], ids=NAMES[:8])
def test_members_kept_apart(tmp_path: Path, format: str, encoding: Encoding) -> None:
    members = tuple(Member(spec=f"zoo:resnet{depth}", sha256=str(depth), num_classes=9) for depth in (8, 20, 56))
    run = make_run(format, samples=20, classes=9, encoding=encoding, members=members, combine=Combine(rule="keep"))
    columns = write(tmp_path / "s", run, teacher(20, 9, members=3))
    columns.pop("scaled")
    found = open_store(tmp_path / "s", verify="full").take(range(20)).scaled_logits
    assert found.shape == (20, 3, 9)
    by_torch = torch_decode(columns, encoding, Reading(num_classes=9, temperature=T, at=T)).reshape(20, 3, 9).numpy()
    np.testing.assert_allclose(found, by_torch, rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(format_reader.read_store(tmp_path / "s")["scaled_logits"], found, rtol=1e-6, atol=1e-6)


def test_topk_tails_are_exact_at_declared_temperatures() -> None:
    logits = teacher(50, 200)["logits"]
    scaled = logits / T
    scaled = scaled - scaled.amax(dim=1, keepdim=True)
    columns = encode(scaled, TopK(k=10, temperatures=(1.0, T, 7.5)), temperature=T)
    for place, t in enumerate((1.0, T, 7.5)):
        raw = logits.double().numpy() / t
        p = np.exp(raw - raw.max(axis=1, keepdims=True))
        left = p.sum(axis=1) - np.take_along_axis(p, columns["index"].long().numpy(), 1).sum(axis=1)
        np.testing.assert_allclose(np.exp(columns["tail"][:, place].double().numpy()), left, rtol=1e-5)


def test_sampling_is_unbiased_and_follows_from_the_seed_alone() -> None:
    scaled = teacher(3, 30)["logits"] / T
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


def test_extreme_and_masked_logits() -> None:
    scaled = torch.zeros(4, 12)
    scaled[0, 1:] = -1e4
    scaled[1, 1:] = -torch.inf
    scaled[2, 5:] = -torch.inf
    scaled[3] = torch.linspace(0, -1e6, 12)
    for encoding in ENCODINGS[:8]:
        columns = encode(scaled, encoding, temperature=T, seeds_R=torch.arange(4))
        decoded = torch_decode(columns, encoding, Reading(num_classes=12, temperature=T, at=T))
        assert not decoded.isnan().any()
        assert not (decoded == torch.inf).any()
        p, q = torch.softmax(scaled.double(), 1), torch.softmax(decoded, 1)
        if encoding.name in ("float32", "float16", "int8"):
            torch.testing.assert_close(q, p, atol=1e-4, rtol=0)


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
        make_run(encoding=ENCODINGS[8], combine=Combine(rule="keep"), members=(Member(spec="a", sha256="a"),) * 2)


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
