"""The recipes in pipelines/ that train in loops of other libraries, run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import softlabel
from tests.support.commands import make_environment, run_script
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.language_runs import make_config as make_language_config
from tests.support.language_runs import write_documents
from tests.support.shared_data import ROOT
from tests.support.stores import draw_logits, write_logits
from tests.support.texts import save_classifier

KEYS = [f"digit-{number:04d}.jpg" for number in range(500)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 digits, and a store of a teacher that knows their classes."""
    folder = tmp_path_factory.mktemp("pipelines")
    images, labels = make_digit_jpegs()
    images, labels = images[: len(KEYS)], labels[: len(KEYS)]
    write_parquet(folder / "digits.parquet", images, keys=KEYS, labels=labels, class_names=DIGITS)
    logits_NC = draw_logits(len(KEYS), 10) / 5
    logits_NC[range(len(KEYS)), labels] += 8
    write_logits(folder / "labels", KEYS, logits_NC, images=images, labels=labels, class_names=DIGITS, temperature=2)
    return folder


def run(recipe: str, folder: Path, *arguments: object) -> str:
    script = ROOT / "pipelines" / recipe
    assert len(script.read_text().splitlines()) < 150
    done = subprocess.run(
        [sys.executable, str(script), "--data", "digits.parquet", "--labels", "labels", *map(str, arguments)],
        cwd=folder,
        env={**make_environment(), "HF_DATASETS_CACHE": str(folder / "hf"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_student_trains_in_lightning_and_is_a_spec(digits: Path) -> None:
    pytest.importorskip("lightning", reason="needs the extra 'lightning'")
    arguments = ("--student", "zoo:resnet8?resize=16&crop=16", "--out", "runs/lightning", "--batch-size", 50)
    output = run("lightning_student.py", digits, *arguments, "--epochs", 4)
    accuracy = float(re.search(r"accuracy ([0-9.]+), agreement", output)[1])  # type: ignore[index]
    assert accuracy > 0.8
    found = softlabel.evaluate(digits / "runs/lightning", digits / "digits.parquet", progress=False)
    assert found.accuracy == pytest.approx(accuracy, abs=1e-4)


def test_a_hugging_face_model_trains_in_its_trainer(digits: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    pytest.importorskip("datasets", reason="needs Hugging Face datasets")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    output = run("hf_trainer.py", digits, "--out", "runs/vit", "--epochs", 12)
    assert float(re.search(r"accuracy ([0-9.]+)", output)[1]) > 0.4  # type: ignore[index]
    assert (digits / "runs/vit/model.safetensors").is_file()


@pytest.mark.slow
def test_a_network_learns_a_table_from_a_forest(tmp_path: Path) -> None:
    pytest.importorskip("skl2onnx", reason="writes scikit-learn's forests as ONNX")
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    script = ROOT / "pipelines" / "table_student.py"
    assert len(script.read_text().splitlines()) < 150
    done = subprocess.run(
        [sys.executable, str(script), "--out", "demo", "--epochs", "40", "--trees", "30"],
        cwd=tmp_path, env=make_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    accuracies = re.findall(r"^(forest|student, .*?) +([0-9.]+) ", done.stdout, flags=re.MULTILINE)
    assert [name for name, _ in accuracies] == ["forest", "student, hard labels alone", "student, soft labels"]
    assert all(float(accuracy) > 0.7 for _, accuracy in accuracies)


def test_a_small_text_student_learns_from_hard_and_from_soft_labels(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
    encoder = save_classifier(tmp_path / "encoder", head=False, layers=3)
    texts = [f"{'a bad film' if number % 2 else 'what a delight'} {number}" for number in range(60)]
    table = pa.table({"text": texts, "label": [number % 2 for number in range(60)]})
    pq.write_table(table, tmp_path / "train.parquet")
    script = ROOT / "pipelines" / "text_student.py"
    assert len(script.read_text().splitlines()) < 150
    done = run_script(
        script, "--data", tmp_path / "train.parquet", "--eval-data", tmp_path / "train.parquet", "--encoder", encoder,
        "--labelled", 40, "--seeds", 2, "--max-length", 16, "--batch-size", 10, "--teacher-epochs", 8, "--epochs", 2,
        "--out", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"teacher: accuracy 0\.\d|teacher: accuracy 1\.0", done.stdout)
    assert re.search(r"hard labels: accuracy [01]\.\d+ \+- .*\nsoft labels: accuracy [01]\.\d+ \+- ", done.stdout)
    assert softlabel.open_store(tmp_path / "out" / "labels").run.dataset.rows == 60


def test_a_small_language_model_learns_from_next_tokens_and_from_a_teacher(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    from tests.support.language_models import write_language_model

    network = write_language_model(tmp_path / "network", "llama", rows=270, tie_word_embeddings=True)
    write_documents(tmp_path / "data.jsonl", count=60)
    teacher = tmp_path / "teacher"
    taught = make_language_config(tmp_path, teacher, student=f"lm:{network}", labels=None, lr=0.01, epochs=20)
    softlabel.train(taught)
    script, data = ROOT / "pipelines" / "lm_student.py", f"{tmp_path / 'data.jsonl'}?key=id"
    assert len(script.read_text().splitlines()) < 150
    done = run_script(
        script, "--teacher", teacher, "--data", data, "--eval-data", data, "--out", tmp_path / "out", "--layers", 1,
        "--max-length", 64, "--pack", 64, "--batch-tokens", 256, "--top-k", 200, "--epochs", 8, "--lr", 0.01,
        "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pattern = r"^(hard|soft) labels: NLL ([0-9.]+), .*KL\(teacher \|\| student\) ([0-9.]+)"
    found = re.findall(pattern, done.stdout, flags=re.MULTILINE)
    assert [name for name, _, _ in found] == ["hard", "soft"]
    assert all(float(divergence) < 1.5 for _, _, divergence in found)
    evaluated = softlabel.evaluate(tmp_path / "out" / "soft", data, device="cpu", progress=False)
    assert f"{evaluated.cross_entropy:.4f}" == found[1][1]
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    recipe = ROOT / "pipelines" / "hf_lm_trainer.py"
    assert len(recipe.read_text().splitlines()) < 150
    done = run_script(
        recipe, "--teacher", teacher, "--data", data, "--labels", tmp_path / "out" / "labels", "--out",
        tmp_path / "hf", "--layers", 1, "--pack", 64, "--batch-tokens", 256, "--epochs", 4, "--lr", 0.01,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps, loss = re.search(r"hf: (\d+) steps, loss ([0-9.]+)", done.stdout).groups()  # type: ignore[union-attr]
    assert int(steps) > 8
    assert float(loss) < 5.5  # ln 270 = 5.6 in the beginning
    assert (tmp_path / "hf" / "model.safetensors").is_file()
