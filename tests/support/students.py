"""What tests of the student's side build: real digits as JPEG files, and stores with logits that the test chose."""

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from softlabel.store.formats.base import Rows
from softlabel.store.manifest import BadRow, Combine, DatasetInfo, Member, Run
from softlabel.store.open import open_store
from softlabel.store.reader import Store
from softlabel.store.writer import Committer, write_shard

DIGITS = tuple("0123456789")


@lru_cache(maxsize=1)
def digit_jpegs() -> tuple[list[bytes], list[int]]:
    """scikit-learn's handwritten digits as 16 x 16 JPEG files without duplicates, and their labels."""
    found: dict[bytes, int] = {}
    for image, label in zip(*load_digits(return_X_y=True), strict=True):
        buffer = io.BytesIO()
        grey = Image.fromarray((image.reshape(8, 8) * 15.9).astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
        grey.convert("RGB").save(buffer, "JPEG", quality=95)
        found.setdefault(buffer.getvalue(), int(label))
    return list(found), list(found.values())


def pixels(jpeg: bytes) -> NDArray[np.uint8]:
    """What the loader has to hand out for a JPEG, decoded here by Pillow alone: uint8 (3, H, W)."""
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).transpose(2, 0, 1)


def write_store(
    path: Path,
    keys: Sequence[str],
    logits_NC: NDArray[np.float32],
    *,
    images: Sequence[bytes] | None = None,
    labels: Sequence[int] | None = None,
    temperature: float = 4.0,
    rule: str = "logits",
    members: int = 1,
    class_names: tuple[str, ...] | None = None,
    bad: Sequence[str] = (),
) -> Store:
    """A store of one shard whose scaled logits are logits / temperature; `bad` keys are listed after the rows."""
    count = len(keys) + len(bad)
    run = Run(
        format="parquet",
        num_classes=logits_NC.shape[1],
        class_names=class_names,
        temperature=float(temperature),
        combine=Combine(rule=rule, weights=(1.0 / members,) * members),
        members=(Member(spec="test", sha256="0" * 64, num_classes=logits_NC.shape[1]),) * members,
        dataset=DatasetInfo(kind="test", rows=count, fingerprint="0" * 32),
        shard_rows=count,
    )
    scaled_NC = logits_NC / temperature
    scaled_NC = scaled_NC - scaled_NC.max(axis=1, keepdims=True)
    rows = Rows(
        keys=list(keys),
        labels=None if labels is None else np.array(labels, dtype=np.int64),
        content=None if images is None else np.array([xxhash.xxh3_64_intdigest(i) for i in images], dtype=np.uint64),
        columns={"logits": scaled_NC.astype(np.float16)},
    )
    with Committer.open(path, run) as committer:
        (plan,) = committer.missing()
        listed = [BadRow(index=len(keys) + n, key=key, reason="truncated") for n, key in enumerate(bad)]
        committer.commit(write_shard(path, run, plan, rows, listed))
        committer.finish()
    return open_store(path, verify="full")


def random_logits(rows: int, classes: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, classes)) * 5).astype(np.float32)


def dropout_student(num_classes: int) -> nn.Module:
    """A student whose steps draw random numbers, which a resumed run has to draw again."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16 * 16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, num_classes)
    )


def smooth_student(num_classes: int) -> nn.Module:
    """Without kinks or batch norm, so that rounding errors stay as small as they are."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32), nn.Tanh(), nn.Linear(32, num_classes))


def three_classes() -> nn.Module:
    """A student that does not ask how many classes there are."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
