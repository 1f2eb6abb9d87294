"""Frozen dataclasses <-> JSON with strict checks: manifests may come from untrusted sources.

Supported: str, int, float, bool, None-unions, tuple[X, ...], Mapping[str, Any], Literal, nested dataclasses and the
kinds of a `Tagged`. An absent field needs a default, an unknown one is an error. A decoder is built once per type.
"""

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
INT_LIMIT = 2**63
OMIT = {"omit": True}  # metadata of a field that is left out of the JSON if it has its default
ABSENT = "absent"  # key of the metadata of a field that is left out of the JSON at this value, which is not its default


class Tagged:
    """A dataclass of one of several `kinds`, whose JSON begins with the `name` of its kind."""

    __slots__ = ()
    name: ClassVar[str]
    kinds: ClassVar[dict[str, Any]]


class SchemaError(ValueError):
    """A JSON value of the wrong form; the message is `path: expected X, found Y`."""

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.problem, self.path = problem, path

    def inside(self, step: str) -> "SchemaError":
        joint = "" if not self.path or self.path.startswith("[") else "."
        return SchemaError(self.problem, f"{step}{joint}{self.path}")


def to_json(value: Any) -> Any:
    """Convert a dataclass, tuple, mapping or scalar to plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        tag = {"name": value.name} if isinstance(value, Tagged) else {}
        return tag | {
            field.name: to_json(found)
            for field, found in fields
            if not (field.metadata.get("omit") and found == field.default)
            and not (ABSENT in field.metadata and found == field.metadata[ABSENT])
        }
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): to_json(item) for name, item in value.items()}
    return value


def from_json(kind: type[T], value: Any) -> T:
    """Convert parsed JSON to a `kind`.

    Raises:
        SchemaError: the value does not fit.
    """
    decoded: T = _make_decoder(cast(Any, kind))(value)
    return decoded


def dumps(value: Any) -> bytes:
    """Return canonical JSON as UTF-8 (sorted names, no spaces): equal values have equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def loads(raw: bytes) -> Any:
    """Parse JSON.

    Raises:
        SchemaError: it is not JSON, or has NaN, duplicate names, too deep nesting or too many digits.
    """

    def no_constant(name: str) -> Any:
        raise SchemaError(f"{name} is not JSON")

    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise SchemaError("a name occurs twice in one object")
        return found

    try:
        return json.loads(raw.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=no_doubles)
    except SchemaError:
        raise
    except RecursionError:
        raise SchemaError("JSON is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, too many digits
        raise SchemaError(f"not JSON: {error}") from None


def _describe_found(value: Any) -> str:
    text = repr(value)
    return f"found {type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def _decode_text(value: Any) -> str:
    if type(value) is not str:
        raise SchemaError(f"expected text, {_describe_found(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise SchemaError(f"expected Unicode text, {_describe_found(value)}") from None
    return value


def _decode_integer(value: Any) -> int:
    if type(value) is not int or not -INT_LIMIT <= value < INT_LIMIT:
        raise SchemaError(f"expected a 64-bit integer, {_describe_found(value)}")
    return value


def _decode_number(value: Any) -> float:
    if type(value) is int and abs(value) < INT_LIMIT:
        return float(value)
    if type(value) is not float or not math.isfinite(value):
        raise SchemaError(f"expected a finite number, {_describe_found(value)}")
    return value


def _decode_boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise SchemaError(f"expected true or false, {_describe_found(value)}")
    return value


def _object(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise SchemaError(f"expected an object, {_describe_found(value)}")
    return value


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    str: _decode_text,
    int: _decode_integer,
    float: _decode_number,
    bool: _decode_boolean,
    Any: lambda value: value,
}


@functools.cache
def _make_decoder(kind: Any) -> Callable[[Any], Any]:
    if kind in _SCALARS:
        return _SCALARS[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        return _make_sequence(_make_decoder(arguments[0]))
    if origin in (Union, types.UnionType):
        assert len(arguments) == 2, kind
        other = _make_decoder(next(choice for choice in arguments if choice is not type(None)))
        return lambda value: None if value is None else other(value)
    if origin is Literal:
        return _make_choice(arguments)
    if origin is not None and issubclass(origin, Mapping):
        return _object
    if isinstance(kind, type) and issubclass(kind, Tagged):
        return _tagged(kind)
    assert dataclasses.is_dataclass(kind), kind
    return _record(cast(Any, kind))


def _make_choice(choices: tuple[Any, ...]) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        if type(value) is not str or value not in choices:
            raise SchemaError(f"expected one of {', '.join(choices)}, {_describe_found(value)}")
        return value

    return decode


def _make_sequence(item: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def decode(value: Any) -> tuple[Any, ...]:
        if type(value) is not list:
            raise SchemaError(f"expected a list, {_describe_found(value)}")
        position = -1
        out = []
        try:
            for entry in value:
                position += 1
                out.append(item(entry))
        except SchemaError as error:
            raise error.inside(f"[{position}]") from None
        return tuple(out)

    return decode


def _tagged(kind: type[Tagged]) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        fields = dict(_object(value))
        if "name" not in fields:
            raise SchemaError("missing field", "name")
        try:
            name = _make_choice(tuple(kind.kinds))(fields.pop("name"))
        except SchemaError as error:
            raise error.inside("name") from None
        return _record(kind.kinds[name])(fields)

    return decode


@functools.cache
def _record(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)
    decoders = {field.name: _make_decoder(hints[field.name]) for field in fields}
    absent = {field.name: field.metadata[ABSENT] for field in fields if ABSENT in field.metadata}
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }

    def decode(value: Any) -> Any:
        if type(value) is not dict:
            raise SchemaError(f"expected an object, {_describe_found(value)}")
        step = ""
        decoded = dict(absent)
        try:
            for step, entry in value.items():
                if (decoder := decoders.get(step)) is None:
                    raise SchemaError("unknown field")
                decoded[step] = decoder(entry)
        except SchemaError as error:
            raise error.inside(step) from None
        if len(decoded) < len(decoders) and (missing := required - decoded.keys()):
            raise SchemaError("missing field", sorted(missing)[0])
        try:
            return kind(**decoded)
        except SchemaError:
            raise
        except ValueError as error:  # __post_init__ checks
            raise SchemaError(str(error)) from None

    return decode
