"""Texts as samples: through teachers, stores, students, against plain passes of transformers."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import softlabel
from softlabel.errors import MismatchError, SoftLabelError, UsageError
from softlabel.models.teacher import student_preprocessing
from tests.support.commands import run_softlabel
from tests.support.shared_data import find_shared_data
from tests.support.teachers import write_teacher
from tests.support.texts import SENTENCES, add_head, minilm, plain_logits, save_classifier

LONG = "never say what they mean " * 2000
TEXTS = [*SENTENCES, "", LONG, SENTENCES[1], *(" ".join(SENTENCES)[start : start + 37] for start in range(0, 300, 9))]
LABELS = [number % 3 for number in range(len(TEXTS))]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_parquet(tmp_path_factory.mktemp("data") / "texts.parquet", TEXTS)


def write_parquet(path: Path, texts: list[str | None]) -> str:
    table = {"id": [f"s{n}" for n in range(len(texts))], "text": texts, "label": [n % 3 for n in range(len(texts))]}
    pq.write_table(pa.table(table), path)
    return str(path)


def build_mlp(inputs: int, num_classes: int = 3) -> nn.Module:
    return nn.Linear(inputs, num_classes)


def stored(store: Path | str, view: int = 0) -> tuple[list[str], torch.Tensor]:
    """Keys and scaled logits of a store of encoding float32."""
    opened = softlabel.open_store(store)
    return list(opened.keys), torch.from_numpy(np.array(opened.take(range(len(opened))).columns["logits"]))


def assert_logits(store: Path | str, expected: torch.Tensor) -> None:
    _, found = stored(store)
    expected = expected - expected.amax(dim=1, keepdim=True)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5), (found - expected).abs().max()


def generate(data: object, teacher: Path | str, out: Path, **options: object) -> softlabel.GenerateSummary:
    spec = teacher if isinstance(teacher, str) else f"text:{teacher}"
    fixed = {"encoding": "float32", "temperature": 1.0, "device": "cpu", "batch_size": 8}
    return softlabel.generate(data, teachers=[spec], out=out, **{**fixed, **options})


def test_the_command_line_labels_texts_as_transformers_does(teacher: Path, data: str, tmp_path: Path) -> None:
    done = run_softlabel(
        "generate", "--data", f"{data}?key=id", "--teacher", f"text:{teacher}", "--out", tmp_path / "labels",
        "--encoding", "float32", "--temperature", 1, "--device", "cpu", "--batch-size", 8,
    )  # fmt: skip
    assert "1 of 45 texts are longer than a teacher takes" in done.stderr
    assert_logits(tmp_path / "labels", plain_logits(teacher, TEXTS))
    store = softlabel.open_store(tmp_path / "labels")
    assert store.run.input == "text"
    assert store.keys[0] == "s0"
    recorded = store.run.members[0].preprocessing
    assert recorded["max_length"] == 64
    assert len(recorded["tokenizer"]) == 64
    assert str(teacher) not in json.dumps(recorded)


def test_a_label_does_not_depend_on_the_batch(
    teacher: Path, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generate(data, teacher, tmp_path / "all")
    _, whole = stored(tmp_path / "all")
    caplog.clear()
    generate(data, teacher, tmp_path / "workers", workers=2, shard_rows=11)
    assert "1 of 45 texts are longer than a teacher takes" in caplog.text
    assert torch.equal(stored(tmp_path / "workers")[1], whole)
    for number in (0, 1, 9, 12):
        generate(f"{data}?rows={number}:{number + 1}", teacher, tmp_path / f"alone{number}")
        assert torch.equal(stored(tmp_path / f"alone{number}")[1][0], whole[number])


def test_samples_read_again_may_be_padded_to_another_length(teacher: Path, tmp_path: Path) -> None:
    """Before a run, the first texts of a batch are read again, without the long ones that follow."""
    texts = [f"a film of {number} words" for number in range(48)] + [f"{LONG[:150]} {number}" for number in range(16)]
    found = generate(write_parquet(tmp_path / "texts.parquet", texts), teacher, tmp_path / "labels", batch_size=64)
    assert found.total_bad == 0
    assert_logits(tmp_path / "labels", plain_logits(teacher, texts))


def test_an_ensemble_whose_members_have_tokenizers_of_their_own(teacher: Path, data: str, tmp_path: Path) -> None:
    other = save_classifier(tmp_path / "other", seed=7, positions=40)
    for turns in ("no", "yes"):
        softlabel.generate(
            data, teachers=[f"text:{teacher}", f"text:{other}"], out=tmp_path / turns, encoding="float32",
            temperature=1.0, device="cpu", batch_size=8, combine="logits", members_in_turn=turns,
        )  # fmt: skip
        assert_logits(tmp_path / turns, (plain_logits(teacher, TEXTS) + plain_logits(other, TEXTS)) / 2)


def test_pairs_of_texts(teacher: Path, tmp_path: Path) -> None:
    second = TEXTS[::-1]
    pq.write_table(pa.table({"a": TEXTS, "b": second}), tmp_path / "pairs.parquet")
    generate(f"{tmp_path}/pairs.parquet?text=a&text_pair=b", teacher, tmp_path / "labels")
    assert_logits(tmp_path / "labels", plain_logits(teacher, TEXTS, second))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_tables_in_plain_files(suffix: str, teacher: Path, tmp_path: Path) -> None:
    path, names = tmp_path / f"texts.{suffix}", ("neg", "neutral", "pos")
    (tmp_path / "classes.txt").write_text("\n".join(names))
    rows = [{"text": text, "who": f"k{n}", "label": names[LABELS[n]]} for n, text in enumerate(TEXTS)]
    with path.open("w", newline="") as file:
        if suffix == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["text", "who", "label"], delimiter="," if suffix == "csv" else "\t")
            writer.writerow({"text": " text", "who": "who ", "label": "label"})
            writer.writerows(rows)
    source = f"{path}?text=text&key=who&classes={tmp_path}/classes.txt"
    opened = softlabel.open_source(source)
    assert opened.labels().tolist() == LABELS
    assert opened.class_names == names
    generate(source, teacher, tmp_path / "labels")
    assert_logits(tmp_path / "labels", plain_logits(teacher, TEXTS))
    # The same texts under other keys in another medium have the same content.
    labels = softlabel.open_store(tmp_path / "labels")
    generate(write_parquet(tmp_path / "t.parquet", TEXTS), teacher, tmp_path / "other")
    assert np.array_equal(labels.content, softlabel.open_store(tmp_path / "other").content)


def test_equal_keys_of_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("who,text\nann,one\nbob,two\nann,three\n")
    with pytest.raises(SoftLabelError, match=r"'ann' \(samples 0 and 2\); name another column with '\?key=COLUMN'"):
        softlabel.open_source(f"{tmp_path}/t.csv?text=text&key=who")


def test_a_dataset_in_python(teacher: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    given = datasets.Dataset.from_dict({"idx": list(range(len(TEXTS))), "sentence": TEXTS, "label": LABELS})
    generate(given, teacher, tmp_path / "labels")
    assert_logits(tmp_path / "labels", plain_logits(teacher, TEXTS))


def test_both_texts_of_a_pair_in_python_are_read_and_others_reported(teacher: Path, tmp_path: Path) -> None:
    items = [{"question": one, "sentence": other, "note": "x"} for one, other in zip(TEXTS, TEXTS[::-1], strict=True)]
    generate(items, teacher, tmp_path / "labels")
    assert_logits(tmp_path / "labels", plain_logits(teacher, TEXTS, TEXTS[::-1]))
    (left_out,) = softlabel.open_source(items).findings.left_out
    assert "'note' of an item is not read" in left_out


def test_texts_lose_the_side_that_transformers_cuts(teacher: Path, data: str, tmp_path: Path) -> None:
    folder = tmp_path / "left"
    shutil.copytree(teacher, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "truncation_side": "left"}))
    texts = [f"{LONG} {sentence}" for sentence in SENTENCES]
    generate(write_parquet(tmp_path / "long.parquet", texts), folder, tmp_path / "labels")
    assert_logits(tmp_path / "labels", plain_logits(folder, texts))
    assert not torch.allclose(plain_logits(folder, texts), plain_logits(teacher, texts), atol=1e-3)


@pytest.mark.slow
def test_many_batches_from_workers_do_not_use_up_the_open_files(teacher: Path, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "texts.parquet", [f"{SENTENCES[n % 8]} {n}" for n in range(3000)])
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 256; exec "$@"', "bash", sys.executable, "-m", "softlabel", "generate",
         "--data", path, "--teacher", f"text:{teacher}", "--out", str(tmp_path / "labels"), "--workers", "2",
         "--batch-size", "16", "--device", "cpu", "--no-preflight"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(softlabel.open_store(tmp_path / "labels")) == 3000


def test_a_text_that_is_not_unicode_is_a_bad_sample(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXTS[0], "half \ud83d", *TEXTS[2:8])))
    generate(f"{path}?text=text", teacher, tmp_path / "labels")
    assert list(softlabel.open_store(tmp_path / "labels").bad) == ["1"]


def test_a_changed_byte_is_refused_by_its_key(teacher: Path, data: str, tmp_path: Path) -> None:
    generate(data, teacher, tmp_path / "labels")
    changed = list(TEXTS)
    changed[3] = changed[3].replace("naïve", "naive")
    path = write_parquet(tmp_path / "changed.parquet", changed)
    done = run_softlabel(
        "train", "--data", path, "--labels", tmp_path / "labels", "--student", f"text:{teacher}", "--epochs", 1,
        "--batch-size", 8, "--out", tmp_path / "run", "--device", "cpu", code=2,
    )  # fmt: skip
    assert "'3' is not the one that was labelled" in done.stderr
    done = run_softlabel("verify", tmp_path / "labels", "--data", path, code=3)
    assert "differ from the labelled ones: 3" in done.stdout


def test_a_missing_text_is_a_bad_sample(teacher: Path, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "some.parquet", [TEXTS[0], None, *TEXTS[2:8]])
    assert generate(path, teacher, tmp_path / "labels").total_bad == 1
    whole_shard = write_parquet(tmp_path / "shard.parquet", [*SENTENCES, *[None] * 8])
    assert generate(whole_shard, teacher, tmp_path / "shards", shard_rows=8).total_bad == 8
    reason = "the row has no text, or one that is not valid Unicode"
    assert softlabel.open_store(tmp_path / "labels").bad == {"1": reason}


def test_a_student_of_fewer_layers_becomes_a_teacher(teacher: Path, data: str, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "bare", head=False, seed=3)
    generate(data, teacher, tmp_path / "labels")
    done = run_softlabel(
        "train", "--data", data, "--labels", tmp_path / "labels", "--student", f"text:{folder}?layers=1&max_length=24",
        "--epochs", 16, "--batch-size", 8, "--lr", 0.02, "--optimizer", "adamw", "--hard-weight", 0,
        "--soft-weight", 1, "--out", tmp_path / "run", "--device", "cpu",
    )  # fmt: skip
    assert "texts of a batch are longer than the student takes" in done.stderr
    for file in folder.iterdir():  # a run folder stands for itself
        file.unlink()
    found = softlabel.evaluate(tmp_path / "run", data, tmp_path / "labels", device="cpu")
    assert found.teacher_kl is not None
    assert found.teacher_kl < 0.35
    generate(data, f"run:{tmp_path}/run", tmp_path / "again")
    agree = (stored(tmp_path / "again")[1].argmax(1) == stored(tmp_path / "labels")[1].argmax(1)).float().mean()
    assert agree == pytest.approx(found.agreement, abs=1e-6)
    (tmp_path / "run" / "tokenizer.json").write_bytes((teacher / "tokenizer.json").read_bytes())
    with pytest.raises(SoftLabelError, match=r"tokenizer.json: expected sha256 .* with which the run was trained"):
        softlabel.evaluate(tmp_path / "run", data, device="cpu")


def test_the_last_layer_encodes_texts_too(teacher: Path, data: str, tmp_path: Path) -> None:
    generate(data, teacher, tmp_path / "dense")
    generate(data, teacher, tmp_path / "head", encoding="head")
    store = softlabel.open_store(tmp_path / "head")
    loader = softlabel.SoftLabelLoader(
        data, tmp_path / "head", batch_size=len(TEXTS), shuffle=False,
        preprocessing=student_preprocessing(f"text:{teacher}", kind="text"),
    )  # fmt: skip
    (batch,) = loader
    assert batch.inputs["input_ids"].shape == (len(TEXTS), 64)
    assert store.run.encoding.name == "head"


def test_inspect_plan_and_repair(teacher: Path, data: str, tmp_path: Path) -> None:
    run_softlabel("plan", "--data", data, "--teacher", f"text:{teacher}", "--device", "cpu")
    generate(data, teacher, tmp_path / "labels", shard_rows=16)
    before = stored(tmp_path / "labels")
    run_softlabel("inspect", tmp_path / "labels")
    (shard, *_) = sorted((tmp_path / "labels" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-7])
    run_softlabel("repair", tmp_path / "labels", "--data", data, "--teacher", f"text:{teacher}", "--device", "cpu")
    assert torch.equal(stored(tmp_path / "labels")[1], before[1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text:{bare}", "expected a trained classifier, found an encoder"),
        ("text:{teacher}?layers=1", "layers= makes the start of a student"),
        ("text:{teacher}?max_length=65", "expected at most 64, which its positions allow, found 65"),
        ("text:{teacher}?crop=3", "expected no option but layers, max_length, buckets, num_classes, found 'crop'"),
        ("text:{teacher}?buckets=8,4,64", "expected ascending lengths that end with max_length, 64"),
        ("text:{teacher}/nothing", "expected a folder with config.json"),
        ("zoo:cnn2@w.pt", "takes images, and the samples are texts|w.pt"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    spec: str, message: str, teacher: Path, data: str, tmp_path: Path
) -> None:
    bare = save_classifier(tmp_path / "bare", head=False)
    with pytest.raises(SoftLabelError, match=message):
        generate(data, spec.format(teacher=teacher, bare=bare), tmp_path / "labels")


def test_what_is_of_images_is_refused(teacher: Path, data: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is for images, found .*; leave --augment out"):
        generate(data, teacher, tmp_path / "labels", augment="crop-flip")
    with pytest.raises(UsageError, match=r"2 views are for images, found texts in .*; leave --views and --augment out"):
        generate(data, teacher, tmp_path / "labels", augment="crop-flip", views=2)
    with pytest.raises(UsageError, match="takes batches of many lengths; leave out --compile"):
        generate(data, teacher, tmp_path / "labels", compile=True)
    with pytest.raises(SoftLabelError, match="takes samples of kind text, and these are of kind image"):
        generate("digits", teacher, tmp_path / "labels")


def test_a_store_is_of_one_kind_and_one_activation(
    teacher: Path, data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generate(data, teacher, tmp_path / "labels", batch_size=16)
    assert "wrong preprocessing (tokenizer, max_length), or classes in another order" in caplog.text
    with pytest.raises(MismatchError, match="activation: the store has softmax, this run sigmoid"):
        generate(data, teacher, tmp_path / "labels", activation="sigmoid")
    columns = {"a": np.arange(len(TEXTS)) / 9, "b": np.ones(len(TEXTS)), "label": LABELS}
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    table = f"{tmp_path}/table.parquet?inputs=a,b"
    torch.save(build_mlp(2, 3).state_dict(), tmp_path / "mlp.pth")
    mlp = f"python:{__name__}:build_mlp@{tmp_path}/mlp.pth?inputs=2"
    with pytest.raises(MismatchError, match="kind of samples: the store has text, this run tensor"):
        generate(table, mlp, tmp_path / "labels")
    images = write_teacher(tmp_path / "images.safetensors", num_classes=10)
    with pytest.raises(MismatchError, match="kind of samples: the store has text, this run image"):
        generate("digits", images, tmp_path / "labels")
    done = run_softlabel("verify", tmp_path / "labels", "--data", table, code=3)
    assert "cannot be compared: samples of kind text were labelled, these are of kind tensor" in done.stdout
    next((tmp_path / "labels" / "shards").iterdir()).unlink()
    done = run_softlabel("repair", tmp_path / "labels", "--data", table, "--device", "cpu", code=2)
    assert "takes samples of kind text, and these are of kind tensor" in done.stderr


@pytest.mark.parametrize("name", ["sentence_polarity", "subjectivity"])
def test_real_sentences_and_a_real_encoder(name: str, tmp_path: Path) -> None:
    shared = find_shared_data()
    if shared is None or not (shared / "text" / name).is_dir():
        pytest.skip("no sentences in shared/data/text")
    folder = tmp_path / "teacher"
    shutil.copytree(minilm(), folder)
    add_head(folder)
    source = f"{shared}/text/{name}/test.parquet?rows=0:40&key=id"
    generate(source, folder, tmp_path / "labels")
    table = pq.read_table(shared / "text" / name / "test.parquet").slice(0, 40)
    assert_logits(tmp_path / "labels", plain_logits(folder, table["text"].to_pylist()))
    store = softlabel.open_store(tmp_path / "labels")
    assert store.keys.to_list() == table["id"].to_pylist()
    assert store.run.class_names is not None
    assert list(store.labels) == table["label"].to_pylist()
