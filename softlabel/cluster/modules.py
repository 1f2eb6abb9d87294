"""Upload modules of `python:` teachers to the workers: single files in the working folder, which workers lack."""

import importlib.util
import logging
import os
from collections.abc import Iterable
from typing import Any

from softlabel.common.spec import parse_spec
from softlabel.errors import UsageError, one_line

log = logging.getLogger("softlabel")


def upload_modules(client: Any, teachers: Iterable[str]) -> None:
    """Upload the modules of SPECs that are single files in the working folder, to present and later workers.

    Args:
        client: a connected `distributed.Client`.
        teachers: SPECs; only `python:` factories have modules.

    Raises:
        UsageError: a worker cannot import a module.
    """
    files = {path for text in teachers if (path := _find_file(text)) is not None}
    for path in sorted(files):
        try:
            client.upload_file(path)
        except Exception as error:  # raised by the module, for example because workers lack a package
            raise UsageError(f"{path}: the workers cannot import it: {one_line(error, with_type=True)}") from error
        log.info("%s: uploaded to the workers", path)


def _find_file(text: str) -> str | None:
    factory = parse_spec(text).factory
    if factory is None:
        return None
    name = factory.rpartition(":")[0]
    try:
        found = importlib.util.find_spec(name) if "." not in name else None  # packages are installed on workers
    except ValueError:  # a module without a file, such as __main__
        found = None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        return None
    beside = os.path.dirname(os.path.abspath(found.origin)) == os.getcwd()
    return found.origin if beside and found.submodule_search_locations is None else None
