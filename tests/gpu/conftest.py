"""Where tests of a CUDA device run: on one, or, in the runner's dry run, on the CPU as far as the CPU can."""

import os

import pytest
import torch

DRY_RUN = os.environ.get("SOFTLABEL_GPU_DRY_RUN") == "1"


@pytest.fixture
def device() -> str:
    """The CUDA device; the CPU in a dry run."""
    if torch.cuda.is_available():
        return "cuda"
    if DRY_RUN:
        return "cpu"
    pytest.skip("needs a CUDA device")


@pytest.fixture
def cuda() -> str:
    """The CUDA device, for what no CPU can stand in for."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"
