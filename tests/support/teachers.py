"""Teachers for tests whose logits are their input, so that a store holds the pixels that its teacher saw."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

TOP = 1000.0  # a logit above all pixels, so that the maximum that a store subtracts is known


class Pixels(nn.Module):
    """Logits that are the pixels, 0 to 255, and one more: (B, 3 * S * S + 1). Takes images in [0, 1]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images_BCHW: Tensor) -> Tensor:
        flat_BC = (images_BCHW * 255).round().contiguous().flatten(1)
        assert flat_BC.shape[1] == self.num_classes - 1, flat_BC.shape
        return torch.cat([flat_BC, torch.full((len(flat_BC), 1), TOP)], dim=1)


def pixels(side: int = 32) -> nn.Module:
    return Pixels(3 * int(side) ** 2 + 1)


def spec(side: int, options: str = "") -> str:
    return f"python:tests.support.teachers:pixels?side={side}&mean=[0,0,0]&std=[1,1,1]{options}"


def seen(scaled_logits: NDArray[np.float32], side: int) -> NDArray[np.uint8]:
    """The pixels that a row of such a teacher at temperature 1 tells of, uint8 (B, 3, S, S)."""
    flat_BC = scaled_logits[:, :-1] - scaled_logits[:, -1:] + TOP
    assert np.array_equal(flat_BC, np.rint(flat_BC))
    return flat_BC.astype(np.uint8).reshape(-1, 3, side, side)
