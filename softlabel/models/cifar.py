"""The small CIFAR networks of the distillation literature that torchvision lacks.

Legend: B batch, C classes, H and W height and width.

ResNet-8 to 110 are He et al. 2015, section 4.2, with option A shortcuts (no parameters), or with ``shortcut=B`` (a 1x1
convolution and a batch norm where the shape changes). The names in their state dict are those of the most used
checkpoints (Y. Idelbayev's): ``conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2,shortcut}, linear``. The plain CNNs of
2 to 10 weight layers are those that Mirzadeh et al. 2019 ("Improved knowledge distillation via teacher assistant") use:
for CIFAR-10 as they are; for CIFAR-100 the 2 and 4 layer nets with ``width=2``, and the 10 layer net with a hidden
layer of 512, which it has from 100 classes on.

All take float (B, 3, H, W), in either memory layout, and give logits (B, C). They are meant for 32x32, and run from
8x8 upwards: the ResNets average over whatever grid is left, the CNNs pool it to the grid that 32x32 leaves.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is the identity where the shape stays.

    Otherwise it is of option A: every second pixel, and zeros for the new channels; or of option B: a 1x1 convolution
    and a batch norm.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        # New channels come half before and half after the old ones: the order that the checkpoints were trained with.
        self.new_before = (channels - channels_in) // 2
        self.new_after = channels - channels_in - self.new_before
        self.shortcut: nn.Module | None = None
        if shortcut == "B" and (stride != 1 or channels != channels_in):
            convolution = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.shortcut is not None:
            shortcut = self.shortcut(x)
        elif self.stride != 1 or self.new_after:
            shortcut = x[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.new_before, self.new_after))
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """`depth` is 6n + 2: one convolution, three stages of n blocks with 16, 32, 64 channels, one linear layer.

    Raises ValueError for a shortcut that is neither "A" nor "B".
    """

    def __init__(self, depth: int, num_classes: int = 10, shortcut: str = "A") -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut: expected A or B, found {shortcut!r}")
        blocks, rest = divmod(depth - 2, 6)
        assert rest == 0, depth
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1, shortcut=shortcut)
        self.layer2 = _stage(blocks, 16, 32, stride=2, shortcut=shortcut)
        self.layer3 = _stage(blocks, 32, 64, stride=2, shortcut=shortcut)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits_BC: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits_BC


def _stage(blocks: int, channels_in: int, channels: int, *, stride: int, shortcut: str) -> nn.Sequential:
    first = Block(channels_in, channels, stride, shortcut)
    return nn.Sequential(first, *(Block(channels, channels, 1, shortcut) for _ in range(blocks - 1)))


# Groups of convolutions between the 2x2 max pools, then the hidden linear layers; the last linear layer comes on top.
_PLAIN: dict[int, tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    2: (((16,), (16,)), ()),
    4: (((16, 16), (32, 32)), ()),
    6: (((16, 16), (32, 32), (64, 64)), ()),
    8: (((16, 16), (32, 32), (64, 64), (128, 128)), (64,)),
    10: (((32, 32), (64, 64), (128, 128), (256, 256, 256, 256)), (128,)),
}
# Of the net of 10 layers, from so many classes on.
_HIDDEN_OF_MANY, _MANY = {10: (512,)}, 100


class PlainCNN(nn.Module):
    """3x3 convolutions with batch norm and ReLU, a 2x2 max pool after each group, linear layers on the grid."""

    def __init__(self, layers: int, num_classes: int = 10, width: int = 1) -> None:
        super().__init__()
        groups, hidden = _PLAIN[layers]
        if num_classes >= _MANY:
            hidden = _HIDDEN_OF_MANY.get(layers, hidden)
        features: list[nn.Module] = []
        channels = 3
        for group in groups:
            for filters in group:
                features += [
                    nn.Conv2d(channels, width * filters, 3, padding=1),
                    nn.BatchNorm2d(width * filters),
                    nn.ReLU(inplace=True),
                ]
                channels = width * filters
            # ceil_mode changes nothing at 32x32 and keeps the last pool of an 8x8 input from having nothing to pool.
            features.append(nn.MaxPool2d(2, ceil_mode=True))
        grid = 32 >> len(groups)
        features.append(nn.AdaptiveAvgPool2d(grid))  # the identity at 32x32
        self.features = nn.Sequential(*features)
        classifier: list[nn.Module] = []
        units = channels * grid * grid
        for size in hidden:
            classifier += [nn.Linear(units, width * size), nn.ReLU(inplace=True)]
            units = width * size
        self.classifier = nn.Sequential(*classifier, nn.Linear(units, num_classes))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BC: Tensor = self.classifier(self.features(images_BCHW).flatten(1))
        return logits_BC


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"cnn{layers}": partial(PlainCNN, layers) for layers in _PLAIN},
}


def options_of_weights(name: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the options of a network of `BUILDERS` that its weights determine: the shortcut, and classes of cnn10."""
    if name.startswith("resnet"):
        return {"shortcut": "B"} if any(".shortcut." in key for key in weights) else {}
    bias = weights.get("classifier.2.bias")
    return {"num_classes": len(bias)} if name == "cnn10" and bias is not None and bias.dim() == 1 else {}
