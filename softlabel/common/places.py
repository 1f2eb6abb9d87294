"""Names of data, teachers and stores with absolute paths: valid in every process, whatever its working directory."""

import os
from collections.abc import Mapping

from softlabel.common.spec import PROGRAMS, Spec, join_options, parse_spec, quote_path, split_options


def absolute_source(text: str) -> str:
    """Return a SOURCE with its local paths made absolute."""
    plain = os.path.expanduser(text)
    if os.path.exists(plain):
        # A SOURCE "digits" means scikit-learn's data even if a folder of this name exists.
        return text if text == "digits" else os.path.abspath(plain)
    head, options = split_options(text, subject=text)
    if head != "digits" and not head.startswith("torchvision:") and "://" not in head:
        head = os.path.abspath(head)  # braces and globs too
    return f"{quote_path(head)}{join_options(_absolute(options))}"


def absolute_spec(text: str) -> str:
    """Return a SPEC with its local paths made absolute."""
    spec = parse_spec(text)
    name = spec.name
    if spec.kind in ("run", "hf", "text", "lm", "vllm", *PROGRAMS.values()) and os.path.exists(name):
        name = os.path.abspath(name)
    elif spec.factory is not None and (where := spec.factory.rpartition(":")[0]).endswith(".py"):
        start, function = name.removesuffix(spec.factory), spec.factory.rpartition(":")[2]
        name = f"{start}{os.path.abspath(os.path.expanduser(where))}:{function}"
    checkpoint = os.path.abspath(spec.checkpoint) if spec.checkpoint else None
    return Spec(kind=spec.kind, name=name, checkpoint=checkpoint, options=_absolute(spec.options)).text


def _absolute(options: Mapping[str, str]) -> dict[str, str]:
    return {
        key: os.path.abspath(value) if key in ("root", "classes", "tokenizer") or value.endswith(".npy") else value
        for key, value in options.items()
    }


def absolute_root(out: str | os.PathLike[str]) -> str:
    """Return a store's folder as an absolute path; a URL is returned as it is."""
    text = os.path.expanduser(out)
    return text if "://" in text else os.path.abspath(text)
