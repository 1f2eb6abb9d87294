"""Fixtures and hooks of all tests."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.shared_data import find_shared_data


@pytest.fixture(scope="session", autouse=True)
def keep_caches_apart(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give this process and all that it starts a cache folder of their own, not the user's."""
    os.environ["SOFTLABEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


# Seconds: a test is stuck that computes for less than IDLE of PATIENCE. A clock alone would also end those that a busy
# machine does not let run.
PATIENCE, IDLE = 120.0, 1.0


def _sum_processor_seconds() -> float:
    """Seconds of processor time that this process and all that it started have used."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])
    return total


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Fail a test that waits for something that does not come."""
    before = float("-inf")

    def check_progress(number: int, frame: object) -> None:
        nonlocal before
        now = _sum_processor_seconds()
        if 0 <= now - before < IDLE:
            pytest.fail(f"no progress: {now - before:.1f} s of computing in {PATIENCE:.0f} s")
        before = now

    old = signal.signal(signal.SIGALRM, check_progress)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real CIFAR-10 images and real pretrained teachers; the test skips where there is none."""
    folder = find_shared_data()
    if folder is None:
        pytest.skip("no CIFAR-10 images and teachers; set SOFTLABEL_DATA to a folder that has them")
    return folder
