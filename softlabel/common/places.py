"""Names of data, teachers and stores that mean the same in every process, whatever its working directory."""

import os
from collections.abc import Mapping

from softlabel.common.spec import PROGRAMS, Spec, join_options, parse_spec, quote_path, split_options


def absolute_source(text: str) -> str:
    """A SOURCE whose local paths are absolute: workers have working directories of their own."""
    plain = os.path.expanduser(text)
    if os.path.exists(plain):
        # A folder may be called as the data that comes with scikit-learn is, which SOURCE means.
        return text if text == "digits" else os.path.abspath(plain)
    head, options = split_options(text, subject=text)
    if head != "digits" and not head.startswith("torchvision:") and "://" not in head:
        head = os.path.abspath(head)  # braces and globs too
    return f"{quote_path(head)}{join_options(_absolute(options))}"


def absolute_spec(text: str) -> str:
    """A SPEC whose local paths are absolute."""
    spec = parse_spec(text)
    name = spec.name
    if spec.kind in ("run", "hf", *PROGRAMS.values()) and os.path.exists(name):
        name = os.path.abspath(name)
    checkpoint = os.path.abspath(spec.checkpoint) if spec.checkpoint else None
    return Spec(kind=spec.kind, name=name, checkpoint=checkpoint, options=_absolute(spec.options)).text


def _absolute(options: Mapping[str, str]) -> dict[str, str]:
    return {
        key: os.path.abspath(value) if key in ("root", "classes") or value.endswith(".npy") else value
        for key, value in options.items()
    }


def absolute_root(out: str | os.PathLike[str]) -> str:
    """A store's folder as every worker reaches it; URLs stay."""
    text = os.path.expanduser(out)
    return text if "://" in text else os.path.abspath(text)
