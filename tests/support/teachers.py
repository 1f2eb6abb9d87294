"""Teachers for tests: small networks with random weights, and one whose logits are the pixels that it is given."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from softlabel.models import build_model
from tests.support.datasets import CLASSES

TOP = 1000.0  # a logit above all pixels, so that the maximum that a store subtracts is known


def write_teacher(path: Path, *, name: str = "resnet8", num_classes: int = len(CLASSES), seed: int = 0) -> str:
    """A checkpoint with random weights that are large enough to give varied logits; returns its SPEC."""
    torch.manual_seed(seed)
    model = build_model(f"zoo:{name}", num_classes=num_classes)
    state = model.state_dict()
    state["linear.weight"] *= 8
    save_file(state, path)
    return f"zoo:{name}@{path}"


class PixelTeacher(nn.Module):
    """Logits that are the pixels, 0 to 255, and one more: (B, 3 * S * S + 1). Takes images in [0, 1]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images_BCHW: Tensor) -> Tensor:
        flat_BC = (images_BCHW * 255).round().contiguous().flatten(1)
        assert flat_BC.shape[1] == self.num_classes - 1, flat_BC.shape
        return torch.cat([flat_BC, torch.full((len(flat_BC), 1), TOP)], dim=1)


def build_pixel_teacher(side: int = 32) -> nn.Module:
    return PixelTeacher(3 * int(side) ** 2 + 1)


def make_pixel_teacher_spec(side: int, options: str = "") -> str:
    return f"python:tests.support.teachers:build_pixel_teacher?side={side}&mean=[0,0,0]&std=[1,1,1]{options}"


def read_pixels(scaled_logits: NDArray[np.float32], side: int) -> NDArray[np.uint8]:
    """The pixels that such a teacher was given, from its labels at temperature 1: uint8 (B, 3, S, S)."""
    flat_BC = scaled_logits[:, :-1] - scaled_logits[:, -1:] + TOP
    assert np.array_equal(flat_BC, np.rint(flat_BC))
    return flat_BC.astype(np.uint8).reshape(-1, 3, side, side)
