"""ResNets on CIFAR, as fast as the machine allows and provably the plain PyTorch network.

`import fastres` is cheap: the public names below load torch only when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "create_model",
    "evaluate",
    "explain",
    "fuse",
    "load",
    "load_dataset",
    "make_loader",
    "predict",
    "train",
]

_HOMES = {
    "create_model": "fastres.model.resnet",
    "explain": "fastres.fusion.explain",
    "fuse": "fastres.fusion.fuse",
    "load": "fastres.inference.trained",
    "load_dataset": "fastres.data.source",
    "make_loader": "fastres.data.loaders",
}
# Commands whose modules can be called: see callable_module.py.
_CALLABLE = ("evaluate", "predict", "train")

if TYPE_CHECKING:
    from fastres.api import evaluate, predict, train
    from fastres.data.loaders import make_loader
    from fastres.data.source import load_dataset
    from fastres.fusion.explain import explain
    from fastres.fusion.fuse import fuse
    from fastres.inference.trained import load
    from fastres.model.resnet import create_model


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return import_module(f"fastres.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastres' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
