"""The resolved options of a command, kept beside what it wrote."""

from collections.abc import Mapping

from softlabel.errors import StoreError, UsageError

NAME = "config.yaml"


def write_config(folder: str, options: Mapping[str, object], name: str = NAME) -> None:
    """The resolved options in a folder (or behind an fsspec URL), as a file that ``--config`` takes.

    Raises:
        StoreError: it cannot be written.
    """
    import fsspec
    import yaml

    path = f"{folder.rstrip('/')}/{name}"
    try:
        with fsspec.open(path, "w", encoding="utf-8") as file:
            file.write(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error}") from error


def local(path: str, option: str) -> str:
    """The path, if it is one of this machine's.

    Raises:
        UsageError: it is empty or a URL.
    """
    if not path or "://" in path:
        raise UsageError(f"{option}: expected a path on this machine, found {path!r}")
    return path
