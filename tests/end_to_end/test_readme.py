"""The README's commands and Python, run as they stand and in their order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from softlabel.cli import COMMANDS
from tests.conftest import ROOT
from tests.helpers import environment

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh slow|sh|python)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def execute(kind: str, block: str, folder: Path, timeout: int) -> str:
    # Whoever follows the README has an activated environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-c", block] if kind == "python" else ["sh", "-e", "-c", block]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**environment(), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_what_the_readme_shows_runs(tmp_path: Path) -> None:
    blocks = [(kind, block) for kind, block in BLOCKS if kind != "sh slow"]
    assert len(blocks) >= 6
    shown = {block: execute(kind, block, tmp_path, timeout=200) for kind, block in blocks}
    told = "\n".join(shown.values())
    # Every line of shown output without a number of its own is there to the letter.
    for line in (
        "labels/digits: complete, 1,797 rows",
        "combine    logits at temperature 4",
        "images  ",
        "epoch 1: loss",
    ):
        assert line in told
    accuracy = float(re.search(r"^accuracy +([0-9.]+)$", told, flags=re.MULTILINE)[1])  # type: ignore[index]
    assert accuracy > 0.9


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_cifar_commands_run(tmp_path: Path, shared_data: Path) -> None:
    blocks = [block.replace("../shared/data", str(shared_data)) for kind, block in BLOCKS if kind == "sh slow"]
    told = "\n".join(execute("sh", block, tmp_path, timeout=7000) for block in blocks)
    accuracy = re.search(r"^accuracy +([0-9.]+)$", told, flags=re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.7


def test_every_option_that_the_readme_names_exists() -> None:
    helps = ""
    for command in COMMANDS:
        helps += execute("sh", f"softlabel {command} --help", ROOT, timeout=60)
    # Options of other programs stand on lines that call these.
    ours = "\n".join(line for line in README.splitlines() if not re.search(r"\bdask (scheduler|worker)\b", line))
    for option in set(re.findall(r"`(--[a-z_-]+)", ours)) | set(re.findall(r" (--[a-z-]+) ", ours)):
        assert option in helps, f"{option} is in the README and in no --help"


def test_the_quickstart_tells_where_things_are(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn for its handwritten digits")
    script = ROOT / "pipelines" / "quickstart.py"
    out = execute("sh", f"{sys.executable} {script} --out demo --epochs 8", tmp_path, timeout=280)
    for line in ("student, hard labels alone", "student, soft labels"):
        assert re.search(rf"^{line} +0\.\d+ +\d+\.\d+ +0\.\d+$", out, flags=re.MULTILINE), out
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo" / "labels" / "manifest.json").is_file()
