"""The resolved options of a command, as files and as a store keeps them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from softlabel.errors import StoreError, UsageError

if TYPE_CHECKING:
    from softlabel.store.manifest import Manifest


def write_config(path: Path, options: Mapping[str, object]) -> None:
    """The resolved options as a file that ``--config`` takes.

    Raises:
        StoreError: it cannot be written.
    """
    import yaml

    try:
        path.write_text(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True), encoding="utf-8")
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


def options_of(store: object, manifest: "Manifest") -> str:
    """The options that a store was made with, as a file that ``--config`` takes.

    Raises:
        UsageError: its manifest records none.
    """
    import yaml

    found = manifest.recorded.get("options")
    if not isinstance(found, dict):
        raise UsageError(
            f"{store}: expected the options that it was made with in its manifest, found none: another "
            "program made it, or an earlier version"
        )
    return yaml.safe_dump(dict(found), sort_keys=False, allow_unicode=True)


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
