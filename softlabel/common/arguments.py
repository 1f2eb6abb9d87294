"""Type checks of arguments, before they are used: Python treats the string "false" as true."""

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from softlabel.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "nothing"}

_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def check_arguments(function: F) -> F:
    """Make a function raise UsageError for an argument whose type differs from its annotation.

    Only annotations that `is_plain` accepts are checked; the function checks the others.
    """
    signature = inspect.signature(function)
    plain = {name: one.annotation for name, one in signature.parameters.items() if is_plain(one.annotation)}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        check_values({name: value for name, value in given.items() if name in plain}, plain)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def check_values(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Check values against type hints.

    Args:
        values: argument name -> value.
        hints: argument name -> a type that `is_plain` accepts.

    Raises:
        UsageError: a value is not of its hint's type.
    """
    for name, value in values.items():
        if not _has_type(value, hints[name]):
            found = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
            raise UsageError(f"{name}: expected {describe(hints[name])}, found {found}")


def is_plain(hint: Any) -> bool:
    """Whether `check_values` can check a type: bool, int, float, str, None, Literal, list, Sequence or their unions."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return all(map(is_plain, parts))
    if origin in (list, Sequence):
        return is_plain(parts[0])
    return origin is Literal or hint in _TYPE_NAMES


def describe(hint: Any) -> str:
    """Return a type hint in words, for an error message."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _join_words([str(part) for part in parts])
    if origin in (Union, types.UnionType):
        return _join_words([describe(part) for part in parts if part is not type(None)])
    if origin in (list, Sequence):
        return f"a list of {_PLURALS.get(parts[0]) or describe(parts[0])}"
    return _TYPE_NAMES[hint]


def _has_type(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (Union, types.UnionType):
        return any(_has_type(value, part) for part in parts)
    if origin in (list, Sequence):
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return listed and all(_has_type(one, parts[0]) for one in value)
    if hint in (int, float):  # includes numpy scalars
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, hint)


def _join_words(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
