"""The little language in which data, teachers and students are named: ``NAME?option=value&option=value``.

    SPEC    kind:name[@checkpoint][?options]       zoo:resnet20@weights/resnet20.th?mean=0.5,0.5,0.5
            file.onnx[?options], file.pt2[?options]
    SOURCE  path[?options] or name[?options]       train.parquet?label=fine_label

An option's value is a JSON literal (`true`, `32`, `[1, 2]`, `null`), or else a string. A `&` inside a value is
written `%26`; other `%xx` mean what they mean in a URL.

Before the options a `?` that belongs to a path is written `%3F`, and a `%3F` that belongs to it `%253F`; nothing else
is changed there. A path that begins with `~` starts at the home folder.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from softlabel.errors import SpecError

KINDS = ("torchvision", "zoo", "timm", "hf", "python", "run")
# A file that is a whole network, program and weights: its suffix says what it is.
PROGRAMS = {".onnx": "onnx", ".pt2": "pt2"}
# Options that say where a network comes from, not what it is.
_PLACES = ("download", "trust", "weights_key")
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None, "null": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A model by name: where its builder is, which weights it starts from, and what else its builder is told."""

    kind: str
    name: str
    checkpoint: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The SPEC as one would write it: ``parse_spec(spec.text) == spec``."""
        kind = "" if self.kind in PROGRAMS.values() else f"{self.kind}:"
        checkpoint = f"@{quote_path(self.checkpoint)}" if self.checkpoint else ""
        return f"{kind}{quote_path(self.name)}{checkpoint}{join_options(self.options)}"

    @property
    def identity(self) -> str:
        """The SPEC without the place where its weights lie, which is no part of what a store is: their hash is."""
        local = self.kind in ("run", *PROGRAMS.values()) or (self.kind == "hf" and os.path.isdir(self.name))
        name = os.path.basename(os.path.normpath(self.name)) if local else self.name
        options = {key: value for key, value in self.options.items() if key not in _PLACES}
        return Spec(kind=self.kind, name=name, options=options).text


def parse_spec(text: str) -> Spec:
    """Read a SPEC.

    Raises:
        SpecError: no kind, a kind that there is not, no name, or options that are not ``name=value``.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS:
        head, options = split_options(text, subject=text)
        if program := PROGRAMS.get(os.path.splitext(head)[1].lower()):
            return Spec(kind=program, name=head, options=options)
        raise SpecError(
            f"{text!r}: expected KIND:NAME[@CHECKPOINT][?OPTIONS] with a KIND of {', '.join(KINDS)}, "
            f"or a file that ends in {' or '.join(PROGRAMS)}; for instance zoo:resnet20@weights.th"
        )
    head, options = split_options(rest, subject=text)
    if kind in ("run", "hf"):
        # The folder may well have an @ in its name, and it brings its own weights.
        name, at, checkpoint = head, "", ""
    else:
        name, at, checkpoint = head.partition("@")
    if not name:
        raise SpecError(f"{text!r}: expected a name after '{kind}:', found nothing")
    if at and not checkpoint:
        raise SpecError(f"{text!r}: expected the path of a checkpoint after '@', found nothing")
    return Spec(
        kind=kind,
        name=os.path.expanduser(name) if kind in ("run", "hf") else name,
        checkpoint=os.path.expanduser(checkpoint) or None,
        options=options,
    )


def quote_path(path: str) -> str:
    """A path as it is written in a SPEC or SOURCE; `split_options` gives it back."""
    return re.sub(r"%((?:25)*3[Ff])", r"%25\1", path).replace("?", "%3F")


def _unquote_path(text: str) -> str:
    return re.sub(r"%25((?:25)*3[Ff])", r"%\1", re.sub(r"%3[Ff]", "?", text))


def split_options(text: str, *, subject: str) -> tuple[str, dict[str, str]]:
    """Cut ``head?a=1&b=2`` into its head and its options, `~` expanded; `subject` is what an error is about.

    Raises:
        SpecError: an option without ``=``, or one given twice.
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


def join_options(options: Mapping[str, str]) -> str:
    """Options as they stand behind a name, with the question mark; nothing for none. The inverse of `split_options`."""
    pairs = (f"{key}={value.replace('%', '%25').replace('&', '%26')}" for key, value in options.items())
    return f"?{'&'.join(pairs)}" if options else ""


def literal(value: str) -> Any:
    """The Python value of an option: a JSON literal, a word of YAML for true, false or nothing in any case, or else the
    string itself."""
    word = value.lower()
    # bool("False") and bool("no") are True: a word must not turn on what it turns off.
    if word in _WORDS:
        return _WORDS[word]
    try:
        return json.loads(value)
    except ValueError:
        return value
