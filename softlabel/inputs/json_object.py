"""JSON files that hold one object, such as those that transformers writes."""

import json
from pathlib import Path
from typing import Any

from softlabel.errors import SpecError


def read_object(path: Path, absent: str | None = None) -> dict[str, Any]:
    """The object in a file.

    Args:
        path: of the file.
        absent: what to say where there is no file; None: an absent file is an empty object.

    Raises:
        SpecError: the file is not there, or is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if absent is None:
            return {}
        raise SpecError(f"{absent}; found no {path}") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise SpecError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
