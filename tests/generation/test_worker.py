"""What travels between a client and its workers."""

import pickle

from softlabel.generation.worker import Outcome, Request
from softlabel.store.fidelity import Fidelity
from softlabel.store.manifest import ShardRecord, shard_file


def test_requests_and_outcomes_are_small() -> None:
    """Long paths, four teachers: a message stays under 2 kB, and says nothing of the samples."""
    folder = "/mnt/shared/projects/distillation/" + "x" * 120
    request = Request(
        session="0" * 32,
        out=f"{folder}/labels",
        run="0" * 32,
        data=f"{folder}/train-{{00000..09999}}.tar?classes={folder}/names.txt",
        teachers=tuple(f"torchvision:resnet50@{folder}/resnet50-{number}.pth" for number in range(4)),
    )
    assert len(pickle.dumps((request, 123_456, "0" * 32, 3600.0))) < 2000
    costs = Fidelity(mean_t1=1e-7, worst_t1=1e-6, mean_t=1e-7, worst_t=1e-6)
    key = "train/n01440764/n01440764_10026.JPEG"
    record = ShardRecord(
        number=7,
        file=shard_file(7, "0" * 32, "parquet"),
        rows=65_536,
        bytes=134_217_728,
        xxh3="0" * 32,
        first_key=key,
        last_key=key,
        fidelity=costs,
    )
    assert len(pickle.dumps(Outcome(number=7, record=record, seconds=330.0, worker="tcp://10.0.0.1:40000"))) < 700
