"""Teachers computed as graphs: the labels of the plain network within rounding, and one choice for a store."""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import softlabel
from softlabel.errors import UsageError
from softlabel.models import weights_sha256
from tests.support.commands import run_softlabel
from tests.support.datasets import CLASSES, write_dataset
from tests.support.processes import start_softlabel
from tests.support.teachers import write_teacher

ROWS = 90
HERE = "python:tests.generation.test_optimize"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
ENGINES = ["folded", pytest.param("compiled", marks=needs_compiler)]


class Block(nn.Module):
    """Convolutions with and without bias before a batch norm, one whose answer is used twice, and a branch on the
    shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding="same"), nn.BatchNorm2d(8, affine=False)
        self.third, self.third_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.norm_first = nn.BatchNorm2d(8)
        self.last = nn.Linear(8, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        if x.shape[-1] > 4:
            x = x + self.second_norm(self.second(self.norm_first(x)))
        answer = self.third(x)
        pooled = (self.third_norm(answer) * answer.sigmoid()).mean(dim=(2, 3))
        return self.last(pooled) * 8


def block() -> nn.Module:
    """A network with batch norms that have statistics."""
    generator = torch.Generator().manual_seed(0)
    model = Block()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
                norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return model


class Deciding(nn.Module):
    """What it computes depends on its input's values: no graph."""

    num_classes = len(CLASSES)

    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return logits if float(logits.mean()) > 0 else logits - 1


def deciding() -> nn.Module:
    return Deciding()


