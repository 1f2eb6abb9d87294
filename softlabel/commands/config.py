"""The resolved options of a command, kept beside what it wrote."""

from collections.abc import Mapping
from pathlib import Path


def write_config(path: Path, options: Mapping[str, object]) -> None:
    """The resolved options as a file that ``--config`` takes."""
    import yaml

    path.write_text(yaml.safe_dump(dict(options), sort_keys=False))
