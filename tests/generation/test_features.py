"""Embeddings and maps of attention beside the logits: against plain forward passes with hooks, and raw reads of files.

B rows, D width of an embedding, K numbers before a projection, M members, S numbers of all maps of attention.
"""

import glob
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import softlabel
from softlabel.cli.main import main
from softlabel.convert import combine_store, convert_store, export_store, merge_stores
from softlabel.errors import MismatchError, SoftLabelError, UsageError
from softlabel.generation.job import load_job
from softlabel.generation.reload import config_of, reload_job
from softlabel.generation.worker import Request, label_one
from softlabel.maintain.audit import recompute_features
from softlabel.maintain.extend import extend
from softlabel.maintain.repair import repair
from softlabel.models import build_model
from softlabel.store.open import open_store
from softlabel.store.verify import verify_store
from tests.support.datasets import CLASSES, write_dataset
from tests.support.teachers import write_teacher
from tests.support.texts import SENTENCES, save_classifier

ROWS = 20
PIXELS = "?mean=0.5,0.5,0.5&std=0.25,0.25,0.25&crop=32"
HERE = "python:tests.generation.test_features"
STAGES = ("layer1", "layer2", "layer3")
Arrays = dict[str, np.ndarray]


class Encoder(nn.Module):
    """Vectors without classes, as an image encoder gives them; beside them tokens and a map with channels last."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, stride=8)
        self.last = nn.Identity()
        self.tokens = nn.Identity()
        self.scale = scale
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            self.patches.weight.normal_()
            self.patches.bias.zero_()  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        grid_BKHW = self.patches(images)
        self.last(grid_BKHW.permute(0, 2, 3, 1))
        tokens_BLK = self.tokens(grid_BKHW.flatten(2).transpose(1, 2))
        return tokens_BLK.mean(dim=1) * self.scale


class Classifier(Encoder):
    """The same with classes, which no linear layer gives."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, : len(CLASSES)] * 3


def build_encoder(scale: float = 1.0) -> nn.Module:
    return Encoder(float(scale))


def build_classifier() -> nn.Module:
    return Classifier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("features")
    write_dataset(made / "data.parquet", ROWS)
    write_teacher(made / "a.safetensors", seed=1)
    write_teacher(made / "b.safetensors", name="resnet14", seed=2)
    return made


def teachers(folder: Path, *names: str, options: str = PIXELS) -> list[str]:
    kinds = {"a": "resnet8", "b": "resnet14"}
    return [f"zoo:{kinds[name]}@{folder}/{name}.safetensors{options}" for name in names]


def label(folder: Path, out: Path, specs: list[str], data: str = "data.parquet", **fields: Any) -> Path:
    settings = {"shard_rows": 16, "batch_size": 8, "device": "cpu", "preflight": False, "progress": False} | fields
    softlabel.generate(folder / data, teachers=specs, out=out, **settings)
    return out


def read_raw(store: Path, name: str, dtype: str) -> np.ndarray:
    """A column of all rows, read from the files without the package."""
    parts = []
    for path in sorted(glob.glob(f"{store}/shards/*")):
        if path.endswith("h5"):
            with h5py.File(path) as file:
                parts.append(file[name][:])
        else:
            parts.append(np.stack([np.frombuffer(row, dtype) for row in pq.read_table(path)[name].to_pylist()]))
    return np.concatenate(parts)


def run_plainly(spec: str, data: Path) -> Arrays:
    """What a plain forward pass gives on the way: `embedding` (B, K), and each stage's normalised map."""
    images = [
        np.asarray(Image.open(io.BytesIO(one["bytes"])).convert("RGB"))
        for one in pq.read_table(data)["image"].to_pylist()
    ]
    inputs = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    model: Any = build_model(spec, num_classes=len(CLASSES)).eval()
    found: dict[str, Tensor] = {}
    model.linear.register_forward_pre_hook(lambda _, given: found.update(embedding=given[0]))
    for name in STAGES:
        getattr(model, name).register_forward_hook(lambda _, given, out, name=name: found.update({name: out}))
    with torch.no_grad():
        model(inputs)
    maps = [(found[name] ** 2).mean(dim=1).flatten(1) for name in STAGES]
    maps = [one / one.norm(dim=1, keepdim=True) for one in maps]
    return {"embedding": found["embedding"].numpy(), "attention": torch.cat(maps, dim=1).numpy()}


