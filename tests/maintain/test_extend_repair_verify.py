"""A store over its life: every encoding trains, members are mixed and added, datasets grow, damage is repaired."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import softlabel
from softlabel.labels.combine import Combination
from softlabel.maintain.coverage import coverage
from softlabel.maintain.extend import extend
from softlabel.maintain.repair import repair
from softlabel.store.encodings import Head, Sampled, TopK
from tests.support.commands import run_softlabel
from tests.support.datasets import CLASSES, make_jpeg, write_dataset, write_parquet
from tests.support.teachers import write_teacher

ROWS, SHARD_ROWS, T = 70, 20, 4.0
ENCODINGS = {
    "float32": "float32",
    "float16": "float16",
    "int8": "int8",
    "topk": TopK(k=2, temperatures=(1.0, T)),
    "sampled": Sampled(samples=16),
    "head": Head(),
}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upkeep")
    write_dataset(folder / "data.parquet", ROWS)
    for seed in range(3):
        write_teacher(folder / f"teacher{seed}.safetensors", seed=seed)
    return folder


def spec(ready: Path, seed: int) -> str:
    return f"zoo:resnet8@{ready / f'teacher{seed}.safetensors'}"


def generate(ready: Path, out: Path, *members: int, **options: object) -> softlabel.Store:
    settings: dict[str, object] = {"shard_rows": SHARD_ROWS, "batch_size": 16, "progress": False, **options}
    data = settings.pop("data", ready / "data.parquet")
    softlabel.generate(data, teachers=[spec(ready, m) for m in members], out=out, **settings)  # type: ignore[arg-type]
    return softlabel.open_store(out, verify="full")


def everything(store: softlabel.Store) -> tuple[list[str], np.ndarray]:
    taken = store.take(np.arange(len(store)))
    return list(taken.keys), np.asarray(taken.scaled_logits)


def same_files(store: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (store / "shards").iterdir()}


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_gives_the_loss_its_target(ready: Path, tmp_path: Path, name: str) -> None:
    exact = generate(ready, tmp_path / "exact", 0, encoding="float32")
    generate(ready, tmp_path / "store", 0, encoding=ENCODINGS[name])
    batch = next(iter(softlabel.SoftLabelLoader(ready / "data.parquet", tmp_path / "store", batch_size=ROWS)))
    student_BC = torch.randn(ROWS, len(CLASSES), generator=torch.Generator().manual_seed(0))
    loss = softlabel.distillation_loss(
        student_BC, batch.target, batch.labels, temperature=T, soft_weight=1.0, hard_weight=0.0
    )
    teacher_BC = torch.from_numpy(exact.take(exact.lookup(list(batch.keys))).scaled_logits).double()
    log_q_BC = F.log_softmax(student_BC.double() / T, dim=1)
    if name == "topk":
        # The kept classes apart, all others together: the coarse-grained divergence.
        p_BC = teacher_BC.softmax(dim=1)
        top_BK = p_BC.topk(2, dim=1).indices
        p_BK, q_BK = p_BC.gather(1, top_BK), log_q_BC.exp().gather(1, top_BK)
        rest = (1 - p_BK.sum(1)) * ((1 - p_BK.sum(1)) / (1 - q_BK.sum(1))).log()
        expected, tolerance = ((p_BK * (p_BK / q_BK).log()).sum(1) + rest).mean(), 1e-3
    elif name == "sampled":
        # Unbiased for the cross-entropy; 70 rows of 16 draws leave a few percent.
        expected, tolerance = -(teacher_BC.softmax(dim=1) * log_q_BC).sum(1).mean(), 6e-2
    else:
        expected, tolerance = (
            F.kl_div(log_q_BC, teacher_BC.log_softmax(dim=1), log_target=True, reduction="batchmean"),
            2e-3,
        )
    assert loss.item() == pytest.approx(T * T * expected.item(), rel=tolerance)


def test_a_student_trains_on_the_command_line_from_topk_labels(ready: Path, tmp_path: Path) -> None:
    data, labels = ready / "data.parquet", tmp_path / "labels"
    options = ["--encoding", "topk", "--top-k", 2, "--temperatures", 1, 4]
    run_softlabel("generate", "--data", data, "--teacher", spec(ready, 0), "--out", labels, *options)
    train = ["train", "--data", data, "--labels", labels, "--student", "zoo:resnet8", "--epochs", 1, "--batch-size", 16]
    assert "trained for 1 epochs" in run_softlabel(*train, "--out", tmp_path / "run").stdout
    refused = run_softlabel(*train, "--out", tmp_path / "other", "--temperature", 3, code=2)
    assert "temperature" in refused.stderr
    assert "1, 4" in refused.stderr


def test_head_is_exact_at_every_temperature_and_refuses_what_has_none(ready: Path, tmp_path: Path) -> None:
    exact = generate(ready, tmp_path / "exact", 0, encoding="float32", temperature=1.0)
    head = generate(ready, tmp_path / "head", 0, encoding=Head())
    _, expected = everything(exact)
    _, found = everything(head)
    found = (found - found.max(axis=1, keepdims=True)) * T
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-2)
    with pytest.raises(softlabel.SoftLabelError, match="one teacher"):
        generate(ready, tmp_path / "two", 0, 1, encoding=Head())


def test_kept_members_mix_as_if_they_had_been_mixed_by_the_teachers(ready: Path, tmp_path: Path) -> None:
    kept = generate(ready, tmp_path / "kept", 0, 1, 2, combine="keep", encoding="float32")
    assert everything(kept)[1].shape == (ROWS, 3, len(CLASSES))
    for rule, weights, temperature in (
        ("probs", (1.0, 2.0, 1.0), 2.0),
        ("logits", (0.0, 1.0, 3.0), T),
        ("probs", None, T),
    ):
        direct = generate(
            ready,
            tmp_path / f"{rule}{temperature}",
            0,
            1,
            2,
            combine=rule,
            weights=weights,
            temperature=temperature,
            encoding="float32",
        )
        combine = Combination(rule=rule, weights=weights, temperature=temperature)  # type: ignore[arg-type]
        loader = softlabel.SoftLabelLoader(
            ready / "data.parquet", kept, batch_size=ROWS, shuffle=False, combine=combine
        )
        assert loader.temperature == temperature
        target = next(iter(loader)).target
        np.testing.assert_allclose(target.scaled_logits.numpy(), everything(direct)[1], atol=2e-5, rtol=1e-5)
    with pytest.raises(softlabel.SoftLabelError, match="keep"):
        softlabel.SoftLabelLoader(ready / "data.parquet", direct, combine=Combination()).__iter__().__next__()


@pytest.mark.parametrize("encoding", ["float16", "sampled", "topk"])
def test_extending_equals_having_had_the_member_from_the_start(
    ready: Path, tmp_path: Path, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    two = tmp_path / "two"
    generate(ready, two, 0, 1, combine="keep", encoding=ENCODINGS[encoding])
    extend(two, teacher=spec(ready, 2), progress=False)
    three = generate(ready, tmp_path / "three", 0, 1, 2, combine="keep", encoding=ENCODINGS[encoding])
    extended = softlabel.open_store(two, verify="full")
    assert [m.sha256 for m in extended.run.members] == [m.sha256 for m in three.run.members]
    np.testing.assert_array_equal(everything(extended)[1], everything(three)[1])
    assert not (tmp_path / "two.extending").exists()
    assert len(list((two / "shards").iterdir())) == len(extended.shards)
    with pytest.raises(softlabel.SoftLabelError, match="member already"):
        extend(two, teacher=spec(ready, 1), progress=False)
    assert "the same weights" not in caplog.text
    mixed = tmp_path / "mixed"
    generate(ready, mixed, 0, 1, 0, combine="logits")
    name = re.escape(spec(ready, 0))
    assert re.search(rf"warning: teachers: {name} \(number 3\) has the same .* as {name} \(number 1\)", caplog.text)
    with pytest.raises(softlabel.SoftLabelError, match="--combine keep"):
        extend(mixed, teacher=spec(ready, 1), progress=False)


def test_a_grown_dataset_is_labelled_without_touching_old_shards(ready: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    generate(ready, store, 0)
    before, old = same_files(store), everything(softlabel.open_store(store))
    # New images come between the old ones, and one cannot be read.
    keys = [f"image-{n:05d}.jpg" for n in range(ROWS)]
    images = [make_jpeg(n) for n in range(ROWS)]
    labels = [n % len(CLASSES) for n in range(ROWS)]
    for place, seed in ((0, 900), (30, 901), (60, 902)):
        keys.insert(place, f"new-{seed}.jpg")
        images.insert(place, make_jpeg(seed))
        labels.insert(place, 3)
    keys.append("broken.jpg")
    images.append(b"nothing")
    labels.append(0)
    grown = write_parquet(tmp_path / "grown.parquet", images, keys=keys, labels=labels)
    with pytest.raises(softlabel.SoftLabelError, match="dataset"):
        generate(ready, store, 0, data=grown)
    after = generate(ready, store, 0, data=grown, grow=True)
    assert {name: same_files(store)[name] for name in before} == before
    found_keys, found = everything(after)
    assert found_keys[:ROWS] == old[0]
    np.testing.assert_array_equal(found[:ROWS], old[1])
    assert sorted(found_keys[ROWS:]) == ["new-900.jpg", "new-901.jpg", "new-902.jpg"]
    assert set(after.bad) == {"broken.jpg"}
    assert coverage(after, str(grown), progress=False).ok
    fresh = generate(ready, tmp_path / "fresh", 0, data=grown)
    np.testing.assert_allclose(found, fresh.take(fresh.lookup(found_keys)).scaled_logits, rtol=1e-3, atol=2e-3)
    again = softlabel.generate(
        grown, teachers=[spec(ready, 0)], out=store, shard_rows=SHARD_ROWS, batch_size=16, grow=True, progress=False
    )
    assert again.shards_written == 0
    with pytest.raises(softlabel.SoftLabelError, match="are missing"):
        generate(ready, store, 0, data=ready / "data.parquet", grow=True)


@pytest.mark.parametrize("format", ["parquet", "hdf5"])
def test_repair_relabels_what_is_damaged_and_nothing_else(ready: Path, tmp_path: Path, format: str) -> None:
    store = tmp_path / "store"
    expected = everything(generate(ready, store, 0, format=format))
    before = same_files(store)
    files = sorted((store / "shards").iterdir())
    files[0].unlink()
    raw = bytearray(files[2].read_bytes())
    raw[len(raw) // 3] ^= 4
    files[2].write_bytes(raw)
    assert (
        "1 shard" in run_softlabel("verify", store, code=3).stdout
        or files[0].name in run_softlabel("verify", store, code=3).stdout
    )
    assert "2 shards relabelled" in run_softlabel("repair", store).stdout
    assert "whole" in run_softlabel("verify", store).stdout
    now = same_files(store)
    assert {name: now[name] for name in before if name not in (files[0].name, files[2].name)} == {
        name: before[name] for name in before if name not in (files[0].name, files[2].name)
    }
    repaired = everything(softlabel.open_store(store, verify="full"))
    assert repaired[0] == expected[0]
    np.testing.assert_array_equal(repaired[1], expected[1])
    assert "nothing to repair" in run_softlabel("repair", store).stdout


def test_new_stores_draw_systematically_and_old_ones_as_they_did(ready: Path, tmp_path: Path) -> None:
    def command(store: str, *more: object, rows: int = 24) -> list[object]:
        data = ["--data", f"{ready / 'data.parquet'}?rows=0:{rows}", "--teacher", spec(ready, 0)]
        fast = ["--no-preflight", "--batch-size", 8, "--shard-rows", 8]
        return ["generate", *data, *fast, "--out", tmp_path / store, "--encoding", "sampled", "--samples", 6, *more]

    def recorded(store: str) -> dict[str, object]:
        found: dict[str, object] = json.loads((tmp_path / store / "manifest.json").read_text())["run"]["encoding"]
        return found

    run_softlabel(*command("new"))
    assert recorded("new") == {"name": "sampled", "samples": 6, "draw": "systematic"}
    old = {"name": "sampled", "samples": 6}  # what stores had before there was a choice
    run_softlabel(*command("whole", "--draw", "independent"))
    run_softlabel(*command("old", "--draw", "independent", rows=16))
    run_softlabel(*command("old", "--grow"))
    run_softlabel(*command("old"))
    assert recorded("old") == recorded("whole") == old
    expected = softlabel.open_store(tmp_path / "whole").take(range(24)).columns
    for store in ("old", "copy"):
        if store == "copy":  # naming the encoding that there is does not make it another one
            again = ["--encoding", "sampled", "--samples", 6, "--shard-rows", 9]
            run_softlabel("convert", tmp_path / "old", tmp_path / "copy", *again)
            run_softlabel("convert", tmp_path / "old", tmp_path / "copy", *again)
        found = softlabel.open_store(tmp_path / store).take(range(24)).columns
        assert all(np.array_equal(found[name], expected[name]) for name in ("index", "weight"))
        assert recorded(store) == old
    for store in ("old", "new"):
        assert "whole" in run_softlabel("verify", tmp_path / store, "--recompute", 24).stdout
    refused = run_softlabel(*command("old", "--draw", "systematic"), code=2).stderr
    assert "draws (--draw): the store has independent, this run systematic" in refused
    refused = run_softlabel(*command("new", "--draw", "independent"), code=2).stderr
    assert "draws (--draw): the store has systematic, this run independent" in refused
    assert "expected independent or systematic" in run_softlabel(*command("else", "--draw", "x"), code=2).stderr


def test_repair_refuses_other_teachers_and_other_data(ready: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    generate(ready, store, 0)
    next((store / "shards").iterdir()).unlink()
    with pytest.raises(softlabel.SoftLabelError, match="teacher 1"):
        repair(store, teachers=[spec(ready, 1)], progress=False)
    other = write_dataset(tmp_path / "other.parquet", ROWS - 1)
    with pytest.raises(softlabel.SoftLabelError, match="dataset"):
        repair(store, data=str(other), progress=False)
    keys = [f"image-{n:05d}.jpg" for n in range(ROWS)]
    repainted = write_parquet(
        tmp_path / "repainted.parquet",
        [make_jpeg(n + 700) for n in range(ROWS)],
        keys=keys,
        labels=[n % 4 for n in range(ROWS)],
    )
    before = (store / "manifest.json").read_bytes()
    with pytest.raises(softlabel.SoftLabelError, match="content of"):
        repair(store, data=str(repainted), progress=False)
    assert (store / "manifest.json").read_bytes() == before  # what is refused changes nothing
    moved = tmp_path / "moved.safetensors"
    shutil.copy(ready / "teacher0.safetensors", moved)
    assert repair(store, teachers=[f"zoo:resnet8@{moved}"], progress=False).shards_written == 1


def test_verify_compares_with_data_and_teachers(ready: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    generate(ready, store, 0)
    output = run_softlabel("verify", store, "--recompute", 25, "--data", ready / "data.parquet").stdout
    assert "25 rows recomputed" in output
    assert "top-1 differs in 0.0000%" in output
    worst = float(output.split(" at worst")[0].split()[-1])
    assert worst < 5e-3
    images = [make_jpeg(n) for n in range(ROWS)]
    images[7] = make_jpeg(12345)
    changed = write_parquet(tmp_path / "changed.parquet", [*images[:-1], make_jpeg(1)], labels=[0] * ROWS)
    done = run_softlabel("verify", store, "--data", changed, code=3)
    assert "2 samples differ from the labelled ones: image-00007.jpg" in done.stdout
    fewer = write_dataset(tmp_path / "fewer.parquet", ROWS - 3)
    assert (
        "3 rows are of samples that the data do not have"
        in run_softlabel("verify", store, "--data", fewer, code=3).stdout
    )
    more = write_dataset(tmp_path / "more.parquet", ROWS + 1)
    assert (
        f"1 samples have no row: image-{ROWS:05d}.jpg" in run_softlabel("verify", store, "--data", more, code=3).stdout
    )


def test_a_derived_store_takes_no_teachers(ready: Path, tmp_path: Path) -> None:
    generate(ready, tmp_path / "kept", 0, 1, combine="keep")
    run_softlabel("convert", tmp_path / "kept", tmp_path / "derived", "--encoding", "int8")
    assert (
        "made from other stores"
        in run_softlabel("repair", tmp_path / "derived", "--teacher", spec(ready, 2), code=2).stderr
    )
    extended = run_softlabel("extend", tmp_path / "derived", "--teacher", spec(ready, 2), code=2)
    assert "made from another store" in extended.stderr


def test_plan_prices_every_encoding_before_anything_is_written(ready: Path, tmp_path: Path) -> None:
    options = ["--data", ready / "data.parquet", "--teacher", spec(ready, 0), "--seconds", 0.1, "--batch-size", 16]
    output = run_softlabel("plan", *options, cwd=tmp_path).stdout
    assert not list(tmp_path.iterdir())
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line and line[0].isalpha()}
    assert f"{ROWS} images" in output
    assert "images/s" in output
    # Four classes: float16 takes 8 bytes; a head of width 64 in float16 takes 128.
    assert lines["float32"][1] == "16"
    assert lines["float16"][1] == "8"
    assert lines["head"][1] == "128"
    store = generate(ready, tmp_path / "store", 0)
    assert store.manifest.totals.fidelity is not None
    assert float(lines["float16"][-1]) <= store.manifest.totals.fidelity.worst_t * 1.05 + 1e-12
    assert "int8" not in run_softlabel("plan", *options, "--encoding", "float16", "head").stdout
    # 16 numbers of an embedding of width 64 in a byte each, and a scale, in place of 64 in two bytes.
    for also, more in (([], 2 * 64), (["--embedding-width", 16, "--embedding-type", "int8"], 16 + 4)):
        with_embedding = run_softlabel("plan", *options, "--encoding", "float16", "--also", "embedding", *also).stdout
        assert re.search(rf"^float16 +{8 + more} ", with_embedding, flags=re.MULTILINE), with_embedding
    # What head stores is that embedding already, and generate refuses both.
    without = run_softlabel("plan", *options, "--encoding", "head", "--also", "embedding").stdout
    assert re.search(r"^head +-  does not fit", without, flags=re.MULTILINE), without
    assert "votes" in run_softlabel("plan", *options, "--encoding", "votes", code=2).stderr
