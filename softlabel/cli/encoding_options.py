"""Options of the encodings: --encoding, and the parameters of each encoding's `from_options`."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from typing import Any, Literal, get_type_hints

import docstring_parser

from softlabel.errors import UsageError
from softlabel.store.encodings import Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingOptions:
    """Options of every command with an encoding; `_make_options` adds those of each encoding."""

    encoding: str | None

    def encoding_at(self, temperature: float) -> Encoding | None:
        """Return the chosen encoding for a store of a temperature; None if none was chosen.

        Raises:
            UsageError: an option belongs to another encoding, or is out of range.
        """
        given = {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}
        kind = Encoding.kinds.get(given.pop("encoding", ""))
        for option in given:
            if kind is None or option not in _list_parameters(kind):
                owner = next(one.name for one in Encoding.kinds.values() if option in _list_parameters(one))
                found = "none" if kind is None else repr(kind.name)
                raise UsageError(f"--{option.replace('_', '-')} belongs to --encoding {owner}, found {found}")
        try:
            return None if kind is None else kind.from_options(temperature=temperature, **given)
        except ValueError as error:
            raise UsageError(str(error)) from None


def _list_parameters(kind: type[Encoding]) -> dict[str, Any]:
    """Return option -> type of an encoding."""
    parameters = inspect.signature(kind.from_options).parameters.values()
    names = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name != "temperature"]
    hints = get_type_hints(kind.from_options)
    return {name: hints[name] for name in names}


def _make_options(kinds: Sequence[type[Encoding]], default: str | None, text: str) -> type[EncodingOptions]:
    names: Any = Literal[tuple(kind.name for kind in kinds)]
    texts = {"encoding": text}
    for kind in kinds:
        found = docstring_parser.parse(inspect.getdoc(kind.from_options) or "").params
        texts |= {one.arg_name: " ".join((one.description or "").split()) for one in found}
    own = [(name, hint | None, None) for kind in kinds for name, hint in _list_parameters(kind).items()]
    listed = "\n".join(f"    {name}: {text}" for name, text in texts.items())
    return make_dataclass(
        "EncodingOptions",
        [("encoding", names if default else names | None, default), *own],
        bases=(EncodingOptions,),
        namespace={"__doc__": f"How logits are stored.\n\nAttributes:\n{listed}"},
        frozen=True,
        slots=True,
        kw_only=True,
    )


_ALL = [kind for kind in Encoding.kinds.values() if kind.labels]
_OF_LOGITS = [kind for kind in _ALL if not kind.from_hidden]
_COSTS = "how logits are stored; 'softlabel plan' shows the cost of each in bytes and nats."

OfTeachers = _make_options(_ALL, "float16", _COSTS)
OfFolds = _make_options(_OF_LOGITS, "float16", _COSTS)
OfStores = _make_options(_OF_LOGITS, None, "how logits are stored; the same when absent.")
