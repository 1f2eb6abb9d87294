"""Internals of other libraries that are used: they are there and do what is needed. Each test names the module."""

import io
import tarfile

import numpy as np
import pytest
from torch import arange
from torch.utils.data import DataLoader, TensorDataset

from softlabel.dataset.tarfile_internals import forget_members
from softlabel.loader.dataloader_internals import end_workers, worker_processes
from softlabel.store.gather import Parts


def test_distributed_client_internals() -> None:
    """softlabel/cluster/client_internals.py"""
    distributed = pytest.importorskip("distributed")
    from softlabel.cluster.client_internals import cancel, gather, worker_states

    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        futures = client.map(abs, [-1, -2])
        assert [future.result(timeout=30) for future in futures] == [1, 2]
        assert gather(client, futures, timeout=30) == [1, 2]
        assert list(worker_states(client, timeout=30).values()) == ["running"]
        cancel(client, futures, timeout=30)
        assert {future.status for future in futures} == {"cancelled"}


def test_torch_dataloader_internals() -> None:
    """softlabel/loader/dataloader_internals.py"""
    loader = DataLoader(TensorDataset(arange(4)), num_workers=1, persistent_workers=True)
    assert list(worker_processes(loader)) == []
    for _ in range(2):
        assert len(list(loader)) == 4
        (process,) = worker_processes(loader)
        assert process.is_alive()
        end_workers(loader)
        assert not process.is_alive()
        assert list(worker_processes(loader)) == []


def test_tarfile_internals() -> None:
    """softlabel/dataset/tarfile_internals.py"""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for number in range(5):
            archive.addfile(tarfile.TarInfo(str(number)))
    raw.seek(0)
    names = []
    with tarfile.TarFile(fileobj=raw) as archive:
        while (member := archive.next()) is not None:
            forget_members(archive)
            names.append(member.name)
        assert names == ["0", "1", "2", "3", "4"]
        assert not archive.members


@pytest.mark.parametrize("spanning", [True, False])
def test_rows_of_several_arrays_by_their_addresses(spanning: bool) -> None:
    """softlabel/store/gather.py, and its way without addresses."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 1 << 15, (rows, 3)).astype(np.uint16) for rows in (5, 0, 1, 300, 2)]
    arrays.insert(2, rng.integers(0, 1 << 15, (14, 3)).astype(np.uint16)[::2])  # not contiguous
    whole = np.concatenate(arrays)
    parts = Parts(arrays, spanning=spanning)
    for rows_B in (rng.integers(0, len(whole), 500), np.arange(len(whole)), np.array([len(whole) - 1]), whole[:0, 0]):
        np.testing.assert_array_equal(parts.take(rows_B.astype(np.int64)), whole[rows_B])
    for wrong in ([-1], [0, len(whole)]):
        with pytest.raises(IndexError, match="rows"):
            parts.take(np.array(wrong))