BLOCK, DECIDING = (f"{HERE}:{name}?resize=32&crop=32" for name in ("block", "deciding"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "images.parquet", ROWS)


def label(data: Path, out: Path, *teachers: str, **options: Any) -> Path:
    options = {"batch_size": 32, "temperature": 1.0, "progress": False, "shard_rows": 32, **options}
    softlabel.generate(data, teachers=teachers, out=out, **options)
    return out


def rows(store: Path) -> np.ndarray[Any, Any]:
    with softlabel.open_store(store, verify="full") as opened:
        found = opened.take(np.arange(len(opened)))
        return np.array(found.scaled_logits, dtype=np.float32)


def files(store: Path) -> set[str]:
    """Names of the shards, which contain their content's hash."""
    return {path.name for path in (store / "shards").glob("*.parquet")}


def recorded(store: Path) -> Any:
    return json.loads((store / "manifest.json").read_text())["recorded"].get("optimized")


@pytest.fixture(scope="module")
def eager(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label(images, tmp_path_factory.mktemp("eager") / "store", BLOCK)


@pytest.mark.parametrize("engine", ENGINES)
def test_labels_are_those_of_the_plain_network(engine: str, images: Path, eager: Path, tmp_path: Path) -> None:
    store = label(images, tmp_path / "store", BLOCK, optimize=engine)
    assert softlabel.open_store(store).run == softlabel.open_store(eager).run
    assert softlabel.open_store(store).run.members[0].sha256 == weights_sha256(block())
    found, expected = rows(store), rows(eager)
    assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()  # a float16 step
    assert recorded(store) == [{"engine": engine, "rows": 32}]
    assert recorded(eager) is None
    assert f"computed {engine}, 32 samples a pass" in run_softlabel("inspect", store).stdout
    assert "rows recomputed" in run_softlabel("verify", store, "--recompute", 40).stdout


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_and_repairs_leave_every_bit(engine: str, images: Path, tmp_path: Path) -> None:
    one = label(images, tmp_path / "one", BLOCK, optimize=engine, threads=1)
    two = label(images, tmp_path / "two", BLOCK, optimize=engine, threads=2)
    assert files(one) == files(two)
    before = files(one)
    (one / "shards" / sorted(before)[1]).unlink()
    run_softlabel("repair", one)
    assert files(one) == before
    assert recorded(one) == [{"engine": engine, "rows": 32}]


def test_each_member_of_an_ensemble_has_a_graph(images: Path, tmp_path: Path) -> None:
    members = [BLOCK, write_teacher(tmp_path / "teacher.safetensors") + "?mean=0.5"]
    plain = label(images, tmp_path / "plain", *members, combine="keep", stack="no")
    folded = label(images, tmp_path / "folded", *members, combine="keep", optimize="folded")
    assert recorded(folded) == [{"engine": "folded", "rows": 32}] * 2
    for number in range(2):
        with softlabel.open_store(plain) as one, softlabel.open_store(folded) as other:
            expected, found = (np.array(store.take(np.arange(ROWS)).scaled_logits)[:, number] for store in (one, other))
        assert np.abs(found - expected).max() <= 2e-3 * np.abs(expected).max()
    more = write_teacher(tmp_path / "more.safetensors", seed=1) + "?mean=0.5"
    run_softlabel("extend", folded, "--teacher", more)
    assert recorded(folded) == [*[{"engine": "folded", "rows": 32}] * 2, {"engine": "eager"}]
    before = files(folded)
    (folded / "shards" / sorted(before)[1]).unlink()
    run_softlabel("repair", folded)
    assert files(folded) == before


def test_a_graph_computes_the_same_as_its_network_and_leaves_it_as_it_was() -> None:
    from softlabel.inputs.base import Inputs
    from softlabel.models.graph import make_graph_network

    model = block().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images_BCHW = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    graph = make_graph_network("block", model, Inputs.single(images_BCHW[:3]), "folded")
    with torch.no_grad():
        expected_BC, found_BC = model(images_BCHW), graph(images_BCHW)  # two passes of 3 and one that is filled up
    assert graph.folded == 2  # the third convolution's own answer is needed, and one norm follows none
    assert float((found_BC - expected_BC).abs().max()) <= 1e-5 * float(expected_BC.abs().max())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    with pytest.raises(ValueError, match="shapes"):
        graph(images_BCHW[:, :, :16])


def test_a_network_without_a_graph_stays_as_it_is(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = label(images, tmp_path / "plain", DECIDING, preflight=False)
    with pytest.raises(UsageError, match=r"deciding.*cannot be folded.*leave out --optimize folded"):
        label(images, tmp_path / "folded", DECIDING, optimize="folded", preflight=False)
    with caplog.at_level(logging.WARNING, "softlabel"):  # so many views that a trial pays
        process = start_softlabel(
            *("generate", "--data", images, "--teacher", DECIDING, "--out", tmp_path / "auto", "--optimize", "auto"),
            *("--views", 15_000, "--augment", "crop-flip", "--no-preflight", "--batch-size", 32),
        )
        _kill_after_shards(process, tmp_path / "auto", 0)
    assert recorded(tmp_path / "auto") == [{"engine": "eager"}]
    assert files(plain) == files(label(images, tmp_path / "short", DECIDING, optimize="auto", preflight=False))


def _kill_after_shards(process: Any, store: Path, count: int) -> str:
    while process.poll() is None and not ((store / "manifest.json").exists() and len(files(store)) >= count):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.kill()
    return str(process.communicate()[1])


def test_a_trial_on_a_long_run_chooses_and_a_killed_run_keeps_the_choice(images: Path, tmp_path: Path) -> None:
    store, teacher = tmp_path / "long", write_teacher(tmp_path / "teacher.safetensors", name="resnet20")
    command: list[object] = ["generate", "--data", images, "--teacher", teacher, "--out", store, "--optimize", "auto"]
    command += ["--views", 1_200, "--augment", "crop-flip", "--no-preflight", "--batch-size", 32, "--shard-rows", 32]
    said = _kill_after_shards(start_softlabel(*command), store, 2)
    assert "of the CPU time of the eager network" in said or "eager (" in said
    (choice,) = recorded(store)
    assert choice["engine"] in ("eager", "folded", "compiled")
    said = _kill_after_shards(start_softlabel(*command), store, len(files(store)) + 2)
    assert "of the CPU time" not in said  # no other trial
    assert recorded(store) == [choice]


@pytest.mark.parametrize("option", [["--optimize", "auto"], []], ids=["auto", "no option"])
def test_a_killed_run_has_the_shards_of_one_that_was_not(option: list[str], images: Path, tmp_path: Path) -> None:
    """A short run would be eager by a trial of its own, so that equal shards come from the recorded choice."""
    store = tmp_path / "store"
    command = ["generate", "--data", images, "--teacher", BLOCK, "--shard-rows", 2, "--no-preflight"]
    whole = tmp_path / "whole"
    run_softlabel(*command, "--out", whole, "--optimize", "folded")
    _kill_after_shards(start_softlabel(*command, "--out", store, "--optimize", "folded"), store, 1)
    assert len(files(store)) < ROWS // 2
    done = run_softlabel(*command, "--out", store, *option)
    assert "folded, as before" in done.stderr
    assert done.stderr.count("its shards were computed folded, and the others are too") == 1
    assert files(store) == files(whole)
    assert recorded(store) == recorded(whole)
    (store / "shards" / sorted(files(whole))[7]).unlink()
    run_softlabel("repair", store)
    assert files(store) == files(whole)


@pytest.mark.parametrize("option", ["auto", "folded"])
def test_a_store_that_was_begun_eager_goes_on_eager(
    option: str, images: Path, eager: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    label(write_dataset(tmp_path / "some.parquet", 64), store, BLOCK)
    label(images, store, BLOCK, grow=True, optimize=option)
    (line,) = [one for one in caplog.messages if "its shards were computed eager, and the others are too" in one]
    assert ("not folded; label into another folder" in line) == (option == "folded")
    assert recorded(store) is None
    np.testing.assert_array_equal(rows(store), rows(eager))


def test_what_does_not_go_together_is_refused(images: Path, tmp_path: Path) -> None:
    for options in ({"compile": True}, {"stack": "yes"}, {"members_in_turn": "yes"}):
        with pytest.raises(UsageError, match=r"optimize: .*leave out one"):
            label(images, tmp_path / "store", BLOCK, optimize="auto", **options)
    label(images, tmp_path / "begun", BLOCK, optimize="folded")
    with pytest.raises(UsageError, match=r"begun: its shards were computed folded, and .*found compile with it"):
        label(images, tmp_path / "begun", BLOCK, compile=True)
    with pytest.raises(UsageError, match="graphs are in fp32, found bf16"):
        label(images, tmp_path / "store", BLOCK, optimize="folded", precision="bf16")
    with pytest.raises(UsageError, match="encoding head"):
        label(images, tmp_path / "store", BLOCK, optimize="folded", encoding="head")
    exported = tmp_path / "block.pt2"
    with torch.no_grad():
        torch.export.save(torch.export.export(block().eval(), (torch.randn(2, 3, 32, 32),)), exported)
    program = f"{exported}?trust=true&mean=0&std=1"
    with pytest.raises(UsageError, match=r"block\.pt2.*is a program file.*leave out --optimize folded"):
        label(images, tmp_path / "store", program, optimize="folded", batch_size=2)
