"""The recipe of a teacher-assistant chain, on digits."""

import re
from pathlib import Path

import pytest

from softlabel import open_store
from tests.support.commands import run_script
from tests.support.shared_data import ROOT

SMALL = "?resize=16&crop=16"


def test_a_chain_is_one_command(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn for its handwritten digits")
    command = ["--out", tmp_path / "chain"]
    command += ["--data", "digits?rows=0:200", "--eval-data", "digits?rows=200:260", "--epochs", "1"]
    command += ["--teacher", f"zoo:resnet8{SMALL}", "--assistant", f"zoo:cnn4{SMALL}", "--student", f"zoo:cnn2{SMALL}"]
    done = run_script(ROOT / "pipelines" / "teacher_assistant.py", *command)
    assert done.returncode == 0, done.stderr
    assert "assistant-1 cnn4: learned from teacher" in done.stdout
    assert "student cnn2: learned from assistant-1" in done.stdout
    for name in ("teacher", "assistant-1", "student", "student, without assistants", "student, hard labels alone"):
        assert re.search(rf"^{name} +0\.\d+ +\d+\.\d+$", done.stdout, flags=re.MULTILINE), done.stdout
    # Each store holds what the one above says: the assistant's labels are not the teacher's.
    members = [open_store(tmp_path / "chain" / "labels" / one).run.members for one in ("teacher", "assistant-1")]
    assert [one[0].spec for one in members] == ["run:teacher", "run:assistant-1"]
    assert members[0][0].sha256 != members[1][0].sha256
