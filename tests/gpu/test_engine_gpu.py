"""The pipeline on a CUDA device: the labels of the CPU, whatever overlaps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softlabel
from tests.helpers import write_dataset, write_teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2}, {"stack": "yes"}, {"members_in_turn": "yes"}])
def test_labels_equal_those_of_the_cpu(tmp_path: Path, options: dict[str, Any]) -> None:
    data = write_dataset(tmp_path / "images.parquet", 300)
    teachers = [write_teacher(tmp_path / f"{seed}.safetensors", seed=seed) for seed in range(2)]
    found = []
    for device, more in (("cpu", {}), ("cuda", options)):
        out = tmp_path / device
        softlabel.generate(
            data, teachers=teachers, out=out, device=device, batch_size=32, shard_rows=100, progress=False, **more
        )
        with softlabel.open_store(out, verify="full") as store:
            found.append(np.array(store.take(np.arange(300)).scaled_logits, dtype=np.float64))
    assert np.abs(found[0] - found[1]).max() <= 2e-3 * np.abs(found[0]).max()
