"""Processes of their own, for tests that kill, signal or outnumber them: forked from one that has imported torch.

A fresh interpreter takes seconds to import what `softlabel` needs, which these tests would pay ten times over.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from softlabel.cli.main import main
from tests.support.commands import make_environment

SERVER = multiprocessing.get_context("forkserver")
# The server imports them once; it has no threads and nothing of the tests' state.
SERVER.set_forkserver_preload(
    [
        *("tests.support.processes", "tests.support.training_runs"),
        *("softlabel.generation.generate", "softlabel.training.crossfit", "softlabel.cli.crossfit_options"),
        # Every optimiser imports it, which takes longer than all others together.
        *("torch._dynamo", "torch.export"),
    ]
)


def _begin(out: str, err: str, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(make_environment())
    torch.set_num_threads(1)
    # Tests that run in the background ignore Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = target(*arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    if process.is_alive():
        process.kill()


class Process:
    """`target(*arguments)` in a process of its own; used as `subprocess.Popen` is."""

    def __init__(self, target: Callable[..., Any], *arguments: Any) -> None:
        self._files = [Path(tempfile.mkstemp(prefix="softlabel-test-")[1]) for _ in range(2)]
        out, err = map(str, self._files)
        self._process = SERVER.Process(target=_begin, args=(out, err, target, arguments))
        self._process.start()
        weakref.finalize(self, _kill, self._process)  # left by a failed test: the end of all tests would wait for it

    @property
    def returncode(self) -> int | None:
        """As for `poll`: negative for the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; what it printed on standard output and on standard error."""
        self._process.join()
        stdout, stderr = (file.read_text() for file in self._files)
        for file in self._files:
            file.unlink()
        return stdout, stderr


def start_softlabel(*arguments: object) -> Process:
    """`softlabel ARGUMENTS` in a process of its own."""
    return Process(main, [str(argument) for argument in arguments])


def start_interpreter(*arguments: object) -> Process:
    """The same in an interpreter of its own, which ends as one that a user has started does."""
    return Process(os.execv, sys.executable, [sys.executable, "-m", "softlabel", *map(str, arguments)])
