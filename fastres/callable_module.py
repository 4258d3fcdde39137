"""Modules that are commands and, called, the function of the same name.

`python -m fastres.train` needs a module of that name, and people write `fastres.train(...)`. An
import of the module puts it into the package's namespace, in the place of any function there, so
the module itself can be called (https://docs.python.org/3/reference/datamodel.html, "Customizing
module attribute access").
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = ["CallableModule", "make_callable"]

_HOME = "fastres.api"


class CallableModule(ModuleType):
    """A module that calls the function of its name in `fastres.api`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function; its documentation is in `fastres.api`."""
        function = getattr(importlib.import_module(_HOME), self.__name__.rpartition(".")[2])
        return function(*arguments, **options)


def make_callable(name: str) -> None:
    """Make the module `name`, which calls this at its import, callable; a script stays one."""
    if name != "__main__":
        sys.modules[name].__class__ = CallableModule
