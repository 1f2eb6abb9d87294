"""What Dask's nanny sets in the environment of a worker, and what a worker makes of it."""

import ctypes
import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from softlabel.generation.malloc import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
frozen = faults()
keep_freed_memory()
faults()
print(frozen, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.parametrize("threshold", [65536, 1 << 30])
def test_memory_of_a_freed_tensor_is_reused(threshold: int) -> None:
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": str(threshold), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    frozen, kept = map(int, done.stdout.split())
    assert frozen >= 50, "whatever its value, the variable freezes the limit above which blocks are mapped"
    assert kept * 10 < frozen
