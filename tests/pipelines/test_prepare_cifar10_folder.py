"""The script in data/ that writes class folders, run as a user runs it."""

import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from softlabel.dataset import open_source
from tests.support.commands import run_script
from tests.support.shared_data import ROOT

SCRIPT = ROOT / "data" / "prepare_cifar10_folder.py"


def prepare(source: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    return run_script(SCRIPT, source, out)


def test_class_folders_hold_the_same_bytes_and_labels(shared_data: Path, tmp_path: Path) -> None:
    table = pq.read_table(shared_data / "cifar10-jpeg" / "test.parquet").slice(0, 120)
    pq.write_table(table, tmp_path / "some.parquet")
    out = tmp_path / "out"
    first = prepare(tmp_path / "some.parquet", out)
    assert (first.returncode, first.stderr) == (0, "")
    assert "120 images written, 0 were there" in first.stdout
    folder = open_source(out)
    found = {(folder.class_names[sample.label], sample.raw) for sample in folder.read(range(len(folder)))}
    names = open_source(tmp_path / "some.parquet").class_names
    assert found == {(names[row["label"]], row["image"]["bytes"]) for row in table.to_pylist()}
    assert folder.class_names == names

    lost, changed = sorted(out.rglob("*.jpg"))[:2]
    lost.unlink()
    assert "1 images written, 119 were there" in prepare(tmp_path / "some.parquet", out).stdout
    changed.write_bytes(b"another image")
    refused = prepare(tmp_path / "some.parquet", out)
    assert refused.returncode == 1
    assert f"error: {changed}: is there with other content" in refused.stderr
    assert changed.read_bytes() == b"another image"


def test_a_source_without_classes_is_refused(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"x", "path": "a.jpg"}])
    pq.write_table(pa.table({"image": image}), tmp_path / "a.parquet")
    refused = prepare(tmp_path / "a.parquet", tmp_path / "out")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "expected labels with class names" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
