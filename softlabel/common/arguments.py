"""The types of arguments, checked before anything is done with them: Python takes a word such as "false" for true."""

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from softlabel.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "nothing"}

_SEVERAL = {int: "whole numbers", float: "numbers", str: "texts"}


def check_arguments(function: F) -> F:
    """Decorate a function so that it raises UsageError for an argument of another type than its annotation.

    Annotations that are more than flags, numbers, texts, choices and lists of these are left to the function.
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
    """Raises UsageError for the first value that is not of its hint's type.

    Args:
        values: by the names of the arguments.
        hints: a type for each of them: bool, int, float, str, None, Literal, list, Sequence, tuple or a union.
    """
    for name, value in values.items():
        if not _is_a(value, hints[name]):
            found = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
            raise UsageError(f"{name}: expected {describe(hints[name])}, found {found}")


def is_plain(hint: Any) -> bool:
    """Whether `check_values` knows the type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return all(map(is_plain, parts))
    if origin in (list, Sequence):
        return is_plain(parts[0])
    return origin is Literal or hint in _WORDS


def describe(hint: Any) -> str:
    """What an argument may be, in words."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _join([str(part) for part in parts])
    if origin in (Union, types.UnionType):
        return _join([describe(part) for part in parts if part is not type(None)])
    if origin in (list, Sequence):
        return f"a list of {_SEVERAL.get(parts[0]) or describe(parts[0])}"
    return _WORDS[hint]


def _is_a(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin in (list, Sequence):
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return listed and all(_is_a(one, parts[0]) for one in value)
    if hint in (int, float):  # NumPy's numbers too
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    return isinstance(value, hint)


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
