"""What trials of a run have found, in its folder, so that a resumed run keeps to it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from softlabel.training import run_folder

T = TypeVar("T")


def read_choices(path: Path, kind: type[T]) -> list[T]:
    """The choices, dataclasses with a tuple of `students`; none where they cannot be read: a trial is made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [kind(**{**one, "students": tuple(one["students"])}) for one in found]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def write_choices(path: Path, choices: Sequence[Any]) -> None:
    """Replace what was found before."""
    text = json.dumps([asdict(one) for one in choices], indent=2)
    run_folder.write_atomically(path, text.encode() + b"\n")


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
