"""The small CIFAR networks of the distillation literature that torchvision lacks.

Legend: B batch, C classes, H and W height and width.

ResNet-8 to 110 are He et al. 2015, section 4.2, with option A shortcuts (no parameters). The names in their state
dict are those of the checkpoints that everybody passes around (Y. Idelbayev's): ``conv1, bn1,
layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear``. The plain CNNs of 2 to 10 weight layers are those that Mirzadeh et
al. 2019 ("Improved knowledge distillation via teacher assistant") use for CIFAR-10; ``width=2`` gives the 2 and 4 layer
nets that they use for CIFAR-100.

All take float (B, 3, H, W), in either memory layout, and give logits (B, C). They are meant for 32x32, and run from
8x8 upwards: the ResNets average over whatever grid is left, the CNNs pool it to the grid that 32x32 leaves.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut of option A: every second pixel, and zeros for the new channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        # New channels come half before and half after the old ones: the order that the checkpoints were trained with.
        self.new_before = (channels - channels_in) // 2
        self.new_after = channels - channels_in - self.new_before

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride != 1 or self.new_after:
            shortcut = x[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.new_before, self.new_after))
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """`depth` is 6n + 2: one convolution, three stages of n blocks with 16, 32, 64 channels, one linear layer."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        assert rest == 0, depth
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits_BC: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits_BC


def _stage(blocks: int, channels_in: int, channels: int, *, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels, stride)
    return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))


# Groups of convolutions between the 2x2 max pools, then the hidden linear layers; the last linear layer comes on top.
_PLAIN: dict[int, tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    2: (((16,), (16,)), ()),
    4: (((16, 16), (32, 32)), ()),
    6: (((16, 16), (32, 32), (64, 64)), ()),
    8: (((16, 16), (32, 32), (64, 64), (128, 128)), (64,)),
    10: (((32, 32), (64, 64), (128, 128), (256, 256, 256, 256)), (128,)),
}


class PlainCNN(nn.Module):
    """3x3 convolutions with batch norm and ReLU, a 2x2 max pool after each group, linear layers on the grid."""

    def __init__(self, layers: int, num_classes: int = 10, width: int = 1) -> None:
        super().__init__()
        groups, hidden = _PLAIN[layers]
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
