"""The folder of what can be computed again."""

import os
from pathlib import Path

VARIABLE = "SOFTLABEL_CACHE"


def cache_folder() -> Path:
    """Return $SOFTLABEL_CACHE, or softlabel/ in the user's cache folder."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softlabel"
