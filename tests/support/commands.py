"""What several tests build: small image files of real formats, teachers with weights, runs of the command line."""

import importlib
import io
import json
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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from softlabel.cli.main import main
from softlabel.models import build_model

CLASSES = ("red", "green", "blue", "grey")
ROOT = Path(__file__).parents[2]


def jpeg(seed: int, size: int = 32) -> bytes:
    """A small JPEG whose pixels depend on the seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes],
    *,
    keys: Sequence[str] | None = None,
    labels: Sequence[int | None] | None = None,
    class_names: Sequence[str] = CLASSES,
) -> Path:
    """A Parquet file in the Hugging Face image layout."""
    keys = keys or [f"image-{number:05d}.jpg" for number in range(len(images))]
    columns = {
        "image": pa.array(
            [{"bytes": image, "path": key} for image, key in zip(images, keys, strict=True)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    }
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"names": list(class_names), "_type": "ClassLabel"}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def write_dataset(path: Path, rows: int, *, seed: int = 0, labelled: bool = True) -> Path:
    labels = [number % len(CLASSES) for number in range(rows)] if labelled else None
    return write_parquet(path, [jpeg(seed * 1_000_000 + number) for number in range(rows)], labels=labels)


def write_teacher(path: Path, *, name: str = "resnet8", num_classes: int = len(CLASSES), seed: int = 0) -> str:
    """A checkpoint with random weights that are large enough to give varied logits; returns its SPEC."""
    torch.manual_seed(seed)
    model = build_model(f"zoo:{name}", num_classes=num_classes)
    state = model.state_dict()
    state["linear.weight"] *= 8
    save_file(state, path)
    return f"zoo:{name}@{path}"


def environment() -> dict[str, str]:
    # One thread: tests compare results bit for bit, and two processes share two cores.
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@contextmanager
def command_line_process(folder: Path) -> Iterator[tuple[io.TextIOWrapper, io.TextIOWrapper]]:
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
            mock.patch.dict(os.environ, environment()),
            redirect_stdout(out),
            redirect_stderr(err),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
        ):
            warnings.showwarning = lambda *told, **_: err.write(warnings.formatwarning(*told[:4]))
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


def run_here(
    what: Callable[[], int | None], arguments: Sequence[object], cwd: Path | None
) -> subprocess.CompletedProcess[str]:
    """What `what` returns and prints, taken for a process of its own."""
    ended: object
    with command_line_process(cwd or Path.cwd()) as (out, err):
        try:
            ended = what()
        except SystemExit as left:
            ended = left.code
    code = ended if isinstance(ended, int) else int(ended is not None)
    printed, told = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, code, printed, told)


def softlabel(*arguments: object, cwd: Path | None = None, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, in this process (importing torch takes seconds); asserts the exit code."""
    done = run_here(lambda: main([str(argument) for argument in arguments]), arguments, cwd)
    assert "Traceback" not in done.stderr, done.stderr
    if code is not None:
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def script(path: Path, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a file of Python with these arguments, in this process."""
    words = [str(path), *map(str, arguments)]
    with mock.patch.object(sys, "argv", words):
        return run_here(lambda: runpy.run_path(str(path), run_name="__main__") and None, words, cwd)


def beside_source(stderr: str) -> list[str]:
    """The lines on standard error but those that say what a source holds, with which every run begins."""
    return [line for line in stderr.splitlines() if not re.search(r": [0-9,]+ samples, ", line)]
