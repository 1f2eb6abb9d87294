"""A Dask cluster of real processes for the tests, and teachers whose process fails as those of clusters do.

Legend: B batch, C classes.
"""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor, nn

import softlabel
from tests.support.commands import make_environment
from tests.support.datasets import make_jpeg, write_parquet
from tests.support.shared_data import ROOT

CLASSES = 4
WHITE = 250  # mean of an image that makes a teacher fail


class Teacher(nn.Module):
    """Four numbers that depend on the image, and a failure where an image is white.

    Args:
        harm: ``kill`` ends the process by SIGKILL, ``once`` the first `times` ones that see the image, ``hang`` sleeps
            without end, ``memory`` takes a gigabyte for two seconds, ``noise`` answers otherwise in every process,
            ``break`` the first process that sees the image can do nothing any more, as after an error of its device.
        marks: folder in which a process leaves a file for what it did, and in which threads.
        seconds: that every batch takes.
    """

    num_classes = CLASSES

    def __init__(self, *, harm: str = "none", marks: str = "", seconds: float = 0.0, times: int = 1) -> None:
        super().__init__()
        self.harm, self.seconds, self.times = harm, seconds, times
        self.marks = Path(marks) if marks else None
        self.layer = nn.Linear(3 * 32 * 32, CLASSES)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(self.layer.weight.shape, generator=generator) / 30)
            self.layer.bias.zero_()
        if self.marks is not None:
            (self.marks / f"loaded-{os.getpid()}-{time.monotonic_ns()}").touch()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        time.sleep(self.seconds)
        if self.marks is not None:
            (self.marks / f"thread-{threading.current_thread().name}").touch()
            (self.marks / f"call-{os.getpid()}-{time.monotonic_ns()}").touch()
            if (self.marks / f"broken-{os.getpid()}").exists():
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if bool((images_BCHW.flatten(1).mean(dim=1) > WHITE / 255).any()):
            self._do_harm()
        logits_BC: Tensor = self.layer(images_BCHW.flatten(1))
        if self.harm == "noise":
            return logits_BC + torch.randn(CLASSES, generator=torch.Generator().manual_seed(os.getpid()))
        return logits_BC

    def _do_harm(self) -> None:
        if self.harm == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.harm == "once":
            assert self.marks is not None
            if len(list(self.marks.glob("killed-*"))) < self.times:
                (self.marks / f"killed-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if self.harm == "hang":
            assert self.marks is not None
            if not list(self.marks.glob("hung-*")):
                (self.marks / "hung-1").touch()
                time.sleep(10_000)
        if self.harm == "break":
            assert self.marks is not None
            if not list(self.marks.glob("broken-*")):
                (self.marks / f"broken-{os.getpid()}").touch()
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.harm == "memory":
            filled = np.ones(1 << 27)
            time.sleep(2)
            del filled


def make_teacher_spec(**options: object) -> str:
    """SPEC of `Teacher`; its images are taken as they are, values in [0, 1]."""
    query = "".join(f"&{name}={value}" for name, value in options.items())
    return f"python:tests.support.clusters:Teacher?mean=0,0,0&std=1,1,1&resize=32&crop=32{query}"


def write_jpeg_dataset(path: Path, rows: int, white: Sequence[int] = ()) -> Path:
    """Labelled JPEGs, those at `white` white ones."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (255, 255, 255)).save(buffer, "JPEG")
    blank = buffer.getvalue()
    images = [blank if number in white else make_jpeg(number) for number in range(rows)]
    return write_parquet(path, images, labels=[number % CLASSES for number in range(rows)])


def make_generate_command(*options: object) -> list[str]:
    return [sys.executable, "-m", "softlabel", "generate", *map(str, options)]


def make_cluster_environment(**more: object) -> dict[str, str]:
    """That of the tests, from which workers find the tests' teachers too."""
    root = str(ROOT)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**make_environment(), "PYTHONPATH": path, **{name: str(value) for name, value in more.items()}}


class Cluster:
    """A scheduler and workers as processes of their own, each worker under a nanny."""

    def __init__(self, folder: Path, *, ttl: str = "60s", failures: int = 0, **more: object) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.file = folder / "scheduler.json"
        self.file.unlink(missing_ok=True)  # of an earlier cluster there
        self.environment = make_cluster_environment(
            DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=failures,
            DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL=ttl,
            **more,
        )
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start("scheduler", "--port", 0, "--host", "127.0.0.1", "--dashboard-address", ":0")
        for _ in range(600):
            if self.file.exists() and self.file.stat().st_size:
                break
            time.sleep(0.05)
        time.sleep(0.1)

    def _start(self, kind: str, *options: object, within: Sequence[object] = ()) -> "subprocess.Popen[bytes]":
        command = [
            *within,
            sys.executable,
            "-m",
            f"distributed.cli.dask_{kind}",
            "--scheduler-file",
            self.file,
            *options,
        ]
        log = open(self.folder / f"{kind}-{len(self.processes)}.log", "wb")  # noqa: SIM115
        process = subprocess.Popen(
            [str(part) for part in command], env=self.environment, stdout=log, stderr=log, cwd=self.folder
        )
        self.processes.append(process)
        return process

    @property
    def address(self) -> str:
        return str(json.loads(self.file.read_text())["address"])

    def worker(self, *options: object, within: Sequence[object] = ()) -> "subprocess.Popen[bytes]":
        """Start one worker of one thread, by the command `within` if any; the nanny's process is returned."""
        usual = ["--nthreads", 1, "--host", "127.0.0.1", "--dashboard-address", ":0", "--no-dashboard"]
        return self._start("worker", *usual, *options, within=within)

    def working(self) -> list[int]:
        """The processes that label: children of the nannies (never the nannies themselves)."""
        found = []
        for nanny in self.processes[1:]:
            try:
                for child in psutil.Process(nanny.pid).children():
                    command = " ".join(child.cmdline())
                    if "spawn_main" in command or "forkserver" in command:
                        found.append(child.pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def close(self) -> None:
        for process in self.processes:
            children = []
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()


@contextmanager
def start_cluster(folder: Path, *, workers: int = 2, ttl: str = "60s", **more: object) -> Iterator[Cluster]:
    made = Cluster(folder, ttl=ttl, **more)
    try:
        for _ in range(workers):
            made.worker()
        yield made
    finally:
        made.close()


def read_rows(store: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys, hard labels and soft labels of a whole store, every byte of it checked."""
    with softlabel.open_store(store, verify="full") as opened:
        rows = opened.take(np.arange(len(opened)))
        return list(rows.keys), np.asarray(rows.labels), np.asarray(rows.scaled_logits)


def assert_same_rows(store: Path, expected: Path) -> None:
    ours, theirs = read_rows(store), read_rows(expected)
    assert ours[0] == theirs[0]
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[2], theirs[2])


def list_shards(store: Path) -> list[Path]:
    return sorted((store / "shards").glob("[0-9]*.parquet"))


def wait_until(what: "object", *, seconds: float = 150.0) -> None:
    """Until `what()` is true."""
    assert callable(what)
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
