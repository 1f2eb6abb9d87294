"""A view depends on (seed, key, view) alone, and its pixels are those of a plain pad, crop and mirror."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import functional as V

from softlabel.views import CropFlip, Crops, draw

KEYS = [f"folder/{number:05d}.jpg" for number in range(40)]


def images(count: int, height: int = 9, width: int = 13) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize(("padding", "flip"), [(4, True), (2, False), (0, True), (0, False), (20, True)])
def test_pixels_are_those_of_pad_crop_and_mirror(padding: int, flip: bool) -> None:
    batch = images(len(KEYS))
    before = batch.clone()
    policy = CropFlip(padding=padding, flip=flip)
    crops = policy.crops(KEYS, seed=3, view=1)
    seen = policy(batch, KEYS, seed=3, view=1)
    for number, image in enumerate(before):
        top, left = int(crops.top[number]), int(crops.left[number])
        expected = V.crop(V.pad(image, [padding]), top, left, 9, 13)
        assert torch.equal(seen[number], V.hflip(expected) if crops.flip[number] else expected)
    assert torch.equal(policy.apply_there(batch, crops), seen)  # as a GPU makes them
    assert torch.equal(batch, before)
    assert seen.dtype == torch.uint8
    assert bool(crops.flip.any()) == flip


def test_a_view_does_not_depend_on_the_batch() -> None:
    batch, policy = images(len(KEYS)), CropFlip()
    together = policy(batch, KEYS, seed=0, view=7)
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(1)).tolist()
    for number in order:
        assert torch.equal(policy(batch[number : number + 1], [KEYS[number]], seed=0, view=7)[0], together[number])


def test_seed_key_and_view_each_change_it() -> None:
    base = draw(KEYS, seed=0, view=0)
    assert len(set(base.tolist())) == len(KEYS)
    for other in (draw(KEYS, seed=1, view=0), draw(KEYS, seed=0, view=1), draw(KEYS, seed=-1, view=0)):
        assert not (base == other).any()
    # The same number in another place is another stream.
    assert not (draw(KEYS, seed=1, view=11) == draw(KEYS, seed=11, view=1)).any()
    assert not (draw(KEYS, seed=1, view=23) == draw(KEYS, seed=12, view=3)).any()


def test_every_crop_is_as_likely() -> None:
    keys = [str(number) for number in range(9 * 9 * 2 * 60)]
    crops = CropFlip(padding=4).crops(keys, seed=5, view=2)
    cells = ((crops.top * 9 + crops.left) * 2 + crops.flip).numpy()
    assert stats.chisquare(np.bincount(cells, minlength=9 * 9 * 2)).pvalue > 1e-5


def test_the_parameters_are_pinned() -> None:
    # Written down: views that a store replays must outlive versions of this package.
    crops = CropFlip().crops(["train/1.jpg", "train/2.jpg", "ü"], seed=1, view=2)
    assert (crops.top.tolist(), crops.left.tolist(), crops.flip.tolist()) == FROZEN


FROZEN = ([3, 3, 0], [0, 3, 0], [False, False, False])


def test_given_crops_are_applied_as_they_are() -> None:
    batch = images(2)
    crops = Crops(top=torch.tensor([4, 0]), left=torch.tensor([4, 4]), flip=torch.tensor([False, False]))
    seen = CropFlip(padding=4).apply(batch, crops)
    assert torch.equal(seen[0], batch[0])
    assert torch.equal(seen[1, :, 4:], batch[1, :, :-4])
    assert not seen[1, :, :4].any()


def test_negative_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        CropFlip(padding=-1)
