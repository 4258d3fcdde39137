"""The one writer of JSON, and its reader: every number is finite, so that every parser takes it.

Python's json module writes NaN and Infinity, which are no JSON, and reads them and 1e400 back.
"""

import json
import math
from typing import Any, NoReturn

from fastres.errors import FailureError

__all__ = ["dumps", "loads"]


def dumps(value: object, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return `value` as JSON text.

    Raises:
        FailureError: when a number in it is NaN or infinite.
    """
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError as error:
        raise FailureError(f"a record is not written: {error}") from None


def loads(text: str | bytes) -> Any:
    """Read JSON text.

    Raises:
        ValueError: for what is no JSON, nested too deep, or holds a number that no float can hold.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")
