"""The command line and Python scripts, run in the process of the tests as in a process of their own."""

import importlib
import io
import logging
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch

from softlabel.cli.main import main
from tests.support.shared_data import ROOT


def make_environment() -> dict[str, str]:
    # One thread: tests compare results bit for bit, and two processes share two cores.
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@contextmanager
def isolate_command_line(folder: Path) -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
    """What the command line would find in a process of its own: its folder, streams, log and modules of the folder.

    Yields its standard output and its standard error.
    """
    # As pipes in UTF-8 are, so that text that cannot be encoded fails here too.
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    log = logging.getLogger()
    handlers, log.handlers = log.handlers, []  # pytest's, with which the command line would install none
    level, known, path = log.level, set(sys.modules), list(sys.path)
    try:
        with (
            chdir(folder),
            mock.patch.dict(os.environ, make_environment()),
            redirect_stdout(out),
            redirect_stderr(err),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.showwarning = lambda *warning, **_: err.write(warnings.formatwarning(*warning[:4]))
            sys.path.insert(0, str(folder))
            importlib.invalidate_caches()
            yield out, err
    finally:
        log.handlers = handlers
        log.setLevel(level)
        sys.path[:] = path
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).parent == folder and folder != ROOT:
                del sys.modules[name]  # another test may have another module of this name


def run_in_process(
    what: Callable[[], int | None], arguments: Sequence[object], cwd: Path | None
) -> subprocess.CompletedProcess[str]:
    """What `what` returns and prints, taken for a process of its own."""
    ended: object
    with isolate_command_line(cwd or Path.cwd()) as (out, err):
        try:
            ended = what()
        except SystemExit as left:
            ended = left.code
    code = ended if isinstance(ended, int) else int(ended is not None)
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, code, stdout, stderr)


def run_softlabel(
    *arguments: object, cwd: Path | None = None, code: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, in this process (importing torch takes seconds); asserts the exit code."""
    done = run_in_process(lambda: main([str(argument) for argument in arguments]), arguments, cwd)
    assert "Traceback" not in done.stderr, done.stderr
    if code is not None:
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_script(path: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a file of Python with these arguments, in this process."""
    words = [str(path), *map(str, arguments)]
    with mock.patch.object(sys, "argv", words):
        return run_in_process(lambda: runpy.run_path(str(path), run_name="__main__") and None, words, cwd)


def drop_source_lines(stderr: str) -> list[str]:
    """The lines on standard error but those that say what a source holds, with which every run begins."""
    return [line for line in stderr.splitlines() if not re.search(r": [0-9,]+ samples, ", line)]
