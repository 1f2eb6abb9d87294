"""One member of a store for each sample and epoch: which one follows from the seed, the key and the epoch alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from softlabel import SoftLabelLoader, train
from softlabel.errors import UsageError
from softlabel.labels.combine import Combination
from softlabel.loader import LabelJoin
from softlabel.store.manifest import Combine, Member
from tests.support.datasets import write_parquet
from tests.support.digits import DIGITS, make_digit_jpegs
from tests.support.stores import Samples, draw_logits, make_run, write_store
from tests.support.training_runs import ROWS, have_equal_weights, make_config, make_keys

Chosen = dict[str, int]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three members, of which number m gives class m for every sample; and one of the third alone."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = make_digit_jpegs()
    write_parquet(
        folder / "data.parquet", images[:ROWS], keys=make_keys(ROWS), labels=labels[:ROWS], class_names=DIGITS
    )
    write_parquet(folder / "unlabelled.parquet", images[:ROWS], keys=make_keys(ROWS))
    logits_NMC = np.stack([draw_logits(ROWS, 10, seed=seed) for seed in (1, 2, 3)], axis=1)
    for member in range(3):
        logits_NMC[:, member, member] = 30
    logits_NMC = (logits_NMC - logits_NMC.max(axis=2, keepdims=True)) / 4
    for name, chosen in (("store", slice(None)), ("third", slice(2, 3))):
        kept_NMC = logits_NMC[:, chosen]
        members = kept_NMC.shape[1]
        combine = Combine(rule="keep", weights=(1 / 3,) * 3) if members == 3 else Combine()
        member = Member(spec="test", sha256="0" * 64, num_classes=10)
        run = make_run(samples=ROWS, classes=10, members=(member,) * members, combine=combine)
        samples = Samples(
            keys=make_keys(ROWS),
            labels=np.array(labels[:ROWS]),
            content=np.zeros(ROWS, np.uint64),
            logits=logits_NMC[None, :, 0],
            columns={"logits": kept_NMC.reshape(1, ROWS, -1).astype(np.float16)},
        )
        write_store(folder / name, run, samples)
    return folder


def read(digits: Path, epoch: int = 0, weights: tuple[float, ...] | None = None, **options: object) -> Chosen:
    """Which member each sample has."""
    given = {"batch_size": 16, "seed": 3, "tail": "keep", "data": digits / "data.parquet", **options}
    loader = SoftLabelLoader(
        given.pop("data"),
        digits / "store",
        combine=Combination(rule="random", weights=weights),
        **given,  # type: ignore[arg-type]
    )
    loader.set_epoch(epoch)
    found: Chosen = {}
    for batch in loader:
        found |= dict(zip(batch.keys, batch.target.scaled_logits.argmax(dim=1).tolist(), strict=True))
        assert batch.target.retemperable
    loader.close()
    return found


def test_the_member_follows_from_seed_key_and_epoch(digits: Path) -> None:
    plain = read(digits)
    others: list[Callable[[], Chosen]] = [
        lambda: read(digits, batch_size=7),
        lambda: read(digits, workers=2),
        lambda: read(digits, streaming=True),
        lambda: read(digits, data=digits / "unlabelled.parquet"),
        lambda: read(digits, rank=0, world_size=2, tail="pad") | read(digits, rank=1, world_size=2, tail="pad"),
    ]
    for other in others:
        assert other() == plain
    assert read(digits, epoch=1) != plain
    assert read(digits, epoch=1, streaming=True) == read(digits, epoch=1)
    assert read(digits, seed=4) != plain


def test_weights_are_probabilities(digits: Path) -> None:
    found = [member for epoch in range(20) for member in read(digits, epoch, weights=(3, 0, 1)).values()]
    shares = np.bincount(found, minlength=3) / len(found)
    assert shares[1] == 0
    assert shares[0] == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / len(found)))


def test_students_learn_from_it(digits: Path, tmp_path: Path) -> None:
    rest = {"student": "python:tests.support.students:build_smooth_student?resize=16&crop=16", "epochs": 2}
    given = {**rest, "labels": digits / "store", "combine": "random"}
    train(make_config(digits, tmp_path / "one", weights=[0.0, 0.0, 1.0], **given))
    train(make_config(digits, tmp_path / "third", **{**rest, "labels": digits / "third"}))
    assert have_equal_weights(tmp_path / "one", tmp_path / "third")
    # Any temperature follows from a single member, and losses take its logits.
    train(make_config(digits, tmp_path / "any", temperature=[2.0, 4.0], loss=["kd", "dkd"], **given))


def test_mistakes_are_named(digits: Path, tmp_path: Path) -> None:
    random = Combination(rule="random")
    with pytest.raises(UsageError, match="combine: random takes one member for each sample and epoch"):
        LabelJoin(digits / "store", combine=random)
    with pytest.raises(UsageError, match="only the members of a store that keeps them apart"):
        train(make_config(digits, tmp_path, labels=digits / "third", combine="random"))
    with pytest.raises(UsageError, match="combine: random takes one member for each sample and epoch"):
        train(make_config(digits, tmp_path, student="lm:nowhere", batch_size=None, pack=8, combine="random"))
