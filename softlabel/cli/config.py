"""Options of a command in YAML files and in the manifest of a store."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from softlabel.errors import StoreError, UsageError

if TYPE_CHECKING:
    from softlabel.store.manifest import Manifest


def write_config(path: Path, options: Mapping[str, object]) -> None:
    """Write options as a YAML file for ``--config``.

    Raises:
        StoreError: it cannot be written.
    """
    import yaml

    try:
        path.write_text(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error}") from error


def require_local(path: str, option: str) -> str:
    """Return a path after checking that it is local.

    Raises:
        UsageError: it is empty or a URL.
    """
    if not path or "://" in path:
        raise UsageError(f"{option}: expected a local path, found {path!r}")
    return path


def options_of(store: object, manifest: "Manifest") -> str:
    """Return the options that a store was made with, as YAML for ``--config``.

    Raises:
        UsageError: its manifest records none.
    """
    import yaml

    found = manifest.recorded.get("options")
    if not isinstance(found, dict):
        raise UsageError(
            f"{store}: expected options in its manifest, found none; another program or an earlier version made it"
        )
    return yaml.safe_dump(dict(found), sort_keys=False, allow_unicode=True)


def read_options(path: str) -> dict[str, object]:
    """Read a YAML file of names and values.

    Raises:
        UsageError: it cannot be read, or has another form.
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
