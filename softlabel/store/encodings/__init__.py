"""What a row of a store is: one file an encoding, and the table of their names."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TypeVar

from softlabel.store.encodings.base import Encoding, LastLayer
from softlabel.store.encodings.float16 import Float16
from softlabel.store.encodings.float32 import Float32
from softlabel.store.encodings.head import Head
from softlabel.store.encodings.int8 import Int8
from softlabel.store.encodings.none import NoLabels
from softlabel.store.encodings.sampled import Sampled
from softlabel.store.encodings.topk import TopK

__all__ = [
    "Encoding",
    "Float16",
    "Float32",
    "Head",
    "Int8",
    "LastLayer",
    "NoLabels",
    "Sampled",
    "TopK",
    "fitted",
    "register",
]

E = TypeVar("E", bound=type[Encoding])


def register(kind: E) -> E:
    """Let stores be written and read in an encoding: a decorator of its class, the outermost one."""
    if Encoding.kinds.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"encoding {kind.name!r} is there already; choose another name")
    return kind


for _kind in (Float32, Float16, Int8, TopK, Sampled, Head, NoLabels):  # the most exact first
    register(_kind)


def fitted(
    encoding: Encoding | str,
    *,
    temperature: float,
    layer: Callable[[], LastLayer] | None = None,
    there: Encoding | None = None,
) -> Encoding:
    """An encoding, or that of a name, with what was left out of its parameters: see `Encoding.fit`. Raises ValueError
    for a name that is none, or of an encoding with parameters that have to be given."""
    if isinstance(encoding, str):
        if encoding not in Encoding.kinds:
            raise ValueError(f"encoding: expected one of {', '.join(Encoding.kinds)}, found {encoding!r}")
        kind = Encoding.kinds[encoding]
        if missing := [one.name for one in fields(kind) if one.default is MISSING]:
            raise ValueError(f"encoding {encoding!r} needs {missing[0]!r}; give {kind.__name__}({missing[0]}=...)")
        encoding = kind()
    return encoding.fit(temperature=temperature, layer=layer, there=there)
