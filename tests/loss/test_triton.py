"""The Triton kernels against the same matrix: on a GPU where there is one, else in Triton's interpreter on the CPU.

The interpreter has to be chosen before triton is imported, which another test of the same process may have done, so a
process of its own runs `triton_interpreter.py`. The interpreter truncates bfloat16 instead of rounding it, and runs
programs one after another.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.shared_data import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is absent")


def run_inside(marks: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    options = ["-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "-m", marks, "--timeout", "3000"]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name("triton_interpreter.py"))]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_a_slice_of_the_matrix() -> None:
    run_inside("not slow")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_matrix() -> None:
    run_inside("slow")
