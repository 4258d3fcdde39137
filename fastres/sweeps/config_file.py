"""A sweep as a file: what the command line says otherwise, in TOML or JSON.

    seeds = 5
    recipe = "standard"
    fast = true

    [set]
    lr = [0.1, 0.2]
    data_dir = "my-images"

Tables stand for the options that may be repeated: set, space and engine_option.
"""

from collections.abc import Collection, Mapping
from typing import Any

from fastres.errors import UsageError
from fastres.option_files import read_table

__all__ = ["words_of_file"]


def words_of_file(
    path: str, options: Collection[str], given: Mapping[str, Collection[str]]
) -> list[str]:
    """Return the words of a command line that says what the file says.

    Args:
        path: TOML where its name ends so, and else JSON.
        options: names that may be in it, as fields.
        given: {an option that may be repeated: NAME=VALUE words that come behind}; theirs are left
            out, so that the command line has the last word.

    Raises:
        UsageError: for a file that cannot be read, an unknown option, and a table or a list in the
            place of a value or the reverse.
    """
    words = []
    for option, value in read_table(path).items():
        if option not in options:
            known = ", ".join(sorted(options))
            raise UsageError(f"{path}: unknown option {option!r}; there are {known}")
        flag = "--" + option.replace("_", "-")
        if option in given:
            if not isinstance(value, dict):
                raise UsageError(f"{path}: {option} must be a table: [{option}], then NAME = VALUE")
            later = {word.partition("=")[0].strip().replace("-", "_") for word in given[option]}
            for name, entry in value.items():
                if name.replace("-", "_") not in later:
                    values = entry if isinstance(entry, list) else [entry]
                    text = ",".join(_text(item, f"{path}: [{option}] {name}") for item in values)
                    words += [flag, f"{name}={text}"]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, _text(value, f"{path}: {option}")]
    return words


def _text(value: Any, source: str) -> str:
    """Return a value as it is written on a command line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, int | float | str):
        raise UsageError(f"{source} must be one value")
    return str(value)
