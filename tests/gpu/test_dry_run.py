"""`python -m tests.gpu` as it runs on a lent machine: from a copy of the tree without git and without a network."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.__main__ import PARTS
from tests.support.shared_data import ROOT


def test_every_benchmark_with_a_cuda_part_and_every_gpu_mark_is_reached() -> None:
    benchmarks = {path.stem for path in (ROOT / "tests" / "benchmarks").glob("bench_*_gpu.py")}
    assert benchmarks == {part.command[0].rpartition(".")[2] for part in PARTS if part.is_benchmark}
    marked = {
        path.parent.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text()
        and any(
            isinstance(node, ast.Attribute) and node.attr == "gpu" and ast.unparse(node) == "pytest.mark.gpu"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert marked == {"tests/gpu"}
    assert ("pytest", "tests/gpu") in {part.command[:2] for part in PARTS}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_dry_run_from_a_copy_without_git_or_network(tmp_path: Path) -> None:
    copy, tools = tmp_path / "tree", tmp_path / "tools"
    left_out = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "demo", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=left_out)
    tools.mkdir()
    for name in ("gcc", "g++", "ld", "as", "sh", "uname"):  # torch may compile; git is not among them
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    command = [sys.executable, "-m", "tests.gpu", "--dry-run", "--minutes", "15", "--out", str(tmp_path / "out")]
    offline = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") and not subprocess.run([*offline, "true"], check=False, capture_output=True).returncode:
        command = [
            str(shutil.which("unshare")),
            *offline[1:],
            "sh",
            "-c",
            'ip link set lo up 2>/dev/null; "$@"',
            "-",
            *command,
        ]
        for name in ("ip",):
            if (found := shutil.which(name)) is not None:
                (tools / name).symlink_to(found)
    environment = {**os.environ, "PATH": str(tools), "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert {part["state"] for part in found["parts"]} == {"done"}
    assert sum(part["passed"] for part in found["parts"]) >= 20
    assert "== only a CUDA device can run" in done.stdout
    for name in ("test_the_loop_never_makes_the_host_wait", "idle share of the device", "share of copy"):
        assert name in done.stdout
