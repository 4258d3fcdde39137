"""Files of options: a table of names and values, as JSON or as TOML, the latter also written."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastres.data.files import read_bytes
from fastres.errors import UsageError

__all__ = ["SUFFIXES", "parse_table", "read_table", "to_toml"]

Form = Literal["JSON", "TOML"]
SUFFIXES: dict[str, Form] = {".json": "JSON", ".toml": "TOML"}


def parse_table(text: bytes, source: str | Path, form: Form = "JSON") -> dict[str, Any]:
    """Return the values of a JSON object or of a TOML file, whatever they are.

    Raises:
        UsageError: naming `source`, for text that is neither.
    """
    try:
        if form == "JSON":
            # With numbers beyond floats, so that a reader of the values names their option.
            values = json.loads(text, object_pairs_hook=_unique)
        else:
            # Editors on Windows put a mark before UTF-8.
            values = tomllib.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source} is not a {form} file: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{source} must hold a JSON object of options")
    return values


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; TOML refuses names that come twice anyway."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return values


def read_table(path: str) -> dict[str, Any]:
    """Return the values of a file, TOML where its name ends so and else JSON.

    Raises:
        UsageError: when it cannot be read, or is not what its name says.
        FailureError: when it is a FIFO, a socket or a device.
    """
    try:
        text = read_bytes(path)
    except OSError as error:
        raise UsageError(f"cannot read the options in {path}: {error.strerror}") from None
    return parse_table(text, path, SUFFIXES.get(Path(path).suffix, "JSON"))


def to_toml(values: Mapping[str, Any]) -> str:
    """Return numbers, texts and flags as TOML, one a line, and the tables among them behind."""
    lines = [f"{k} = {_scalar(v)}" for k, v in values.items() if not isinstance(v, Mapping)]
    tables = [
        f"\n[{name}]\n{to_toml(table)}"
        for name, table in values.items()
        if isinstance(table, Mapping)
    ]
    return "".join([f"{line}\n" for line in lines] + tables)


def _scalar(value: bool | float | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        characters = (
            c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value
        )
        return f'"{"".join(characters)}"'
    return repr(value)
