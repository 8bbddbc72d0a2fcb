"""Reads JSON objects strictly: what is not known by its name and value is refused."""

from collections.abc import Mapping
from typing import Any


class UnknownModel(Exception):
    """The fast engine cannot draw this model as the stock pipeline does. The text says what it does not know."""


class Fields:
    """One JSON object, of which every key has to be asked for. `part`: whose it is, for the messages."""

    def __init__(self, part: str, values: Mapping[str, Any]) -> None:
        self._part = part
        self._left = dict(values)

    def unknown(self, key: str, value: object) -> UnknownModel:
        return UnknownModel(f"{self._part}: {key} is {value!r}"[:200])

    def take(self, key: str, *allowed: Any) -> Any:
        """The value, which must be one of `allowed`; where there is none, the first of them."""
        value = self._left.pop(key, allowed[0])
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in allowed):
            raise self.unknown(key, value)
        return value

    def require(self, key: str, *allowed: Any) -> Any:
        """As `take`, where there must be a value."""
        self._left.setdefault(key, None)
        return self.take(key, *allowed)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._left.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.unknown(key, value)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._left.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.unknown(key, value)
        return value

    def integers(self, key: str, count: int | None = None, default: int | None = None) -> tuple[int, ...]:
        """A list of integers; one integer stands for `count` of them."""
        value = self._left.pop(key, default)
        values = [value] * count if isinstance(value, int) and count is not None else value
        if not isinstance(values, list) or not values or not all(type(number) is int for number in values):
            raise self.unknown(key, value)
        if count is not None and len(values) != count:
            raise self.unknown(key, value)
        return tuple(values)

    def ignore(self, *keys: str) -> None:
        for key in keys:
            self._left.pop(key, None)

    def end(self) -> None:
        """Raises UnknownModel for a key that nobody asked for; those with a leading underscore are notes."""
        for key, value in self._left.items():
            if not key.startswith("_"):
                raise self.unknown(key, value)
