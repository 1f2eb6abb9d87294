"""Small datasets for tests: JPEG images that follow from a seed, and the files that hold them."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("red", "green", "blue", "grey")


def make_jpeg(seed: int, size: int = 32) -> bytes:
    """A small JPEG whose pixels depend on the seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes],
    *,
    keys: Sequence[str] | None = None,
    labels: Sequence[int | None] | None = None,
    class_names: Sequence[str] = CLASSES,
) -> Path:
    """A Parquet file in the Hugging Face image layout."""
    keys = keys or [f"image-{number:05d}.jpg" for number in range(len(images))]
    columns = {
        "image": pa.array(
            [{"bytes": image, "path": key} for image, key in zip(images, keys, strict=True)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    }
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"names": list(class_names), "_type": "ClassLabel"}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def write_dataset(path: Path, rows: int, *, seed: int = 0, labelled: bool = True) -> Path:
    labels = [number % len(CLASSES) for number in range(rows)] if labelled else None
    return write_parquet(path, [make_jpeg(seed * 1_000_000 + number) for number in range(rows)], labels=labels)


def add_tar_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