def sign(seed: int, place: int) -> int:
    """The random sign at a place of a projection, as FORMAT.md states it, in Python's integers."""
    golden, mask, key = 0x9E3779B97F4A7C15, 2**64 - 1, 0

    def mix(word: int) -> int:
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB & mask
        return word ^ (word >> 31)

    for part in (seed, 4000):
        key = mix(((key ^ part) + golden) & mask)
    return -1 if mix((key + (place + 1) * golden) & mask) >> 63 else 1


@pytest.mark.parametrize("format", ["parquet", "hdf5"])
def test_they_are_those_of_a_plain_forward_pass(folder: Path, tmp_path: Path, format: str) -> None:
    spec = teachers(folder, "a")
    label(folder, tmp_path / "without", spec, format=format)
    label(folder, tmp_path / "with", spec, format=format, also=["embedding", "attention"])
    expected = run_plainly(spec[0].partition("?")[0], folder / "data.parquet")
    embedding, attention = (
        read_raw(tmp_path / "with", "embedding", "<f2"),
        read_raw(tmp_path / "with", "attention", "<f2"),
    )
    np.testing.assert_allclose(embedding, expected["embedding"], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(attention, expected["attention"], rtol=2e-3, atol=1e-4)
    # The logits are those of a store without them, to the bit, whose format version says nothing new.
    assert (read_raw(tmp_path / "with", "logits", "<f2") == read_raw(tmp_path / "without", "logits", "<f2")).all()
    stores = [open_store(tmp_path / name, verify="full") for name in ("without", "with")]
    assert [store.manifest.format_version for store in stores] == ([1, 5] if format == "hdf5" else [6, 6])
    assert (stores[0].run.embedding, stores[0].run.attention) == (None, None)
    run = stores[1].run
    assert run.embedding is not None
    assert run.attention is not None
    assert (run.embedding.width, run.embedding.kept, run.embedding.taps[0].module) == (64, False, "linear")
    assert (run.attention.heights, run.attention.modules) == ((32, 16, 8), (STAGES,))
    for streaming in (False, True):
        loader = softlabel.SoftLabelLoader(
            folder / "data.parquet",
            tmp_path / "with",
            batch_size=7,
            also=("attention", "embedding"),
            streaming=streaming,
        )
        for batch in loader:
            assert batch.embedding.dtype == torch.float32
            np.testing.assert_array_equal(batch.embedding.numpy(), embedding[batch.samples].astype(np.float32))
            np.testing.assert_array_equal(batch.attention.numpy(), attention[batch.samples].astype(np.float32))
            assert batch.target is not None
    (batch,) = softlabel.SoftLabelLoader(folder / "data.parquet", tmp_path / "with", batch_size=ROWS)
    assert (batch.embedding, batch.attention) == (None, None)
    with pytest.raises(MismatchError, match="expected rows with embedding, found none; label again with"):
        softlabel.SoftLabelLoader(folder / "data.parquet", tmp_path / "without", also=("embedding",))


def test_kept_members_are_projected_by_the_signs_of_the_format(folder: Path, tmp_path: Path) -> None:
    specs = teachers(folder, "a", "b")
    fields = {"combine": "keep", "also": ["embedding"], "embedding_width": 16, "embedding_type": "int8", "seed": 5}
    store = open_store(label(folder, tmp_path / "kept", specs, **fields))
    matrix_KD = np.array([sign(5, place) for place in range(64 * 16)]).reshape(64, 16) / 4
    raw = read_raw(tmp_path / "kept", "embedding", "|i1").reshape(ROWS, 2, 16)
    scale = read_raw(tmp_path / "kept", "embedding_scale", "<f4")
    for member, spec in enumerate(specs):
        plain_BK = run_plainly(spec.partition("?")[0], folder / "data.parquet")["embedding"]
        found_BD = raw[:, member] * scale[:, member, None]
        assert (np.abs(found_BD - plain_BK @ matrix_KD) <= 0.51 * scale[:, member, None] + 1e-4).all()
    rows = store.take(np.arange(ROWS), ["embedding", "embedding_scale"])
    np.testing.assert_allclose(rows.embedding, raw * scale[:, :, None], rtol=1e-6)
    (batch,) = softlabel.SoftLabelLoader(folder / "data.parquet", store, batch_size=ROWS, also=("embedding",))
    assert batch.embedding.shape == (ROWS, 2, 16)
    assert store.run.embedding is not None
    assert (store.run.embedding.projection, store.run.embedding.kept) == (5, True)


def test_each_view_has_its_own(folder: Path, tmp_path: Path) -> None:
    spec = teachers(folder, "a")
    store = open_store(
        label(folder, tmp_path / "s", spec, views=2, augment="crop-flip", also=["embedding"], temperature=1.0)
    )
    rows = store.take(np.arange(2 * ROWS))
    layer: Any = build_model(spec[0].partition("?")[0], num_classes=len(CLASSES)).linear
    with torch.no_grad():
        logits_BC = layer(torch.from_numpy(rows.embedding)).numpy()
    np.testing.assert_allclose(logits_BC - logits_BC.max(axis=1, keepdims=True), rows.scaled_logits, atol=0.05)
    assert (np.abs(rows.embedding[:ROWS] - rows.embedding[ROWS:]).max(axis=1) > 0.01).all()


def test_modules_by_name_are_pooled_as_the_manifest_says(folder: Path, tmp_path: Path) -> None:
    plain = open_store(label(folder, tmp_path / "plain", teachers(folder, "a"), also=["embedding"]))
    named = teachers(folder, "a", options=f"{PIXELS}&embedding=layer3&attention=layer2.0.bn1,layer3")
    store = open_store(label(folder, tmp_path / "named", named, also=["embedding", "attention"]))
    rows = [one.take(np.arange(ROWS)) for one in (plain, store)]
    np.testing.assert_allclose(rows[0].embedding, rows[1].embedding, rtol=2e-3, atol=2e-3)
    run = store.run
    assert run.embedding is not None
    assert run.attention is not None
    assert run.embedding.taps[0].pool == "pixels"
    assert (run.attention.heights, run.attention.modules) == ((16, 8), (("layer2.0.bn1", "layer3"),))
    pooled = {}
    for module, pool in (("patches", "pixels"), ("last", "last-pixels"), ("tokens", "tokens"), ("output", "none")):
        spec = f"{HERE}:build_classifier{PIXELS}&embedding={module}"
        found = open_store(label(folder, tmp_path / module, [spec], also=["embedding"]))
        assert found.run.embedding is not None
        assert found.run.embedding.taps[0].pool == pool
        pooled[module] = found.take(np.arange(ROWS)).embedding
    for module in ("last", "tokens"):
        np.testing.assert_allclose(pooled[module], pooled["patches"], atol=1e-2)


def test_a_head_store_has_an_embedding_already(folder: Path, tmp_path: Path) -> None:
    spec = teachers(folder, "a")
    expected = run_plainly(spec[0].partition("?")[0], folder / "data.parquet")["embedding"]
    store = open_store(label(folder, tmp_path / "head", spec, encoding="head"))
    assert (store.manifest.format_version, store.run.features) == (6, None)
    assert store.run.embedding is not None
    assert (store.run.embedding.width, store.run.embedding.taps) == (64, ())
    (batch,) = softlabel.SoftLabelLoader(
        folder / "data.parquet", store, batch_size=ROWS, also=("embedding",), shuffle=False
    )
    np.testing.assert_allclose(batch.embedding.numpy(), expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(UsageError, match="encoding head stores what enters its last linear layer already"):
        label(folder, tmp_path / "both", spec, encoding="head", also=["embedding"])


def test_texts_that_are_regrouped_by_length_keep_their_own(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    texts = SENTENCES * 3
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"id": f"{n}", "text": one}) + "\n" for n, one in enumerate(texts))
    )
    net = save_classifier(tmp_path / "net")
    data, fields = "texts.jsonl?text=text&key=id", {"shard_rows": 24, "also": ["embedding"], "temperature": 1.0}
    store = open_store(label(tmp_path, tmp_path / "s", [f"text:{net}"], data=data, **fields))
    rows = store.take(np.arange(len(texts)))
    layer: Any = build_model(f"text:{net}").network.classifier
    with torch.no_grad():
        logits_BC = layer(torch.from_numpy(rows.embedding)).numpy()
    np.testing.assert_allclose(logits_BC - logits_BC.max(axis=1, keepdims=True), rows.scaled_logits, atol=0.02)
    with pytest.raises(UsageError, match="expected one vector for each text, found one for each of its tokens"):
        label(tmp_path, tmp_path / "x", [f"text:{net}?embedding=network.bert.encoder"], data=data, **fields)


