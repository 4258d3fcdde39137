"""Recipes as files of a user, and how to start one: `fastres recipe NAME > my.toml`.

A file holds options for every network, and a table of further ones for each family of networks that
wants some; JSON is the same with objects for tables:

    base = "standard"     # start from this one; without it, from the plain defaults
    weight_decay = 1e-3

    [wide]
    epochs = 60

It says how a network is trained. Where, on what and from which seed is for the command line.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastres.cli import guarded
from fastres.config import NOT_OF_A_RECIPE, RECIPE_NAME, checked_options
from fastres.errors import UsageError
from fastres.option_files import SUFFIXES, read_table, to_toml
from fastres.recipes import FAMILIES, RECIPES, Recipe, built_in

__all__ = ["as_toml", "find_recipe", "main"]


def find_recipe(name: str) -> tuple[str, Recipe]:
    """Return the recipe that `--recipe` names, and what a run calls it: a file by its last name.

    Args:
        name: of a recipe of fastres, or the path of a file: it has a folder, .toml or .json in it.

    Raises:
        UsageError: for an unknown name, or a file that cannot be read or is no recipe.
        FailureError: when the file is a FIFO, a socket or a device.
    """
    path = Path(name)
    if path.suffix not in SUFFIXES and "/" not in name:
        return name, built_in(name)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"the name of the recipe {name} must end in {' or '.join(SUFFIXES)}")
    if not RECIPE_NAME.fullmatch(path.name):
        raise UsageError(
            f"runs are named after their recipe, so the name of {name} must be 1 to 64 letters, "
            "digits, '.', '_', '+' or '-'"
        )
    return path.name, _recipe(read_table(name), name)


def _recipe(values: dict[str, Any], path: str) -> Recipe:
    """Return what the content of a file says.

    Raises: UsageError: as `find_recipe`.
    """
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in RECIPES):
        raise UsageError(f"{path}: base must be one of {', '.join(RECIPES)}, got {base!r:.60}")
    tables = {name: table for name, table in values.items() if isinstance(table, dict)}
    for name in tables:
        if name not in FAMILIES:
            raise UsageError(
                f"{path}: {name!r} is no family of networks; those are {', '.join(FAMILIES)}"
            )
    plain = {name: value for name, value in values.items() if name not in tables}
    for name in FAMILIES:
        if name in plain:
            raise UsageError(f"{path}: {name!r} must be a table of options")
    common = _part(plain, path)
    by_family = {f: _part(tables[f], f"{path}: [{f}]") for f in FAMILIES if f in tables}
    for family, options in by_family.items():
        if "model" in options:
            raise UsageError(f"{path}: [{family}] must not name a model, which decides the family")
    return Recipe(common, by_family, base)


def _part(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the options of one table of a recipe, checked."""
    for name, value in values.items():
        if value is None:
            raise UsageError(f"{source}: option {name!r} has no value; leave it out")
        if name in NOT_OF_A_RECIPE:
            raise UsageError(
                f"{source}: option {name!r} is not of a recipe, which says how a network is "
                "trained; give it on the command line or in a --config file"
            )
    if "epochs" in values and "steps" in values:
        raise UsageError(f"{source}: give epochs or steps, not both")
    return checked_options(values, source)


def as_toml(recipe: Recipe) -> str:
    """Return the text of a file that reads back as `recipe`."""
    base = {} if recipe.base is None else {"base": recipe.base}
    return to_toml(base | recipe.common | recipe.by_family)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a recipe and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="fastres recipe",
        description="Print a recipe as TOML, to start one of your own: python -m fastres recipe "
        "quick > my.toml, then python -m fastres.train --recipe my.toml.",
    )
    parser.add_argument("name", nargs="?", default="quick", help=f"{', '.join(RECIPES)}, or a file")
    name = parser.parse_args(argv).name
    return guarded(lambda: _print(name), debug=False)


def _print(name: str) -> int:
    print(as_toml(find_recipe(name)[1]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
