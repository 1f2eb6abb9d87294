"""The syntax that names data, teachers and students: ``NAME?option=value&option=value``.

    SPEC    kind:name[@checkpoint][?options]       zoo:resnet20@weights/resnet20.th?mean=0.5,0.5,0.5
            python:module:function[@checkpoint][?options], or python:file.py:function
            file.onnx[?options], file.pt2[?options]
    SOURCE  path[?options] or name[?options]       train.parquet?label=fine_label

An option's value is a JSON literal (`true`, `32`, `[1, 2]`, `null`), or else a string, percent-encoded as in a URL
(`&` is `%26`). In a path, `?` is written `%3F` and `%3F` is written `%253F`; nothing else is encoded. A leading `~` is
the home folder.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from softlabel.errors import SpecError

KINDS = ("torchvision", "zoo", "timm", "hf", "text", "lm", "vllm", "python", "run")
# Kinds whose name may be a folder, which brings its own weights.
_FOLDERS = ("run", "hf", "text", "lm", "vllm")
# What begins the name of a language model that a function of the user's makes.
_PYTHON = "python:"
# Suffix -> kind of files that hold a whole network, program and weights.
PROGRAMS = {".onnx": "onnx", ".pt2": "pt2"}
# Options about where weights come from; they do not change the network.
_PLACES = ("download", "trust", "weights_key")
# Likewise of a kind: the store has the tokenizer itself, and how an engine uses the machine is no part of the labels.
ENGINE_PLACES = ("tensor_parallel_size", "gpu_memory_utilization")
_PLACES_OF = {"lm": ("tokenizer",), "vllm": ENGINE_PLACES}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None, "null": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A parsed SPEC: kind and name of the network, path of its checkpoint, and further options."""

    kind: str
    name: str
    checkpoint: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The SPEC as text: ``parse_spec(spec.text) == spec``."""
        kind = "" if self.kind in PROGRAMS.values() else f"{self.kind}:"
        checkpoint = f"@{quote_path(self.checkpoint)}" if self.checkpoint else ""
        return f"{kind}{quote_path(self.name)}{checkpoint}{join_options(self.options)}"

    @property
    def identity(self) -> str:
        """The SPEC without the location of its weights: a store is identified by their hash."""
        places = (*_PLACES, *_PLACES_OF.get(self.kind, ()))
        options = {key: value for key, value in self.options.items() if key not in places}
        return Spec(kind=self.kind, name=self._identifying_name, options=options).text

    @property
    def _identifying_name(self) -> str:
        if self.factory is not None:
            where, _, function = self.factory.rpartition(":")
            start = self.name.removesuffix(self.factory)
            return f"{start}{os.path.basename(where)}:{function}" if where.endswith(".py") else self.name
        brings_files = self.kind in ("run", "text", "lm", "vllm", *PROGRAMS.values())
        local = brings_files or (self.kind == "hf" and os.path.isdir(self.name))
        return os.path.basename(os.path.normpath(self.name)) if local else self.name

    @property
    def factory(self) -> str | None:
        """``module:function`` or ``file.py:function`` of a network that code of the user's makes; None for any
        other."""
        if self.kind == "lm":
            return self.name.removeprefix(_PYTHON) if self.name.startswith(_PYTHON) else None
        return self.name if self.kind == "python" else None

    @property
    def starts_trained(self) -> bool:
        """Whether it names weights that were trained already: a run's, a checkpoint, or published ones."""
        published = (literal(self.options.get(name, "null")) for name in ("weights", "pretrained"))
        is_trained_lm = self.kind == "lm" and self.factory is None and "init" not in self.options
        return self.kind == "run" or self.checkpoint is not None or any(published) or is_trained_lm


def parse_spec(text: str) -> Spec:
    """Parse a SPEC.

    Raises:
        SpecError: the kind is missing or unknown, the name is missing, or an option is not ``name=value``.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS:
        head, options = split_options(text, subject=text)
        if program := PROGRAMS.get(os.path.splitext(head)[1].lower()):
            return Spec(kind=program, name=head, options=options)
        raise SpecError(
            f"{text!r}: expected KIND:NAME[@CHECKPOINT][?OPTIONS] with a KIND of {', '.join(KINDS)}, "
            f"or a file that ends in {' or '.join(PROGRAMS)}; for example zoo:resnet20@weights.th"
        )
    head, options = split_options(rest, subject=text)
    is_folder = kind in _FOLDERS and not (kind == "lm" and head.startswith(_PYTHON))
    if is_folder:
        # The folder holds the weights, and its name may contain an @.
        name, at, checkpoint = head, "", ""
    else:
        name, at, checkpoint = head.partition("@")
    if not name:
        raise SpecError(f"{text!r}: expected a name after '{kind}:', found nothing")
    if at and not checkpoint:
        raise SpecError(f"{text!r}: expected the path of a checkpoint after '@', found nothing")
    return Spec(
        kind=kind,
        name=os.path.expanduser(name) if is_folder else name,
        checkpoint=os.path.expanduser(checkpoint) or None,
        options=options,
    )


def quote_path(path: str) -> str:
    """Escape a path for a SPEC or SOURCE; `split_options` reverses it."""
    return re.sub(r"%((?:25)*3[Ff])", r"%25\1", path).replace("?", "%3F")


def _unquote_path(text: str) -> str:
    return re.sub(r"%25((?:25)*3[Ff])", r"%\1", re.sub(r"%3[Ff]", "?", text))


def split_options(text: str, *, subject: str) -> tuple[str, dict[str, str]]:
    """Split ``head?a=1&b=2`` into its head and its options, with `~` expanded.

    Args:
        text: the text to split.
        subject: what an error message begins with.

    Raises:
        SpecError: an option has no ``=``, or occurs twice.
    """
    head, _, tail = text.partition("?")
    options: dict[str, str] = {}
    for part in filter(None, tail.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise SpecError(
                f"{subject!r}: expected name=value after '?', found {part!r}; a '?' in a path is written %3F"
            )
        if key in options:
            raise SpecError(f"{subject!r}: option {key!r} is given twice")
        options[key] = os.path.expanduser(unquote(value))
    return os.path.expanduser(_unquote_path(head)), options


def replace_option(text: str, name: str, value: str) -> str:
    """Return a SPEC or SOURCE with another value for one of its options."""
    head, sign, tail = text.partition("?")
    new = join_options({name: value}).removeprefix("?")
    return head + sign + "&".join(new if part.startswith(f"{name}=") else part for part in tail.split("&"))


def join_options(options: Mapping[str, str]) -> str:
    """Return options as text with the leading question mark, empty for none; the inverse of `split_options`."""
    pairs = (f"{key}={value.replace('%', '%25').replace('&', '%26')}" for key, value in options.items())
    return f"?{'&'.join(pairs)}" if options else ""


def literal(value: str) -> Any:
    """Parse an option's value: a YAML word for true, false or null in any case, a JSON literal, or else a string."""
    word = value.lower()
    if word in _WORDS:  # bool("False") and bool("no") are True
        return _WORDS[word]
    try:
        return json.loads(value)
    except ValueError:
        return value
