"""File formats by name."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import get_args

from softlabel.store.formats.base import OpenShard
from softlabel.store.manifest import Format

# Imported on first use: Parquet needs no h5py.
_MODULES = {format: f"softlabel.store.formats.{format}" for format in get_args(Format)}


def format_module(format: Format) -> ModuleType:
    """Return the module of a format, with `write` and `open_shard`."""
    return importlib.import_module(_MODULES[format])


def open_shard(path: Path, format: Format) -> OpenShard:
    """Open a shard.

    Raises:
        StoreCorruptError: the file is damaged or not a shard of this format.
        FileNotFoundError: there is no file.
    """
    opened: OpenShard = format_module(format).open_shard(path)
    return opened
