"""ResNets on CIFAR, as fast as the machine allows and provably the plain PyTorch network.

`import fastres` is cheap: the public names below load torch only when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["create_model", "explain", "fuse", "load_dataset", "make_loader"]

_HOMES = {
    "create_model": "fastres.model.resnet",
    "explain": "fastres.fusion.explain",
    "fuse": "fastres.fusion.fuse",
    "load_dataset": "fastres.data.source",
    "make_loader": "fastres.data.loaders",
}

if TYPE_CHECKING:
    from fastres.data.loaders import make_loader
    from fastres.data.source import load_dataset
    from fastres.fusion.explain import explain
    from fastres.fusion.fuse import fuse
    from fastres.model.resnet import create_model


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastres' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
