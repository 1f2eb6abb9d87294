"""Modules of `python:` teachers that lie beside the client, brought to the workers.

A worker has its own folder of work and its own installed packages. A module of one file in the client's folder is what
neither has; Dask gives it to every worker, those that come later too.
"""

import importlib.util
import logging
import os
from collections.abc import Iterable
from typing import Any

from softlabel.common.spec import parse_spec
from softlabel.errors import UsageError, one_line

log = logging.getLogger("softlabel")


def upload_modules(client: Any, teachers: Iterable[str]) -> None:
    """Give the workers the modules of these SPECs that are single files in the working folder.

    A worker that has another state of such a module imports it again.

    Args:
        client: a connected `distributed.Client`.
        teachers: SPECs; those that are no `python:` factories need nothing.

    Raises:
        UsageError: a worker cannot import a module.
    """
    files = {path for text in teachers if (path := _file_beside(text)) is not None}
    for path in sorted(files):
        try:
            client.upload_file(path)
        except Exception as error:  # what the module raises there, such as for a package that workers lack
            raise UsageError(f"{path}: the workers cannot import it: {one_line(error, with_type=True)}") from error
        log.info("%s: given to the workers", path)


def _file_beside(text: str) -> str | None:
    spec = parse_spec(text)
    if spec.kind != "python":
        return None
    name = spec.name.partition(":")[0]
    try:
        found = importlib.util.find_spec(name) if "." not in name else None  # a package is installed, or shared
    except ValueError:  # a module without a file, such as __main__
        found = None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        return None
    beside = os.path.dirname(os.path.abspath(found.origin)) == os.getcwd()
    return found.origin if beside and found.submodule_search_locations is None else None
