"""Views of images of 1 to 64 channels, 8 bits, 16 bits or floats: against torch and PIL, labelled and replayed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as V

import softlabel
from softlabel.errors import SoftLabelError
from softlabel.views import CropFlip
from tests.support.commands import run_softlabel

N, CLASSES, MODULE = 12, 4, "tests.views.test_bands"
RANDOM = np.random.default_rng(0)
SETS: dict[str, np.ndarray[Any, Any]] = {
    "grey": RANDOM.integers(0, 256, (N, 1, 9, 11), dtype=np.uint8),
    "four": RANDOM.integers(0, 256, (N, 4, 9, 11), dtype=np.uint8),
    "deep": RANDOM.integers(0, 65536, (N, 2, 9, 11), dtype=np.uint16),
    "bands": RANDOM.normal(size=(N, 13, 9, 11)).astype(np.float32),
}


def build(channels: int, num_classes: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))


def prepared(name: str) -> Tensor:
    """As a view policy sees them: bytes, or floats."""
    array = SETS[name]
    if array.dtype == np.uint16:
        return torch.from_numpy((array / np.float32(65535)).astype(np.float32))
    return torch.from_numpy(array)


def write(name: str, folder: Path) -> tuple[str, str, nn.Module]:
    """SOURCE, SPEC and network of a set."""
    channels = SETS[name].shape[1]
    torch.manual_seed(3)
    model = build(channels).eval()
    save_file(model.state_dict(), folder / "w.safetensors")
    np.savez(folder / "tiles.npz", x=SETS[name], y=np.arange(N) % CLASSES)
    numbers = [f"[{','.join([one] * channels)}]" for one in ("0.25", "0.5")]
    spec = f"python:{MODULE}:build@{folder}/w.safetensors?channels={channels}&mean={numbers[0]}&std={numbers[1]}"
    return f"{folder}/tiles.npz?inputs=x&labels=y&layout=channels-first", spec, model


def cut(image: Tensor, box: list[int], flip: bool, size: int | None) -> Tensor:
    """A view by torchvision's crop, which pads with 0, and PIL's resize of each channel."""
    view = V.crop(image, *box)
    if size is not None:
        mode = Image.Resampling.BILINEAR
        resized = [np.asarray(Image.fromarray(one.numpy()).resize((size, size), mode)) for one in view]
        view = torch.from_numpy(np.stack(resized))
    return V.hflip(view) if flip else view


@pytest.mark.parametrize("augment", ["crop-flip?padding=2", "inception?size=8"])
@pytest.mark.parametrize("name", list(SETS))
def test_views_are_labelled_and_replayed(name: str, augment: str, tmp_path: Path) -> None:
    data, spec, model = write(name, tmp_path)
    softlabel.generate(
        data,
        teachers=[spec],
        out=tmp_path / "labels",
        augment=augment,
        views=2,
        device="cpu",
        encoding="float32",
        temperature=1.0,
        batch_size=5,
    )
    images, keys = prepared(name), [str(row) for row in range(N)]
    loader = softlabel.SoftLabelLoader(data, tmp_path / "labels", batch_size=N, shuffle=False, check_views=1)
    with softlabel.open_store(tmp_path / "labels") as store:
        for view in range(2):
            loader.set_epoch(view)
            (batch,) = loader
            rows = store.take(store.lookup(keys, view), ["view_box", "view_flip"])
            boxes, flips = rows.columns["view_box"], rows.columns["view_flip"][:, 0]
            size = 8 if augment.startswith("inception") else None
            expected = torch.stack(
                [cut(image, boxes[place].tolist(), bool(flips[place]), size) for place, image in enumerate(images)]
            )
            assert torch.equal(batch.inputs, expected)
            with torch.inference_mode():
                scaled = expected / 255 if expected.dtype == torch.uint8 else expected
                logits = model((scaled - 0.25) / 0.5)
            found = torch.from_numpy(np.array(store.take(store.lookup(keys, view)).scaled_logits))
            assert torch.allclose(found, logits - logits.amax(dim=1, keepdim=True), atol=1e-5)


def test_a_student_trains_on_augmented_bands(tmp_path: Path) -> None:
    data, spec, _ = write("bands", tmp_path)
    softlabel.generate(data, teachers=[spec], out=tmp_path / "labels", device="cpu")
    student = f"python:{MODULE}:build?channels=13&mean={','.join(['0'] * 13)}&std={','.join(['1'] * 13)}"
    done = run_softlabel(
        "train", "--data", data, "--labels", tmp_path / "labels", "--student", student, "--epochs", 2, "--batch-size",
        4, "--crop-padding", 2, "--out", tmp_path / "run", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "augmentation crop-flip" in done.stderr + done.stdout
    loader = softlabel.SoftLabelLoader(
        data, tmp_path / "labels", batch_size=N, shuffle=False, augment=CropFlip(padding=1)
    )
    (batch,) = loader
    assert batch.inputs.dtype == torch.float32
    assert not torch.equal(batch.inputs, prepared("bands"))
    assert set(batch.inputs.unique().tolist()) <= {0.0, *prepared("bands").unique().tolist()}


def test_a_timm_network_of_13_bands(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=CLASSES, in_chans=13).eval()
    save_file(model.state_dict(), tmp_path / "s2.safetensors")
    tiles = np.random.default_rng(1).normal(size=(6, 13, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "tiles.npz", bands=tiles)
    mean, std = np.linspace(-1, 1, 13).astype(np.float32), np.linspace(0.5, 2, 13).astype(np.float32)
    numbers = f"mean={','.join(map(str, mean))}&std={','.join(map(str, std))}"
    data, spec = f"{tmp_path}/tiles.npz?inputs=bands&layout=channels-first", f"timm:resnet18@{tmp_path}/s2.safetensors"
    done = run_softlabel(
        "generate", "--data", data, "--teacher", f"{spec}?in_chans=13&resize=none&crop=none&{numbers}", "--out",
        tmp_path / "labels", "--encoding", "float32", "--temperature", 1, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with softlabel.open_store(tmp_path / "labels") as store, torch.inference_mode():
        found = torch.from_numpy(np.array(store.take(np.arange(6)).scaled_logits))
        shape = (1, 13, 1, 1)
        logits = model((torch.from_numpy(tiles) - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape))
    assert torch.allclose(found, logits - logits.amax(dim=1, keepdim=True), atol=1e-4)
    with pytest.raises(SoftLabelError, match=r"expected mean= and std= of in_chans=13 channels, found 3 numbers"):
        softlabel.generate(data, teachers=[f"{spec}?in_chans=13"], out=tmp_path / "no", device="cpu")


@pytest.mark.parametrize("augment", ["trivial", "mixup", "crop-flip+cutmix"])
def test_views_of_colours_and_mixing_are_refused(augment: str, tmp_path: Path) -> None:
    data, spec, _ = write("four", tmp_path)
    with pytest.raises(SoftLabelError, match=r"for 8-bit RGB images; the channels of .* take crop-flip or inception"):
        softlabel.generate(data, teachers=[spec], out=tmp_path / "labels", augment=augment, views=2, device="cpu")


def test_crops_of_numbers_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.zeros((8, 5), np.float32), y=np.arange(8) % 2)
    with pytest.raises(SoftLabelError, match="crops and mirror images are of images"):
        softlabel.SoftLabelLoader(f"{tmp_path}/t.npz?inputs=x&labels=y", None, augment=CropFlip())
