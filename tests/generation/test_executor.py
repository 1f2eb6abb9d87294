"""Who labels: an executor of a third party, and the configuration that every way of labelling shares."""

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import softlabel
from softlabel.errors import UsageError
from softlabel.generation.config import GenerateConfig
from softlabel.generation.job import Job
from softlabel.generation.pipeline import label_shard
from softlabel.generation.progress import Progress
from softlabel.store.manifest import ShardPlan
from softlabel.store.writer import Committer, write_shard
from tests.support.commands import run_softlabel
from tests.support.datasets import write_dataset
from tests.support.teachers import write_teacher

ROWS, SHARD_ROWS = 30, 8


class LastShardFirst:
    """Labels in this process, the last shard first."""

    in_process = True

    def label(self, job: Job, committer: Committer, missing: Sequence[ShardPlan], progress: Progress) -> None:
        for plan in reversed(missing):
            shard = label_shard(plan, job.labeller)
            committer.commit(write_shard(committer.url, job.run, plan, shard.rows, shard.bad, fidelity=shard.fidelity))
            progress.count(plan.stop - plan.start)
            progress.add_shard(rows=len(shard.rows.keys), bad=shard.bad, correct=shard.correct, labelled=shard.labelled)


def test_an_executor_of_a_third_party_writes_the_same_store(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.parquet", ROWS)
    shared: dict[str, typing.Any] = {
        "teachers": [write_teacher(tmp_path / "teacher.safetensors")],
        "shard_rows": SHARD_ROWS,
        "batch_size": 4,
        "device": "cpu",
    }
    ours = softlabel.generate(data, out=tmp_path / "ours", **shared)
    theirs = softlabel.generate(data, out=tmp_path / "theirs", executor=LastShardFirst(), **shared)
    assert (
        (theirs.images, theirs.shards_written) == (ROWS, -(-ROWS // SHARD_ROWS)) == (ours.images, ours.shards_written)
    )
    assert theirs.teacher_accuracy == ours.teacher_accuracy
    one, other = (softlabel.open_store(tmp_path / name, verify="full") for name in ("ours", "theirs"))
    assert list(one.keys) == list(other.keys)
    rows = np.arange(len(one))
    assert np.array_equal(one.take(rows).columns["logits"], other.take(rows).columns["logits"])


def test_every_setting_is_an_option_of_the_command_line() -> None:
    shown = run_softlabel("generate", "--help").stdout
    for field in dataclasses.fields(GenerateConfig):
        assert f"--{field.name.replace('_', '-')}" in shown, field.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature: expected a number above 0, found 0"),
        ({"shard_rows": 0}, "shard_rows: expected a number above 0"),
        ({"batch_size": "big"}, "batch_size: expected a whole number or auto, found 'big'"),
        ({"views": True}, "views: expected a whole number, found True"),
        ({"workers": -1}, "workers: expected at least 0"),
        ({"combine": "keep", "weights": [0.5, 0.5]}, "weights: combine 'keep'"),
    ],
)
def test_a_configuration_refuses_what_cannot_be(settings: dict[str, typing.Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerateConfig(**settings)
