"""JSON files of a folder that transformers wrote."""

import json
from pathlib import Path
from typing import Any

from softlabel.common.spec import Spec
from softlabel.errors import SpecError


def read_json(spec: Spec, name: str, expected: str | None) -> dict[str, Any]:
    """The object in a file of the folder that a SPEC names.

    Args:
        spec: the SPEC.
        name: of the file.
        expected: what the folder should be, for the message; None: an absent file is an empty object.

    Raises:
        SpecError: the file is not there, or is no JSON object.
    """
    path = Path(spec.name) / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if expected is None:
            return {}
        raise SpecError(f"{spec.text}: {expected}; found no {path}") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise SpecError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
