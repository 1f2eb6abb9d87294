"""Teachers on a CUDA device give the labels that they give on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from softlabel.models import build_model
from softlabel.teacher import load_teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("fp16", 0.02), ("bf16", 0.1)])
def test_logits_equal_those_of_the_cpu(tmp_path: Path, precision: Any, tolerance: float) -> None:
    torch.manual_seed(0)
    torch.save(build_model("zoo:resnet20").state_dict(), tmp_path / "w.pt")
    images_BCHW = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    expected = load_teacher(f"zoo:resnet20@{tmp_path}/w.pt").logits(images_BCHW)
    teacher = load_teacher(f"zoo:resnet20@{tmp_path}/w.pt", device="cuda", precision=precision)
    before = torch.backends.cudnn.allow_tf32
    found = teacher.logits(images_BCHW)
    assert found.device.type == "cuda"
    assert torch.backends.cudnn.allow_tf32 == before
    assert float((found.cpu() - expected).abs().max() / expected.abs().max()) < tolerance
