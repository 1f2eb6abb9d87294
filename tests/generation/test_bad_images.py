"""One image in a thousand is broken or odd: the run ends, good rows are right, bad ones are listed with reasons."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import softlabel
from softlabel.models import build_model
from tests.support.datasets import make_jpeg, write_parquet
from tests.support.teachers import write_teacher

SIZE = 32


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(seed: int, *shape: int, most: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most, shape, dtype=np.uint16 if most > 256 else np.uint8)


def rotated(seed: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(pixels(seed, 24, 40, 3)), "JPEG", exif=exif)


def animated(seed: int) -> bytes:
    frames = [Image.fromarray(pixels(seed + n, SIZE, SIZE, 3)).convert("P") for n in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


BROKEN: dict[str, Callable[[int], bytes]] = {
    "cut": lambda seed: make_jpeg(seed, 64)[: len(make_jpeg(seed, 64)) // 2],
    "empty": lambda seed: b"",
    "text": lambda seed: b"this is no image, number %d" % seed,
}
REASONS = {"cut": "truncated", "empty": "empty, 0 bytes", "text": "not an image"}
ODD: dict[str, Callable[[int], bytes]] = {
    "thin": lambda seed: saved(Image.fromarray(pixels(seed, 2, 20_000, 3)), "PNG"),
    "dot": lambda seed: saved(Image.fromarray(pixels(seed, 1, 1, 3)), "PNG"),
    "cmyk": lambda seed: saved(Image.fromarray(pixels(seed, SIZE, SIZE, 4), "CMYK"), "JPEG"),
    "deep": lambda seed: saved(Image.fromarray(pixels(seed, SIZE, SIZE, most=65_536)), "PNG"),
    "moving": animated,
    "turned": rotated,
}


def mixture(rows: int) -> dict[str, bytes]:
    """Good JPEG images, and among them every kind above, one in a thousand in all but at least one of each."""
    kinds = {**BROKEN, **ODD}
    each = max(1, rows // 1000 // len(kinds))
    step = rows // (each * len(kinds) + 1)
    found = {f"good-{number:06d}": make_jpeg(number % 5000, SIZE) for number in range(rows)}
    for number in range(each * len(kinds)):
        kind = list(kinds)[number % len(kinds)]
        place = (number + 1) * step
        found.pop(f"good-{place:06d}")
        found[f"{kind}-{place:06d}"] = kinds[kind](place)
    return dict(sorted(found.items(), key=lambda item: item[0][-6:]))


def plain(image: bytes) -> torch.Tensor:
    """uint8 (3, H, W) as torchvision's ImageFolder and PIL give it, upright; of 16 bits the upper byte."""
    from PIL import ImageOps

    opened = Image.open(io.BytesIO(image))
    if opened.mode == "I;16":
        opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
    if opened.mode == "P":
        opened = opened.convert("RGBA")
    return torch.from_numpy(np.array(ImageOps.exif_transpose(opened).convert("RGB"))).permute(2, 0, 1)


def expected(images: dict[str, bytes], spec: str) -> np.ndarray:
    """Logits of each image, float64 (N, C), resized and cropped by torchvision itself."""
    from torchvision.transforms import v2

    model = build_model(spec.partition("?")[0]).eval()
    shape = v2.Compose([v2.Resize(SIZE, antialias=True), v2.CenterCrop(SIZE)])
    inputs = torch.stack([shape(plain(image)) for image in images.values()]).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        parts = [model((part - mean[:, None, None]) / std[:, None, None]) for part in inputs.split(512)]
    found: np.ndarray = torch.cat(parts).double().numpy()
    return found


def check(store: softlabel.Store, images: dict[str, bytes], spec: str, suffix: str = "") -> None:
    good = {key: image for key, image in images.items() if key.partition("-")[0] not in BROKEN}
    assert sorted(store.bad) == sorted(f"{key}{suffix}" for key in images if key not in good)
    for key, reason in store.bad.items():
        assert REASONS[key.rpartition("/")[2].partition("-")[0]].lower() in reason.lower(), (key, reason)
    rows = store.lookup([f"{key}{suffix}" for key in good])
    assert sorted(rows.tolist()) == list(range(len(store)))
    found = np.asarray(store.take(rows).scaled_logits, np.float64)
    logits = expected(good, spec) / store.run.temperature
    np.testing.assert_allclose(found, logits - logits.max(1, keepdims=True), atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("rows", [800, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_broken_images_among_good_ones_in_parquet(tmp_path: Path, rows: int) -> None:
    images = mixture(rows)
    spec = write_teacher(tmp_path / "teacher.safetensors")
    data = write_parquet(tmp_path / "data.parquet", list(images.values()), keys=list(images))
    summary = softlabel.generate(data, teachers=[spec], out=tmp_path / "store", shard_rows=rows // 5, progress=False)
    broken = sum(key.partition("-")[0] in BROKEN for key in images)
    assert (summary.total_rows, summary.total_bad) == (rows - broken, broken)
    check(softlabel.open_store(tmp_path / "store", verify="full"), images, spec)


def test_broken_images_among_good_ones_in_a_folder(tmp_path: Path) -> None:
    images = mixture(400)
    spec = write_teacher(tmp_path / "teacher.safetensors")
    (tmp_path / "images").mkdir()
    for key, image in images.items():
        (tmp_path / "images" / f"{key}.jpg").write_bytes(image)
    softlabel.generate(
        tmp_path / "images", teachers=[spec], out=tmp_path / "store", workers=1, shard_rows=100, progress=False
    )
    check(softlabel.open_store(tmp_path / "store", verify="full"), images, spec, ".jpg")
