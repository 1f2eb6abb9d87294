"""The README and every page of the guide: their examples run as they stand, and what they name exists."""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from softlabel.cli.main import COMMANDS
from tests.support.commands import isolate_command_line, make_environment, run_script, run_softlabel
from tests.support.shared_data import ROOT

GUIDE = ROOT / "softlabel" / "guide"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, *sorted(GUIDE.glob("*.md"))]
FENCE = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n)?^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a block may be: run, run by the slow tests, the output of the block before it, a file, or a picture.
LANGUAGES = {"sh", "sh slow", "python", "text", "yaml", ""}
# Lines on which options of other programs stand.
OTHER_PROGRAMS = re.compile(r"\b(dask (scheduler|worker)|memory-limit|torchrun|gres)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block. `reason`: why it is not run; `shown`: the output that the page shows for it."""

    language: str
    text: str
    reason: str | None
    shown: str = ""


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page, those of output within the block that prints it."""
    blocks: list[Block] = []
    end = -1
    text = page.read_text()
    for found in FENCE.finditer(text):
        reason, language, body = found.groups()
        if language == "text" and found.start() == end + 1:
            last = blocks.pop()
            blocks.append(Block(language=last.language, text=last.text, reason=last.reason, shown=body))
        else:
            blocks.append(Block(language=language, text=body, reason=reason))
        end = found.end()
    return blocks


def execute(block: Block, folder: Path) -> str:
    """Run a block as a reader would; `softlabel` and Python in this process, which has imported torch already."""
    if name := re.match(r"# (\w+\.(py|yaml))\n", block.text):
        (folder / name[1]).write_text(block.text)
    if block.language == "yaml":
        assert name, f"{block.text}\nexpected the name of its file in the first line"
        return ""
    if block.language == "python":
        with isolate_command_line(folder) as (out, _):
            exec(compile(block.text, "page", "exec"), {"__name__": "__main__"})
        return out.buffer.getvalue().decode()  # type: ignore[attr-defined]
    commands = [split(line) for line in block.text.replace("\\\n", " ").splitlines()]
    if all(words and words[0] == "softlabel" for words in commands):
        done = [run_softlabel(*words[1:], cwd=folder) for words in commands]
        return "".join(one.stdout + one.stderr for one in done)
    return in_shell(block.text, folder)


def split(line: str) -> list[str]:
    """The words of a line that calls one program; none of a line with anything else that a shell understands."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    found = list(words)
    special = any(set(word) <= set("();<>|&") for word in found) or set("$`*{") & set(line.split("'")[0])
    return [] if special else found


def in_shell(block: str, folder: Path) -> str:
    # A reader has an activated environment.
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


def pattern_of(line: str) -> str:
    """A line of output with its hashes, numbers and widths of columns taken out."""
    line = re.sub(r"\b[0-9a-f]{32,}\b", "HASH", line)
    return " ".join(re.sub(r"\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "N", line).split())


def follow(page: Path, folder: Path, languages: tuple[str, ...] = ("sh", "python", "yaml")) -> str:
    """Run the blocks of a page in their order and compare what they print with what the page shows."""
    everything = ""
    for block in read_blocks(page):
        if block.language in languages and block.reason is None:
            printed = execute(block, folder)
            found = {pattern_of(line) for line in printed.splitlines()}
            for line in filter(str.strip, block.shown.splitlines()):
                assert pattern_of(line) in found, f"{page.name} shows {line!r}, found\n{printed}"
            everything += printed
    return everything


@pytest.fixture(scope="session")
def after_readme(tmp_path_factory: pytest.TempPathFactory, testrun_uid: str) -> Path:
    """The folder in which the README was followed, once for all processes of this run of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"readme-{testrun_uid}"
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "printed.txt").exists():
            printed = follow(README, folder)
            (folder / "printed.txt").write_text(printed)
    return folder


def test_the_readme_runs(after_readme: Path) -> None:
    accuracy = re.search(r"^accuracy +([0-9.]+)$", (after_readme / "printed.txt").read_text(), flags=re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9
    assert len(README.read_text().splitlines()) <= 150


LONG = {"cluster"}  # tests/cluster runs what the page runs, with more to check


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem in LONG), id=page.stem) for page in PAGES[1:]],
)
def test_the_examples_of_a_page_run(page: Path, after_readme: Path, tmp_path: Path) -> None:
    follow(page, shutil.copytree(after_readme, tmp_path / "reader"))


def test_the_shell_finds_the_command(after_readme: Path) -> None:
    assert "labels/digits: whole. 1,797 rows" in in_shell("softlabel verify labels/digits", after_readme)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_cifar_commands_run(tmp_path: Path, shared_data: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data").symlink_to(shared_data)
    (tmp_path / "reader").mkdir()
    printed = "".join(follow(page, tmp_path / "reader", ("sh slow",)) for page in PAGES)
    accuracy = re.search(r"^accuracy +([0-9.]+)$", printed, flags=re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.7


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.stem)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in read_blocks(page):
        assert block.language in LANGUAGES, block
        if block.reason is not None:
            assert block.language in ("sh", "python"), block
            assert len(block.reason.split()) >= 3, block
        if block.language in ("text", ""):
            assert not re.search(r"^\W*(softlabel|pip|python|import|from) ", block.text, flags=re.MULTILINE), block
    # Every fence belongs to a block, so that none is missed.
    assert page.read_text().count("\n```") == 2 * len(FENCE.findall(page.read_text()))


def options_named(page: Path) -> Iterator[str]:
    for line in page.read_text().splitlines():
        if not OTHER_PROGRAMS.search(line):
            yield from re.findall(r"(?<![\w-])--[a-z][a-z_-]*", line)


def test_options_and_pages_name_each_other() -> None:
    """What a page names is an option of a command, and every option of a command has its place in the guide."""
    helps = {command: run_softlabel(command, "--help").stdout for command in COMMANDS}
    known = set(re.findall(r"--[a-z_-]+", "".join(helps.values()))) | {"--version", "--help"}
    for page in PAGES:
        assert not (unknown := set(options_named(page)) - known), f"{page.name}: {unknown}"
    guide = {option for page in PAGES[1:] for option in options_named(page)}
    offered = {option for text in helps.values() for option in re.findall(r"^ +(--[a-z_-]+)", text, flags=re.MULTILINE)}
    assert not (offered - guide), offered - guide


def paths_named(page: Path) -> Iterator[str]:
    """Files and folders of the repository that a page names, the tree of the architecture's page among them."""
    text = page.read_text()
    yield from re.findall(r"`((?:softlabel|tests|pipelines|data)/[\w/.-]*)`", text)
    folders: list[str] = []
    for lead, entry in re.findall(r"^((?:│   |    )*)[├└]── (.+)$", text, flags=re.MULTILINE):
        listed = re.split(r" {2,}", entry, maxsplit=1)[0].removesuffix(", ...")
        folders[len(lead) // 4 :] = [listed]
        for name in listed.split(", "):
            yield "/".join(["softlabel", *(folder.rstrip("/") for folder in folders[:-1]), name])


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    if absent := [path for path in paths_named(page) if not (ROOT / path).exists() and "NAME" not in path]:
        pytest.fail(f"{page.name} names {', '.join(absent)}")


def test_the_tree_has_every_package() -> None:
    listed = {path.split("/")[1] for path in paths_named(GUIDE / "architecture.md") if path.startswith("softlabel/")}
    assert listed >= {path.parent.name for path in (ROOT / "softlabel").glob("*/__init__.py")}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for place in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in place:
            name, _, anchor = place.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {place}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {place}"


def test_the_quickstart_prints_its_results(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn for its handwritten digits")
    done = run_script(ROOT / "pipelines" / "quickstart.py", "--out", "demo", "--epochs", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    for line in ("student, hard labels alone", "student, soft labels"):
        assert re.search(rf"^{line} +0\.\d+ +\d+\.\d+ +0\.\d+$", out, flags=re.MULTILINE), out
    assert (tmp_path / "demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo" / "labels" / "manifest.json").is_file()
    assert "report  demo/report.html" in out
    assert (tmp_path / "demo" / "report.html").read_text().startswith("<!doctype html>")
