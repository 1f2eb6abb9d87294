"""Noisy copies of views: pixels by an independent generator, and what the difference along them measures."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from torch import nn

import softlabel
from softlabel.convert import convert_store, merge_stores
from softlabel.errors import UsageError
from softlabel.loss.differences import difference_loss, halve_differences
from softlabel.views import Policy, Views, parse_policy
from softlabel.views.noise_pair import NoisePairStep
from softlabel.views.random import draw
from tests.support.commands import run_softlabel
from tests.support.datasets import make_jpeg, write_parquet
from tests.support.format_reader import read_shard
from tests.support.teachers import TOP, make_pixel_teacher_spec

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 6, 7), dtype=np.uint8))
T = 2.0
KEYS = [f"image {number}" for number in range(5)]
MASK = (1 << 64) - 1


def split_mix(state: int, number: int) -> int:
    """Output `number` of SplitMix64 from a state (Steele et al. 2014), in Python's integers."""
    z = (state + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def make_pair(image: np.ndarray, key: str, *, seed: int, view: int, direction: int, step: int) -> list[np.ndarray]:
    stream = xxhash.xxh3_64_intdigest(f"softlabel view {seed} {view}".encode())
    state = xxhash.xxh3_64_intdigest(key.encode(), seed=stream)
    flat = image.reshape(-1)
    words = [split_mix(state, (direction + 1) * 2**32 + number) for number in range(-(-len(flat) // 64))]
    signs = [1 if words[place // 64] >> (place % 64) & 1 else -1 for place in range(len(flat))]
    found = []
    for side in (1, -1):
        pixels = [min(255, max(0, int(value) + side * step * sign)) for value, sign in zip(flat, signs, strict=True)]
        found.append(np.array(pixels, np.uint8).reshape(image.shape))
    return found


def test_pixels_follow_from_seed_key_view_and_direction_alone() -> None:
    views = Views(policy=Policy.of(parse_policy("noise-pair?step=5&directions=2")), seed=3, pool=9)  # type: ignore[arg-type]
    made = views.make(IMAGES, KEYS, view=2, read=lambda positions: ([], []))
    assert len(made.pairs) == 4
    for place, key in enumerate(KEYS):
        for direction in range(2):
            expected = make_pair(IMAGES[place].numpy(), key, seed=3, view=2, direction=direction, step=5)
            for side in range(2):
                found = made.pairs[2 * direction + side][place].numpy()
                assert (found == expected[side]).all()
                digest = xxhash.xxh3_64_intdigest(np.ascontiguousarray(expected[side].transpose(1, 2, 0)).tobytes())
                assert made.columns["view_pair_xxh3"][place, 2 * direction + side] == digest
    assert torch.equal(torch.as_tensor(np.stack([one.numpy() for one in made.images])), IMAGES)
    # The same in batches of one, in another order, and for images of several sizes.
    alone = views.make([IMAGES[3]], [KEYS[3]], view=2, read=lambda positions: ([], []))
    assert all(torch.equal(one[0], many[3]) for one, many in zip(alone.pairs, made.pairs, strict=True))
    mixed = views.make([IMAGES[3], IMAGES[1, :, :4]], [KEYS[3], KEYS[1]], view=2, read=lambda positions: ([], []))
    assert all(torch.equal(one[0], many[3]) for one, many in zip(mixed.pairs, made.pairs, strict=True))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("noise-pair?step=0", "expected step from 1 to 64, found 0"),
        ("noise-pair?directions=65", "expected directions from 1 to 64, found 65"),
        ("noise-pair?scale=2", "noise-pair has no option 'scale'"),
        ("noise-pair+crop-flip", "expected noise-pair as the last step, found crop-flip after it"),
        ("mixup+noise-pair", "expected mixup as the last step, found noise-pair after it"),
    ],
)
def test_what_cannot_be_a_pair_is_refused_by_name(policy: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_policy(policy)


def test_floats_have_no_grey_levels() -> None:
    with pytest.raises(UsageError, match="needs images of 8 bits, found float32"):
        NoisePairStep().make(IMAGES.float(), draw(KEYS, seed=0, view=0))


def test_differences_estimate_the_distance_of_jacobians() -> None:
    """E |P (J_s - J_t) s e|^2 = s^2 |P (J_s - J_t)|_F^2, on smooth networks where the step is small."""
    torch.manual_seed(0)

    def build() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Softplus(), nn.Linear(16, 5)).double()

    student, teacher = build(), build()
    image = torch.full((3, 4, 4), 128, dtype=torch.uint8)
    step, scale = 1, 1 / 255

    @torch.no_grad()
    def jacobian(network: nn.Module) -> torch.Tensor:
        found = torch.func.jacrev(lambda x: network(x[None])[0])(image.double() * scale).flatten(1)
        return found - found.mean(0)

    expected = (step * scale) ** 2 * float((jacobian(student) - jacobian(teacher)).square().sum()) / 5
    words = draw([str(number) for number in range(2000)], seed=0, view=0)
    pairs = NoisePairStep(step=step).make(image.expand(2000, 3, 4, 4), words)
    with torch.no_grad():
        answers = [torch.stack([net(side.double() * scale) for side in pairs], 1) for net in (student, teacher)]
    differences = halve_differences(answers[1][:, 0], answers[1][:, 1])[:, None]
    rows = torch.stack([difference_loss(answers[0][[n]], differences[[n]]) for n in range(2000)])
    error = float(rows.std() / len(rows) ** 0.5)
    assert abs(float(rows.mean() - expected)) < 4 * error < 0.2 * expected
    # And each is the derivative along its noise.
    noise = (pairs[0][:8].double() - 128) * scale
    along = noise.flatten(1) @ jacobian(teacher).T
    assert (differences[:8, 0] - along).norm() < 1e-4 * along.norm()


def test_the_loss_is_its_formula_with_a_gradient_and_masked_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    differences = torch.randn(4, 3, 7, generator=generator, dtype=torch.float64)
    values, total = logits.detach().numpy(), 0.0
    for row in (0, 2, 3):
        for direction in range(3):
            d = [(values[row, 2 * direction, c] - values[row, 2 * direction + 1, c]) / 2 for c in range(7)]
            total += sum((d[c] - sum(d) / 7 - float(differences[row, direction, c])) ** 2 for c in range(7)) / 21
    mask = torch.tensor([True, False, True, True])
    blank = differences.clone()
    blank[1] = torch.nan
    assert difference_loss(logits, blank, mask=mask).item() == pytest.approx(total / 3, rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: difference_loss(z, differences, mask=mask), (logits,))
    with pytest.raises(softlabel.errors.MismatchError, match=r"expected logits \(B, 2 K, C\)"):
        difference_loss(logits[:, :5], differences)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    write_parquet(path, [make_jpeg(number) for number in range(30)])
    return path


def label(data: Path, out: Path, **options: object) -> Path:
    settings: dict[str, object] = {"encoding": "float16", "temperature": T, "shard_rows": 16, "batch_size": 8}
    policy = {"views": 2, "augment": "crop-flip?padding=2+noise-pair?step=6&directions=2"}
    softlabel.generate(
        data, teachers=[make_pixel_teacher_spec(32)], out=out, progress=False, **{**settings, **policy, **options}
    )
    return out


def read_raw(store: Path) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """Columns by (key, view), by a reader of the format of its own."""
    found = {}
    for path in sorted((store / "shards").iterdir()):
        row, columns = read_shard(str(path))
        for place, pair in enumerate(zip(row["key"], row["view"].tolist(), strict=True)):
            found[pair] = {name: values[place] for name, values in columns.items()}
    return found


@pytest.mark.parametrize("format", ["parquet", "hdf5"])
def test_a_store_has_the_differences_of_the_pixels_that_its_teacher_saw(
    data: Path, tmp_path: Path, format: str
) -> None:
    """The teacher's logits are its pixels, so that the halved differences are those of the noisy copies."""
    out = label(data, tmp_path / "labels", format=format)
    store = softlabel.open_store(out, verify="full")
    assert store.manifest.format_version == (5 if format == "hdf5" else 6)
    rows = read_raw(out)
    assert len(rows) == 60
    for (key, view), row in rows.items():
        logits = row["logits"].astype(np.float64) * T
        base = (logits[:-1] - logits[-1] + TOP).round().astype(np.uint8).reshape(3, 32, 32)
        digests = row["view_pair_xxh3"]
        for direction, found in enumerate(row["difference"].reshape(2, -1).astype(np.float64)):
            pair = make_pair(base, key, seed=0, view=view, direction=direction, step=6)
            for side, pixels in enumerate(pair):
                image = np.ascontiguousarray(pixels.transpose(1, 2, 0)).tobytes()
                assert digests[2 * direction + side] == xxhash.xxh3_64_intdigest(image)
            halved = np.append((pair[0].astype(np.float64) - pair[1]).reshape(-1) / 2, 0.0)
            assert np.abs(found - (halved - halved.mean())).max() < 4e-3


def test_differences_go_where_their_rows_go(data: Path, tmp_path: Path) -> None:
    """Other encodings and formats, merging, repair and export keep them; members kept apart have none."""
    half = [label(f"{data}?rows={rows}", tmp_path / rows.replace(":", "-")) for rows in ("0:16", "16:30")]
    before = read_raw(half[0]) | read_raw(half[1])
    merge_stores([str(one) for one in half], tmp_path / "merged", progress=False)
    convert_store(str(tmp_path / "merged"), tmp_path / "other", encoding="int8", format="hdf5", progress=False)
    for out in ("merged", "other"):
        softlabel.verify_store(tmp_path / out)
        found = read_raw(tmp_path / out)
        assert found.keys() == before.keys()
        for pair, row in found.items():
            for name in ("difference", "view_pair_xxh3"):
                assert row[name].tobytes() == before[pair][name].tobytes(), (out, pair, name)
    shard = next((half[0] / "shards").iterdir())
    content = shard.read_bytes()
    shard.unlink()
    assert run_softlabel("repair", half[0]).returncode == 0
    assert shard.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "keep"}, "expected an average of logits, found members that are kept apart"),
        ({"activation": "sigmoid"}, "expected one softmax over the classes, found independent sigmoids"),
    ],
)
def test_what_has_no_difference_is_refused_by_name(
    data: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=f"augment: noise-pair: {message}"):
        label(data, tmp_path / "labels", **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_loader_gives_the_copies_that_its_teacher_saw(data: Path, tmp_path: Path, streaming: bool) -> None:
    out = label(data, tmp_path / "labels")
    rows = read_raw(out)
    loader = softlabel.SoftLabelLoader(
        data, out, batch_size=7, workers=0, check_views=1, streaming=streaming, also=("difference",)
    )
    seen = 0
    for epoch in range(2):
        for batch in loader:
            for place, key in enumerate(batch.keys):
                row = rows[key, epoch]
                for direction in range(2):
                    pair = make_pair(batch.inputs[place].numpy(), key, seed=0, view=epoch, direction=direction, step=6)
                    for side in range(2):
                        assert (batch.copies[place, 2 * direction + side].numpy() == pair[side]).all()
                expected = row["difference"].astype(np.float32).reshape(2, -1)
                assert (batch.difference[place].numpy() == expected).all()
                seen += 1
    loader.close()
    assert seen == 60


def test_a_loader_without_pairs_says_what_is_missing(data: Path, tmp_path: Path) -> None:
    out = label(data, tmp_path / "labels", augment="crop-flip?padding=2")
    with pytest.raises(softlabel.errors.MismatchError, match="expected rows with difference, found none"):
        softlabel.SoftLabelLoader(data, out, batch_size=7, also=("difference",))


def test_verify_compares_differences_with_those_of_today(data: Path, tmp_path: Path) -> None:
    out = label(data, tmp_path / "labels", shard_rows=60)
    done = run_softlabel("verify", out, "--recompute", "20", "--data", data)
    assert done.returncode == 0, done.stdout
    assert "20 rows recomputed: relative to its norm, difference by " in done.stdout
    assert "along 2 directions of noise of 6 grey levels" in run_softlabel("inspect", out).stdout
