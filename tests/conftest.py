"""What every test may ask for."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What stores keep in the user's cache folder is kept apart, by the processes that a test starts too."""
    os.environ["SOFTLABEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


# Seconds: a test is stuck that computes for less than IDLE of PATIENCE. A clock alone would also end those that a busy
# machine does not let run.
PATIENCE, IDLE = 120.0, 1.0


def _computed() -> float:
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

    def look(number: int, frame: object) -> None:
        nonlocal before
        now = _computed()
        if 0 <= now - before < IDLE:
            pytest.fail(f"no progress: {now - before:.1f} s of computing in {PATIENCE:.0f} s")
        before = now

    old = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real CIFAR-10 images and real pretrained teachers; the test skips where there is none."""
    folder = Path(os.environ.get("SOFTLABEL_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "cifar10-jpeg" / "test.parquet").is_file():
        pytest.skip(f"no CIFAR-10 images and teachers in {folder}; set SOFTLABEL_DATA to a folder that has them")
    return folder.resolve()
