"""The small CIFAR networks: published sizes, published state-dict keys, and every input that they promise to take."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from softlabel.errors import SpecError
from softlabel.models import build_model, cifar

# Weights of convolutions and linear layers for 10 classes as He et al. 2015, table 6, round them ("0.27M" and so on).
PUBLISHED_MILLIONS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}
RESNETS = (8, 14, 20, 32, 44, 56, 110)
LAYERS = (2, 4, 6, 8, 10)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_table_of_builders() -> None:
    assert set(cifar.BUILDERS) == {f"resnet{d}" for d in RESNETS} | {f"cnn{n}" for n in LAYERS}


@pytest.mark.parametrize(("depth", "millions"), PUBLISHED_MILLIONS.items())
def test_resnets_have_the_published_size(depth: int, millions: float) -> None:
    assert parameters(cifar.BUILDERS[f"resnet{depth}"]()) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("depth", RESNETS)
def test_resnet_depth_counts_weight_layers(depth: int) -> None:
    model = cifar.BUILDERS[f"resnet{depth}"]()
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


@pytest.mark.parametrize("layers", LAYERS)
def test_plain_cnns_have_the_published_layers(layers: int) -> None:
    """Mirzadeh et al. 2019, for CIFAR-10: filters of the convolutions, units of the linear layers."""
    published = {
        2: ([16, 16], [10]),
        4: ([16, 16, 32, 32], [10]),
        6: ([16, 16, 32, 32, 64, 64], [10]),
        8: ([16, 16, 32, 32, 64, 64, 128, 128], [64, 10]),
        10: ([32, 32, 64, 64, 128, 128, 256, 256, 256, 256], [128, 10]),
    }
    model = cifar.BUILDERS[f"cnn{layers}"]()
    filters = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    units = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    assert (filters, units) == published[layers]
    # The flattened grid of a 32x32 input goes into the first linear layer.
    pools = sum(isinstance(m, nn.MaxPool2d) for m in model.modules())
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    assert first.in_features == filters[-1] * (32 // 2**pools) ** 2


def test_the_net_of_ten_layers_has_512_hidden_units_for_100_classes(tmp_path: Path) -> None:
    model = cifar.BUILDERS["cnn10"](num_classes=100)
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [512, 100]
    save_file(model.state_dict(), tmp_path / "cnn10.safetensors")
    assert parameters(build_model(f"zoo:cnn10@{tmp_path}/cnn10.safetensors")) == parameters(model)


def test_shortcut_b_is_a_convolution_and_a_batch_norm(tmp_path: Path) -> None:
    """Silenced but for its shortcut, a block is a batch norm of a product with every second pixel."""
    block = cifar.Block(16, 32, stride=2, shortcut="B").eval()
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.bn2.bias)
    x = torch.rand(2, 16, 6, 6)
    weight = block.get_parameter("shortcut.0.weight")[:, :, 0, 0]
    normed = torch.einsum("oi,bihw->bohw", weight, x[:, :, ::2, ::2]) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(block(x), normed.relu())

    plain, model = build_model("zoo:resnet20"), build_model("zoo:resnet20?shortcut=B")
    assert parameters(model) - parameters(plain) == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    save_file(model.state_dict(), tmp_path / "b.safetensors")
    read = build_model(f"zoo:resnet20@{tmp_path}/b.safetensors")  # the weights say which shortcut they have
    assert set(read.state_dict()) == set(model.state_dict())
    with pytest.raises(SpecError, match="shortcut: expected A or B, found 'C'"):
        build_model("zoo:resnet20?shortcut=C")


def test_width_multiplies_filters() -> None:
    wide = build_model("zoo:cnn4?width=2", num_classes=100)
    assert [m.out_channels for m in wide.modules() if isinstance(m, nn.Conv2d)] == [32, 32, 64, 64]


def test_resnet_keys_are_those_of_the_published_checkpoints() -> None:
    names = set(cifar.BUILDERS["resnet20"]().state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias"} | {f"bn1.{n}" for n in norm}
    for stage in (1, 2, 3):
        for block in range(3):
            for i in (1, 2):
                expected.add(f"layer{stage}.{block}.conv{i}.weight")
                expected |= {f"layer{stage}.{block}.bn{i}.{n}" for n in norm}
    assert names == expected


def test_shortcut_subsamples_and_pads_with_zeros() -> None:
    """With its convolutions silenced a block is its shortcut, which can be written down."""
    block = cifar.Block(16, 32, stride=2, shortcut="A").eval()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(2, 16, 6, 6)
    expected = torch.zeros(2, 32, 3, 3)
    for row in range(3):
        for column in range(3):
            expected[:, 8:24, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("name", [n for n in cifar.BUILDERS if n not in ("resnet44", "resnet56", "resnet110")])
@pytest.mark.parametrize("side", [32, 16, 8, 40])
def test_every_input_size_and_memory_layout(name: str, side: int) -> None:
    torch.manual_seed(0)
    model = cifar.BUILDERS[name](num_classes=7).eval()
    images_BCHW = torch.rand(3, 3, side, side)
    with torch.inference_mode():
        plain = model(images_BCHW)
        model = model.to(memory_format=torch.channels_last)
        last = model(images_BCHW.to(memory_format=torch.channels_last))
    assert plain.shape == (3, 7)
    assert torch.allclose(plain, last, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("name", ["resnet8", "cnn10"])
def test_gradients_reach_every_parameter(name: str) -> None:
    model = cifar.BUILDERS[name](num_classes=5)
    model(torch.rand(4, 3, 16, 16)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
