"""The file formats by their names."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import get_args

from softlabel.store.formats.base import OpenShard
from softlabel.store.manifest import Format

# Imported when one of their files is: h5py is not for those who never see HDF5.
_MODULES = {format: f"softlabel.store.formats.{format}" for format in get_args(Format)}


def format_module(format: Format) -> ModuleType:
    """`write` and `open_shard` of a format."""
    return importlib.import_module(_MODULES[format])


def open_shard(path: Path, format: Format) -> OpenShard:
    """Raises StoreCorruptError for anything that is not a whole shard of this format, FileNotFoundError when absent."""
    opened: OpenShard = format_module(format).open_shard(path)
    return opened
