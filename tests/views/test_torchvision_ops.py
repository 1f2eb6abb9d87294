"""What torchvision draws for a view follows from the sample's own bits: not from torch's generator, nor into it."""

import inspect
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from softlabel.errors import UsageError
from softlabel.views.torchvision_ops import run, transform_of

ARGUMENTS: dict[str, dict[str, Any]] = {
    "CenterCrop": {"size": 20},
    "ColorJitter": {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.2},
    "Compose": {"transforms": ["RandomHorizontalFlip", {"RandomPosterize": {"bits": 3}}]},
    "GaussianBlur": {"kernel_size": 3},
    "Grayscale": {"num_output_channels": 3},
    "JPEG": {"quality": [20, 90]},
    "Pad": {"padding": 3},
    "RandomAdjustSharpness": {"sharpness_factor": 2.0},
    "RandomAffine": {"degrees": 30, "translate": [0.2, 0.2], "scale": [0.7, 1.3], "shear": 10},
    "RandomApply": {"transforms": ["RandomVerticalFlip"]},
    "RandomChoice": {"transforms": ["RandomVerticalFlip", "RandomInvert", "TrivialAugmentWide"]},
    "RandomCrop": {"size": 20},
    "RandomErasing": {"p": 0.9, "value": "random"},
    "RandomOrder": {"transforms": ["RandomVerticalFlip", "RandomInvert"]},
    "RandomPosterize": {"bits": 3},
    "RandomResize": {"min_size": 20, "max_size": 40},
    "RandomResizedCrop": {"size": [20, 20], "interpolation": "bicubic"},
    "RandomRotation": {"degrees": 30},
    "RandomShortestSize": {"min_size": [20, 24]},
    "RandomSolarize": {"threshold": 100},
    "Resize": {"size": [20, 20]},
    "ScaleJitter": {"target_size": [30, 30]},
}
# What a view has no use for: it would be refused for what comes out, or needs boxes and masks.
USELESS = {"PILToTensor", "SanitizeBoundingBoxes", "SanitizeKeyPoints", "RandomIoUCrop", "ConvertBoundingBoxFormat"}
USELESS |= {"SetClampingMode", "ClampBoundingBoxes", "ClampKeyPoints", "ToPureTensor", "ToImage"}
REFUSED = (
    "Transform",
    "Lambda",
    "MixUp",
    "CutMix",
    "Normalize",
    "LinearTransformation",
    "ToDtype",
    "ConvertImageDtype",
)
REFUSED += ("ToTensor", "ToPILImage", "FiveCrop", "TenCrop", "UniformTemporalSubsample")
NAMES = [
    name
    for name, kind in inspect.getmembers(v2, inspect.isclass)
    if issubclass(kind, v2.Transform) and name not in {*USELESS, *REFUSED}
]


def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 5, 6, generator=generator)[None]
    return (torch.nn.functional.interpolate(coarse, (33, 37), mode="bilinear")[0] * 255).to(torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_every_transform_draws_from_the_seed_alone(name: str) -> None:
    transform = transform_of(name, ARGUMENTS.get(name, {}))
    seen = []
    for seed in range(12):
        twice = []
        for state in (1, 2):
            torch.manual_seed(state)
            random.seed(state)
            np.random.seed(state)
            before = torch.get_rng_state()
            # The layout of the memory is not part of an image.
            pixels = image() if state == 1 else image().permute(1, 2, 0).contiguous().permute(2, 0, 1)
            twice.append(run([transform], pixels, seed))
            assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(*twice)
        seen.append(twice[0])
    if name.startswith("Random") or name in ("TrivialAugmentWide", "AutoAugment", "AugMix", "GaussianNoise", "JPEG"):
        assert any(one.shape != seen[0].shape or not torch.equal(one, seen[0]) for one in seen), "seeds differ"


def test_another_thread_changes_nothing() -> None:
    transforms = [transform_of(name, {}) for name in ("TrivialAugmentWide", "RandAugment", "GaussianNoise")]
    alone = [run(transforms, image(), seed) for seed in range(40)]
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            torch.rand(10)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        beside = [run(transforms, image(), seed) for seed in range(40)]
    finally:
        stop.set()
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_part_of_a_view_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be part of a view"):
        transform_of(name, {})


def test_what_gives_no_colours_is_refused_with_its_name() -> None:
    with pytest.raises(ValueError, match=r"after Grayscale, found torch.uint8 \(1, 33, 37\)"):
        run([transform_of("Grayscale", {})], image(), 0)
