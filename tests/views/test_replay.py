"""What the student sees is what the teacher saw: by value, by digest, for every kind of view, from real JPEG bytes."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

import softlabel
from tests.support.datasets import make_jpeg, write_parquet
from tests.support.teachers import make_pixel_teacher_spec, read_pixels

POLICIES = {
    "crop-flip": "crop-flip",
    "inception": "inception?size=24",
    "trivial": "trivial",
    "randaugment": "randaugment",
    "mixup": "mixup",
    "cutmix": "crop-flip+cutmix",
    "all": "inception?size=24+trivial+mixup?alpha=0.8",
}
LIST = """
- RandomApply: {transforms: [GaussianBlur: {kernel_size: 3}, ColorJitter: {brightness: 0.4, hue: 0.1}], p: 0.7}
- RandomResizedCrop: {size: [24, 24], interpolation: bilinear}
- RandomOrder: {transforms: [RandomErasing: {p: 0.5, value: random}, RandomHorizontalFlip]}
- GaussianNoise: {sigma: 0.05}
- RandomChoice: {transforms: [RandomRotation: {degrees: 20}, RandomPerspective, ElasticTransform]}
"""


def side_of(policy: str) -> int:
    return 24 if "24" in policy else 32


def labelled(data: Path, out: Path, policy: str, *, views: int = 2, **options: object) -> softlabel.Store:
    settings: dict[str, object] = {"encoding": "float32", "temperature": 1.0, "shard_rows": 20, "batch_size": 16}
    softlabel.generate(
        data,
        teachers=[make_pixel_teacher_spec(side_of(policy))],
        out=out,
        views=views,
        augment=policy,
        progress=False,
        **{**settings, **options},  # type: ignore[arg-type]
    )
    return softlabel.open_store(out, verify="full")


def check_replay(data: Path, store: softlabel.Store, side: int, *, workers: int, view_order: str = "cycle") -> int:
    """Every batch of one epoch a view has the teacher's pixels; returns how many different (key, view) were seen."""
    loader = softlabel.SoftLabelLoader(
        data,
        store,
        batch_size=16,
        workers=workers,
        check_views=1,
        cache_mb=64,
        view_order=view_order,
        ignore_labels=True,
    )
    found = set()
    for epoch in range(store.run.views.count):
        loader.set_epoch(epoch)
        for batch in loader:
            rows = store.take(batch.rows.numpy())
            np.testing.assert_array_equal(batch.inputs.numpy(), read_pixels(rows.scaled_logits, side))
            hashes = [xxhash.xxh3_64_intdigest(np.ascontiguousarray(one.permute(1, 2, 0))) for one in batch.inputs]
            assert hashes == rows.columns["view_xxh3"][:, 0].tolist()
            assert rows.keys == list(batch.keys)
            if view_order == "cycle":
                assert set(rows.views.tolist()) == {epoch}
            found |= set(zip(batch.keys, rows.views.tolist(), strict=True))
    loader.close()
    return len(found)


def digests_of(store: softlabel.Store) -> dict[tuple[str, int], int]:
    rows = store.take(range(len(store)))
    return dict(
        zip(zip(rows.keys, rows.views.tolist(), strict=True), rows.columns["view_xxh3"][:, 0].tolist(), strict=True)
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("views") / "d.parquet", [make_jpeg(number) for number in range(45)])


@pytest.mark.parametrize("name", [*POLICIES, "list"])
def test_the_student_sees_what_the_teacher_saw(name: str, images: Path, tmp_path: Path) -> None:
    if name == "list":
        policy = str(tmp_path / "list24.yaml")
        Path(policy).write_text(LIST)
    else:
        policy = POLICIES[name]
    store = labelled(images, tmp_path / "s", policy, workers=0)
    assert check_replay(images, store, side_of(policy), workers=0) == 90
    if name in ("crop-flip", "all", "list"):
        assert check_replay(images, store, side_of(policy), workers=2) == 90
    digests = digests_of(store)
    assert len(set(digests.values())) > 60  # views differ
    # A view depends on (seed, key, view) alone.
    assert digests_of(labelled(images, tmp_path / "t", policy, workers=2, batch_size=7, shard_rows=33)) == digests


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(POLICIES))
def test_a_thousand_real_images_in_four_views(name: str, shared_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "cifar.parquet"
    pq.write_table(pq.read_table(shared_data / "cifar10-jpeg" / "train.parquet").slice(0, 1000), source)
    options = {"shard_rows": 512, "batch_size": 256, "ignore_labels": True}
    store = labelled(source, tmp_path / "s", POLICIES[name], views=4, workers=2, **options)
    for workers in (0, 2):
        assert check_replay(source, store, side_of(POLICIES[name]), workers=workers) == 4000
    check_replay(source, store, side_of(POLICIES[name]), workers=2, view_order="random")
