"""Inputs and habits that users of such tools have reported in public: what each must come to, one entry a report.

A new report is one more `Case` in the table of its kind. `make` writes the files into an empty folder, which is also the
working folder, and returns the command line; the command runs in this process, as `softlabel` would.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from softlabel.cli import main


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input, the command that meets it, and what has to come of it.

    Attributes:
        name: of the test.
        make: writes the input into a folder; returns the arguments of the command.
        code: the exit code.
        says: regular expressions, each found in what the command prints, on either stream.
        never: regular expressions, none of which is found there.
        check: looks at what the command left in the folder.
    """

    name: str
    make: Callable[[Path], Sequence[object]]
    code: int = 0
    says: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    check: Callable[[Path], None] | None = None

    def __str__(self) -> str:
        return self.name


# ---- datasets ----


def empty_folder(folder: Path) -> list[object]:
    (folder / "images").mkdir()
    return ["generate", "--data", "images", "--teacher", "zoo:resnet8@w.pt", "--out", "labels"]


DATA = [
    Case(name="an empty folder", make=empty_folder, code=2, says=("images: expected images, .* found 0 other files",)),
]

# ---- teachers ----

TEACHERS: list[Case] = []

# ---- stores ----

STORES: list[Case] = []

# ---- command lines ----

COMMANDS: list[Case] = []


@pytest.mark.parametrize("case", [*DATA, *TEACHERS, *STORES, *COMMANDS], ids=str)
def test_input(
    case: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(argument) for argument in case.make(tmp_path)]
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    # pytest takes the log lines, which a user sees on standard error.
    printed = "\n".join([*capsys.readouterr(), caplog.text])
    assert code == case.code, printed
    for pattern in case.says:
        assert re.search(pattern, printed), f"expected {pattern!r} in\n{printed}"
    for pattern in case.never:
        assert not re.search(pattern, printed), f"unexpected {pattern!r} in\n{printed}"
    if case.check is not None:
        case.check(tmp_path)
