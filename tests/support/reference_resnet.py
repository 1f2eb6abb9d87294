"""An independent forward pass of the CIFAR teachers: straight from a checkpoint's tensors, image by plain PIL decode.

Nothing of softlabel is imported here. N images, C classes.
"""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)


def read_rows(path: Path, rows: int | None = None) -> tuple[list[str], Tensor, Tensor]:
    """Keys, pixels in [0, 1] (N, 3, 32, 32) and labels of a Parquet file in the Hugging Face image layout."""
    table = pq.read_table(path).slice(0, rows)
    images = table["image"].to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in images])
    pixels_NCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return [image["path"] for image in images], pixels_NCHW, torch.tensor(table["label"].to_pylist())


def read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def logits(weights: dict[str, Tensor], pixels_NCHW: Tensor, batch: int = 500) -> Tensor:
    """(N, C) float32 logits of a CIFAR ResNet with option A shortcuts (He et al. 2015, section 4.2)."""

    def norm(x: Tensor, name: str) -> Tensor:
        w = {part: weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")}
        return F.batch_norm(x, w["running_mean"], w["running_var"], w["weight"], w["bias"], training=False)

    def forward(x: Tensor) -> Tensor:
        x = F.relu(norm(F.conv2d((x - MEAN) / STD, weights["conv1.weight"], padding=1), "bn1"))
        for stage in (1, 2, 3):
            block = 0
            while f"layer{stage}.{block}.conv1.weight" in weights:
                name = f"layer{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                y = F.relu(norm(F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
                y = norm(F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
                if stride == 2:
                    x = x[:, :, ::2, ::2]
                    extra = y.shape[1] - x.shape[1]
                    x = F.pad(x, (0, 0, 0, 0, extra // 2, extra // 2))
                x = F.relu(x + y)
                block += 1
        return F.linear(x.mean(dim=(2, 3)), weights["linear.weight"], weights["linear.bias"])

    with torch.inference_mode():
        return torch.cat([forward(part) for part in pixels_NCHW.split(batch)])
