"""What follows from the fields of a frozen dataclass and is asked for in every batch."""

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Derived:
    """A slot for it; not a field, so that copies start without it."""

    __slots__ = ("_derived",)
    _derived: dict[Any, Any]

    def _derive(self, what: Any, make: Callable[[], T]) -> T:
        """What `make` gives, made once."""
        try:
            known = self._derived
        except AttributeError:
            known = {}
            object.__setattr__(self, "_derived", known)
        if what not in known:
            known[what] = make()
        found: T = known[what]
        return found