@pytest.mark.parametrize(
    "fields", [{"members_in_turn": "yes"}, {"activation": "sigmoid", "ignore_labels": True}], ids=str
)
def test_members_give_theirs_however_they_run(folder: Path, tmp_path: Path, kept: Path, fields: dict[str, Any]) -> None:
    whole = {"combine": "keep", "also": ["embedding", "attention"], "embedding_width": 16}
    found = rows_of(label(folder, tmp_path / "s", teachers(folder, "a", "b"), **whole, **fields))
    np.testing.assert_array_equal(found.embedding, rows_of(kept).embedding)
    np.testing.assert_array_equal(found.attention, rows_of(kept).attention)


@pytest.fixture(scope="module")
def kept(folder: Path) -> Path:
    fields = {"combine": "keep", "also": ["embedding", "attention"], "embedding_width": 16}
    return label(folder, folder / "kept", teachers(folder, "a", "b"), **fields)


def rows_of(store: Path) -> Any:
    opened = open_store(store, verify="full")
    return opened.take(np.arange(len(opened)))


# ---- without logits ----


def test_vectors_alone_of_a_network_without_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(folder / "data.parquet"), str(tmp_path / "only")
    spec = f"{HERE}:build_encoder{PIXELS}"
    arguments = ["generate", "--data", data, "--teacher", spec, "--out", out, "--only", "embedding", "--device", "cpu"]
    assert main([*arguments, "--batch-size", "8"]) == 0
    assert main([*arguments, "--batch-size", "8"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    store = open_store(out, verify="full")
    assert (store.run.num_classes, store.run.label_columns, store.run.encoding.name) == (0, (), "none")
    images = [np.asarray(Image.open(io.BytesIO(one["bytes"]))) for one in pq.read_table(data)["image"].to_pylist()]
    with torch.no_grad():
        expected = Encoder()((torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25).numpy()
    np.testing.assert_allclose(read_raw(Path(out), "embedding", "<f2"), expected, rtol=2e-3, atol=2e-3)
    (batch,) = softlabel.SoftLabelLoader(data, store, batch_size=ROWS, also=("embedding",), shuffle=False)
    assert batch.target is None
    assert batch.labels.tolist() == [number % len(CLASSES) for number in range(ROWS)]
    np.testing.assert_allclose(batch.embedding.numpy(), expected, rtol=2e-3, atol=2e-3)
    assert main(["verify", out, "--recompute", "9", "--device", "cpu"]) == 0
    assert main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert "embedding  6 numbers in float16, of the answer" in shown
    assert "embedding by" in shown
    # A classifier's is what enters its last layer, without its logits.
    of_classifier = open_store(label(folder, tmp_path / "c", teachers(folder, "a"), only="embedding"))
    assert of_classifier.run.embedding is not None
    assert of_classifier.run.embedding.taps[0].module == "linear"
    copy = convert_store(out, tmp_path / "copy", format="hdf5", progress=False)
    assert copy.total_rows == ROWS
    np.testing.assert_array_equal(
        read_raw(tmp_path / "copy", "embedding", "<f2"), read_raw(Path(out), "embedding", "<f2")
    )
    train = ["train", "--data", data, "--labels", out, "--student", "zoo:resnet8", "--out", str(tmp_path / "run")]
    for command in (
        train,
        [*train, "--soft-weight", "0"],  # and no loss on embeddings
        ["report", out, "--out", str(tmp_path / "report")],
        ["combine", out, str(tmp_path / "x"), "--temperature", "2"],
        ["evaluate", "--data", data, "--labels", out, "--model", "zoo:resnet8@x"],
        ["convert", out, str(tmp_path / "x"), "--encoding", "int8"],
    ):
        assert main(command) == 2, command
        assert "embeddings or attention alone" in capsys.readouterr().err, command
    with pytest.raises(SoftLabelError, match="temperature: is of logits"):
        label(folder, tmp_path / "x", [spec], only="embedding", temperature=2.0)


# ---- what is refused, by name ----

REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "averaged": ("a b", "expected one teacher, or members that are kept apart, found 2", {"also": ["embedding"]}),
    "compiled": ("a", "compile: --also embedding captures a layer", {"also": ["embedding"], "compile": True}),
    "folded": ("a", "--also attention captures a layer", {"also": ["attention"], "optimize": "folded"}),
    "stacked": ("a a", "found --stack yes", {"also": ["embedding"], "stack": "yes", "combine": "keep"}),
    "widths": ("a o", "give --embedding-width to project", {"also": ["embedding"], "combine": "keep"}),
    "map sizes": ("a p", "maps of the same sizes", {"also": ["attention"], "combine": "keep"}),
    "wider": ("a", "expected fewer numbers than", {"also": ["embedding"], "embedding_width": 64}),
    "alone": ("a", "embedding_width: belongs to --also embedding", {"embedding_width": 8}),
    "no such option": ("m", "label with .softlabel generate --also embedding", {}),
    "no such module": ("m", "expected the name of a module, found 'layer9'", {"also": ["embedding"]}),
    "no last layer": ("c", "expected a last linear layer whose outputs are the answer", {"also": ["embedding"]}),
    "no map": ("t", r"expected \(batch, channels, height, width\), found \(2, 16, 6\)", {"also": ["attention"]}),
    "no stage": ("c", "found one size, of .*name modules", {"also": ["attention"]}),
    "whole maps": ("w", "at most 16,384 numbers", {"also": ["embedding"]}),
    "too large": ("e", "expected finite numbers of at most 65,504", {"only": "embedding"}),
    "labels": ("a", "encoding: is of logits", {"only": "embedding", "encoding": "int8"}),
}
SPECS = {
    "o": f"{HERE}:build_classifier{PIXELS}&embedding=output",
    "p": f"{HERE}:build_classifier{PIXELS}&attention=patches",
    "c": f"{HERE}:build_classifier{PIXELS}",
    "t": f"{HERE}:build_classifier{PIXELS}&attention=tokens",
    "w": f"{HERE}:build_wide{PIXELS}&embedding=wide",
    "e": f"{HERE}:build_encoder{PIXELS}&scale=1e6",
}


class Wide(Classifier):
    """With a whole map as one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Flatten()

    def forward(self, images: Tensor) -> Tensor:
        self.wide(images.repeat(1, 6, 1, 1))
        return super().forward(images)


def build_wide() -> nn.Module:
    return Wide()


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_refused_by_name(folder: Path, tmp_path: Path, case: str) -> None:
    names, message, fields = REFUSED[case]
    made = {**SPECS, "m": teachers(folder, "a", options=f"{PIXELS}&embedding=layer9")[0]}
    specs = [made[name] if name in made else teachers(folder, name)[0] for name in names.split()]
    with pytest.raises(SoftLabelError, match=message):
        label(folder, tmp_path / "s", specs, **fields)


# ---- commands on stores ----


def test_a_store_goes_on_only_with_the_same_features(folder: Path, kept: Path) -> None:
    fields = {"combine": "keep", "also": ["embedding", "attention"], "embedding_width": 16}
    for message, other in (
        ("width of embeddings .--embedding-width.: the store has 16, this run 8", {"embedding_width": 8}),
        ("maps of attention .--also attention.: the store has some, this run none", {"also": ["embedding"]}),
        ("type of embeddings .--embedding-type.: the store has float16, this run int8", {"embedding_type": "int8"}),
        ("seed of the embedding's projection", {"seed": 1}),
        (
            "features .--also.: the store has embedding, attention, this run none",
            {"also": None, "embedding_width": None},
        ),
    ):
        with pytest.raises(MismatchError, match=message):
            label(folder, kept, teachers(folder, "a", "b"), **fields | other)


def test_lost_shards_and_workers_give_the_same_bytes(folder: Path, kept: Path) -> None:
    manifest = open_store(kept).manifest
    files = {path.name: path.read_bytes() for path in (kept / "shards").iterdir()}
    request = Request(
        session="s",
        out=str(kept),
        run=manifest.run.fingerprint(),
        data=str(folder / "data.parquet"),
        teachers=tuple(teachers(folder, "a", "b")),
        device="cpu",
    )
    digest = reload_job(manifest, kept, replace(config_of(manifest), device="cpu")).labeller.source.digest(16, 20)
    outcome = label_one(request, 1, digest, 0.0)
    assert outcome.record is not None, outcome.error
    assert outcome.record.file.removeprefix("shards/") in files
    lost = sorted((kept / "shards").iterdir())[0]
    raw = bytearray(lost.read_bytes())
    raw[len(raw) // 2] ^= 1
    lost.write_bytes(raw)
    assert repair(kept, device="cpu", progress=False).shards_written == 1
    assert {path.name: path.read_bytes() for path in (kept / "shards").iterdir()} == files


def test_a_changed_feature_is_found(folder: Path, tmp_path: Path, kept: Path) -> None:
    job = reload_job(open_store(kept).manifest, kept, replace(config_of(open_store(kept).manifest), device="cpu"))
    found = recompute_features(open_store(kept), job, 10)
    assert found is not None
    assert found.ok
    assert max(found.differences.values()) < 1e-3
    other = label(
        folder, tmp_path / "other", teachers(folder, "b", "a"), combine="keep", also=["embedding", "attention"]
    )
    swapped = recompute_features(open_store(other), replace_job(other, teachers(folder, "b", "b")), 10)
    assert swapped is not None
    assert not swapped.ok


def replace_job(store: Path, specs: list[str]) -> Any:
    """The job of a store with other teachers than it has."""
    manifest = open_store(store).manifest
    return load_job(manifest.recorded["data"], specs, replace(config_of(manifest), device="cpu"))


def test_extended_is_as_labelled_at_once(folder: Path, tmp_path: Path, kept: Path) -> None:
    fields = {"combine": "keep", "also": ["embedding", "attention"], "embedding_width": 16}
    begun = label(folder, tmp_path / "begun", teachers(folder, "a"), **fields)
    extend(begun, teacher=teachers(folder, "b")[0], device="cpu", progress=False)
    assert open_store(begun).run == open_store(kept).run
    one, other = rows_of(begun), rows_of(kept)
    for name in one.columns:
        np.testing.assert_array_equal(one.columns[name], other.columns[name])
    alone = label(folder, tmp_path / "alone", teachers(folder, "a"), combine="keep", also=["embedding"])
    with pytest.raises(MismatchError, match="expected the embeddings and attention of the other members"):
        extend(alone, teacher=SPECS["o"], device="cpu", progress=False)


def test_converted_combined_and_merged_stores_carry_them(folder: Path, tmp_path: Path, kept: Path) -> None:
    whole = rows_of(kept)
    convert_store(kept, tmp_path / "converted", format="hdf5", encoding="int8", shard_rows=7, progress=False)
    converted = rows_of(tmp_path / "converted")
    np.testing.assert_array_equal(converted.embedding, whole.embedding)
    np.testing.assert_array_equal(converted.attention, whole.attention)
    combine_store(kept, tmp_path / "second", members=[2], progress=False)
    second = rows_of(tmp_path / "second")
    np.testing.assert_array_equal(second.embedding, whole.embedding[:, 1])
    np.testing.assert_array_equal(second.attention, whole.attention[:, 1])
    assert verify_store(tmp_path / "second").ok
    with pytest.raises(MismatchError, match="whose average means nothing, found 2 members"):
        combine_store(kept, tmp_path / "both", progress=False)
    write_dataset(folder / "more.parquet", 5, seed=3)
    table = pq.read_table(folder / "more.parquet")
    renamed = [{"bytes": one["bytes"], "path": f"more-{one['path']}"} for one in table["image"].to_pylist()]
    pq.write_table(
        table.set_column(0, "image", pa.array(renamed, table.schema.field("image").type)), folder / "more.parquet"
    )
    fields = {"combine": "keep", "also": ["embedding", "attention"], "embedding_width": 16}
    more = label(folder, tmp_path / "more", teachers(folder, "a", "b"), data="more.parquet", **fields)
    merge_stores([kept, more], tmp_path / "merged", progress=False)
    both = np.concatenate([whole.embedding, rows_of(more).embedding])
    np.testing.assert_array_equal(rows_of(tmp_path / "merged").embedding, both)


def test_exports_have_them_in_plain_types(tmp_path: Path, kept: Path) -> None:
    whole = rows_of(kept)
    export_store(kept, tmp_path / "hf", to="hf", progress=False)
    table = pq.read_table(tmp_path / "hf" / "data")
    for member in range(2):
        found = np.array(table[f"embedding_{member + 1}"].to_pylist(), np.float32)
        np.testing.assert_array_equal(found, whole.embedding[:, member])
    assert np.array(table["attention_2"].to_pylist()).shape == (ROWS, 1344)
    export_store(kept, tmp_path / "all.npz", to="npz", progress=False)
    with np.load(tmp_path / "all.npz") as arrays:
        np.testing.assert_array_equal(arrays["embedding"], whole.embedding)
        np.testing.assert_array_equal(arrays["attention"], whole.attention)


# ---- files with a program ----


def test_an_onnx_file_gives_an_output_of_that_name(folder: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    hidden, last = rng.normal(0, 0.1, (3 * 32 * 32, 5)).astype("f4"), rng.normal(0, 1, (5, len(CLASSES))).astype("f4")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("MatMul", ["flat", "a"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "b"], ["logits"]),
        ],
        "net",
        [helper.make_tensor_value_info("x", floats, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info(name, floats, ["n", width]) for name, width in (("logits", 4), ("hidden", 5))],
        [onnx.numpy_helper.from_array(hidden, "a"), onnx.numpy_helper.from_array(last, "b")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "net.onnx"
    )
    spec = f"{tmp_path}/net.onnx{PIXELS.replace('&crop=32', '')}"
    store = open_store(label(folder, tmp_path / "s", [f"{spec}&embedding=hidden"], also=["embedding"], temperature=1.0))
    rows = store.take(np.arange(ROWS))
    logits_BC = rows.embedding @ last
    np.testing.assert_allclose(logits_BC - logits_BC.max(axis=1, keepdims=True), rows.scaled_logits, atol=0.05)
    for options, message in (
        ("", "found none; its outputs are logits, hidden"),
        ("&embedding=no", "found no; its outputs"),
    ):
        with pytest.raises(UsageError, match=message):
            label(folder, tmp_path / "x", [spec + options], also=["embedding"])


def test_a_pt2_file_gives_its_answer_alone(folder: Path, tmp_path: Path) -> None:
    images = torch.zeros(8, 3, 32, 32)
    torch.export.save(torch.export.export(Encoder().eval(), (images,)), tmp_path / "net.pt2")
    spec = f"{tmp_path}/net.pt2{PIXELS.replace('&crop=32', '')}&trust=true"
    found = rows_of(label(folder, tmp_path / "only", [spec], only="embedding"))
    plain = rows_of(label(folder, tmp_path / "plain", [f"{HERE}:build_encoder{PIXELS}"], only="embedding"))
    np.testing.assert_allclose(found.embedding, plain.embedding, atol=1e-2)
    with pytest.raises(UsageError, match=r"a \.pt2 file has its answer alone"):
        label(folder, tmp_path / "x", [spec], also=["embedding"])
