"""The README's commands and Python, run as they stand and in their order."""

import fcntl
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from softlabel.cli.main import COMMANDS
from tests.support.commands import isolate_command_line, make_environment, run_script, run_softlabel
from tests.support.shared_data import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh slow|sh|python)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
SHOWN = [(kind, block) for kind, block in BLOCKS if kind != "sh slow"]
# What the first block that begins so prints: of the output that is shown, what holds for any machine.
SAID = {
    "softlabel generate --data digits --teacher run:runs/teacher --temp": "^labels/digits: complete, 1,797 rows",
    "softlabel inspect": "^combine    logits at temperature 4$",
    "softlabel train --data digits --labels labels/digits --student": "^images  .*1,797\n+accuracy +0\\.9",
    "import torch\n\nimport softlabel\nfrom softlabel.models": "^epoch 1: loss ",
}


def execute(kind: str, block: str, folder: Path) -> str:
    """Run a block as a reader would; `softlabel` and Python in this process, which has imported torch already."""
    if kind == "python":
        with isolate_command_line(folder) as (out, _):
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
        return out.buffer.getvalue().decode()  # type: ignore[attr-defined]
    commands = [split(line) for line in block.replace("\\\n", " ").splitlines()]
    if all(words and words[0] == "softlabel" for words in commands):
        return "".join(run_softlabel(*words[1:], cwd=folder).stdout for words in commands)
    return in_shell(block, folder)


def split(line: str) -> list[str]:
    """The words of a line that calls one program; none of a line with anything else that a shell understands."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    found = list(words)
    special = any(set(word) <= set("();<>|&") for word in found) or set("$`*{") & set(line.split("'")[0])
    return [] if special else found


def in_shell(block: str, folder: Path) -> str:
    # Whoever follows the README has an activated environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", block],
        cwd=folder,
        env={**make_environment(), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def needed_by(number: int) -> list[int]:
    """The blocks before this one that write what it names, and what these need."""
    _, text = SHOWN[number]
    found: set[int] = set()
    for earlier in range(number):
        written = re.findall(r"--out (\S+)|out=\"([^\"]+)\"", SHOWN[earlier][1])
        if any(path in text for paths in written for path in paths if path):
            found |= {earlier, *needed_by(earlier)}
    return sorted(found)


def shown(number: int, folder: Path) -> str:
    """What a block prints, after those that it needs; each runs once, whatever process asks first."""
    for needed in needed_by(number):
        shown(needed, folder)
    printed = folder / f"{number}.txt"
    with (folder / f"{number}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            said = execute(*SHOWN[number], folder)
            printed.write_text(said)
    return printed.read_text()


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> Path:
    """The folder in which somebody follows the README; all processes of this run of the tests share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"reader-{testrun_uid}"
    folder.mkdir(exist_ok=True)
    return folder


def test_blocks_are_found() -> None:
    assert len(SHOWN) >= 6
    assert [needed_by(number) for number in range(3)] == [[], [0], [0, 1]]


@pytest.mark.parametrize("number", range(len(SHOWN)), ids=[block.split("\n")[0][:60] for _, block in SHOWN])
def test_what_the_readme_shows_runs(number: int, reader: Path) -> None:
    told = shown(number, reader)
    for start, line in SAID.items():
        if SHOWN[number][1].startswith(start):
            assert re.search(line, told, flags=re.MULTILINE), told


def test_the_shell_finds_the_command(reader: Path) -> None:
    shown(2, reader)
    assert in_shell(SHOWN[2][1], reader).rpartition(",")[0] == shown(2, reader).rpartition(",")[0]  # seconds follow


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_cifar_commands_run(tmp_path: Path, shared_data: Path) -> None:
    blocks = [block.replace("../shared/data", str(shared_data)) for kind, block in BLOCKS if kind == "sh slow"]
    told = "\n".join(in_shell(block, tmp_path) for block in blocks)
    accuracy = re.search(r"^accuracy +([0-9.]+)$", told, flags=re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.7


def test_every_option_that_the_readme_names_exists() -> None:
    helps = "".join(run_softlabel(command, "--help").stdout for command in COMMANDS)
    helps += (ROOT / "tests" / "gpu" / "__main__.py").read_text()  # `python -m tests.gpu` is in it too
    # Options of other programs stand on lines that call these.
    ours = "\n".join(line for line in README.splitlines() if not re.search(r"\bdask (scheduler|worker)\b", line))
    for option in set(re.findall(r"`(--[a-z_-]+)", ours)) | set(re.findall(r" (--[a-z-]+) ", ours)):
        assert option in helps, f"{option} is in the README and in no --help"


def test_the_quickstart_tells_where_things_are(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn for its handwritten digits")
    done = run_script(ROOT / "pipelines" / "quickstart.py", "--out", "demo", "--epochs", 6, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    for line in ("student, hard labels alone", "student, soft labels"):
        assert re.search(rf"^{line} +0\.\d+ +\d+\.\d+ +0\.\d+$", out, flags=re.MULTILINE), out
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo" / "labels" / "manifest.json").is_file()
