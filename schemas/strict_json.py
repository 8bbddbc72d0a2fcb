"""JSON as the contract means it: what `json` and pydantic let pass in silence is refused here.

Duplicate keys (pydantic keeps the last), NaN, Infinity and numbers that overflow to it, lone surrogates (not encodable
as UTF-8), deep nesting.
"""

import json
import math
from typing import Any

MAX_DEPTH = 64


class StrictJsonError(ValueError):
    """The bytes are not JSON, or JSON of a kind that is refused. Its text never repeats the input."""


def loads(raw: bytes) -> Any:
    """Parses UTF-8 JSON.

    Raises StrictJsonError for anything that is not exactly one well-formed JSON value within `MAX_DEPTH` levels.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object_of_distinct_keys, parse_constant=_refuse_constant
        )
    except StrictJsonError:
        raise
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise StrictJsonError(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise StrictJsonError("a number has too many digits") from None
    check(value)
    return value


def salvage_string(raw: bytes, key: str) -> str | None:
    """The string under a top-level `key` of JSON that `loads` may refuse; None where there is no single one."""
    found: list[Any] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found[:] = [item for name, item in pairs if name == key]  # the outermost object is built last
        return dict(pairs)

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=collect, parse_int=lambda _: 0)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and len(found) == 1 and isinstance(found[0], str):
        return found[0]
    return None


def _object_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise StrictJsonError("an object has the same key twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise StrictJsonError(f"{name} is not JSON")


def check(value: Any, depth_left: int = MAX_DEPTH) -> None:
    """Refuses what cannot travel in a JSON value: it holds at most `depth_left` levels of objects and arrays.

    Raises StrictJsonError.
    """
    match value:
        case str():
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                raise StrictJsonError("a string has a lone surrogate")
        case float():
            if not math.isfinite(value):
                raise StrictJsonError("a number is out of range")
        case dict() | list() if depth_left == 0:
            raise StrictJsonError(f"nested deeper than {MAX_DEPTH} levels")
        case dict():
            for key, item in value.items():
                check(key, depth_left)
                check(item, depth_left - 1)
        case list():
            for item in value:
                check(item, depth_left - 1)
