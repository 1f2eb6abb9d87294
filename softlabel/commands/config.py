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


def read_options(path: str) -> dict[str, object]:
    """A YAML file of names and values.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected names and values, found {type(found).__name__}")
    return found
