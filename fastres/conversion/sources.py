"""The projects whose weights can be converted: names of parameters, normalisation, graph.

A state_dict tells shapes, not the graph: a max pool behind the stem, a shortcut that pads with
zeros and one that there is not leave no trace in it, nor does the blur of timm's resnetblur50. So
the project is named by the user, and everything that its files do not say stands here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from fastres.config import StemName

__all__ = ["SOURCES", "Normalisation", "Source", "SourceName"]

SourceName = Literal[
    "kuangliu", "akamaster", "chenyaofo", "huyvnphan", "weiaicunzai", "torchvision", "timm"
]


@dataclass(frozen=True)
class Normalisation:
    """An image x in 0..1 is served as (x - mean) / std, by channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Of the per-image standard deviations, not of the pixels: a mistake that has become a custom.
_OLD_CIFAR10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True)
class Source:
    """One project.

    Attributes:
        url: where it is.
        name_of: from a key of fastres, which has torchvision's names, to one of theirs.
        normalisation: by number of classes; `otherwise` for all other numbers.
        otherwise: see there.
        stem: what stands in front of the blocks.
        models: that its scripts can build, by the names of fastres.
        stages: groups of blocks, each but the first halving the map: three in the CIFAR nets of He
            et al. 2015, four in their ImageNet nets.
        pads: whether a shortcut without parameters pads with zeros where the shape changes
            (option A); elsewhere it projects.
        prefix: of the keys in the project's own files.
        wrapped_as: the entry of the saved dict that holds the state_dict; None where the file is
            one.
        extras: what else is in that dict.
        has_counters: whether `num_batches_tracked` is there; older torch had none.
    """

    url: str
    name_of: Callable[[str], str] = lambda key: key
    normalisation: dict[int, Normalisation] = field(default_factory=dict)
    otherwise: Normalisation = _IMAGENET
    models: tuple[str, ...] = ("resnet18", "resnet34", "resnet50")
    stem: StemName = "cifar"
    stages: int = 4
    pads: bool = False
    prefix: str = ""
    wrapped_as: str | None = None
    extras: dict[str, float] = field(default_factory=dict)
    has_counters: bool = True


def _linear_and_shortcut(key: str) -> str:
    return key.replace("downsample.", "shortcut.").replace("fc.", "linear.", 1)


def _weiaicunzai(key: str) -> str:
    """Stages count from conv2_x, and a block's layers by their place in a Sequential with ReLUs."""
    stem = {"conv1": "conv1.0", "bn1": "conv1.1"}
    owner, _, leaf = key.rpartition(".")
    if owner in stem:
        return f"{stem[owner]}.{leaf}"
    found = re.fullmatch(r"layer(\d)\.(\d+)\.(\w+?)(?:(\d)|\.(\d))", owner)
    if found is None:
        return key
    stage, block, kind, number, place = found.groups()
    if kind == "downsample":
        inside = f"shortcut.{place}"
    else:
        inside = f"residual_function.{3 * (int(number) - 1) + (kind == 'bn')}"
    return f"conv{int(stage) + 1}_x.{block}.{inside}.{leaf}"


SOURCES: dict[SourceName, Source] = {
    "kuangliu": Source(
        "https://github.com/kuangliu/pytorch-cifar",
        _linear_and_shortcut,
        otherwise=_OLD_CIFAR10,
        # Trained on a GPU it is wrapped in DataParallel.
        prefix="module.",
        wrapped_as="net",
        extras={"acc": 0.0, "epoch": 0},
    ),
    "akamaster": Source(
        "https://github.com/akamaster/pytorch_resnet_cifar10",
        _linear_and_shortcut,
        models=("resnet20", "resnet32", "resnet44", "resnet56", "resnet110"),
        stages=3,
        pads=True,
        prefix="module.",
        wrapped_as="state_dict",
        # trainer.py --resume reads both.
        extras={"best_prec1": 0.0, "epoch": 0},
        has_counters=False,
    ),
    "chenyaofo": Source(
        "https://github.com/chenyaofo/pytorch-cifar-models",
        # https://github.com/chenyaofo/image-classification-codebase, conf/
        normalisation={100: Normalisation((0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761))},
        otherwise=_OLD_CIFAR10,
        models=("resnet20", "resnet32", "resnet44", "resnet56"),
        stages=3,
    ),
    "huyvnphan": Source(
        "https://github.com/huyvnphan/PyTorch_CIFAR10",
        otherwise=Normalisation((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
        stem="pool",
    ),
    "weiaicunzai": Source(
        "https://github.com/weiaicunzai/pytorch-cifar100",
        _weiaicunzai,
        otherwise=Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ),
    "torchvision": Source("https://github.com/pytorch/vision", stem="imagenet"),
    "timm": Source("https://github.com/huggingface/pytorch-image-models", stem="imagenet"),
}
assert set(SOURCES) == set(get_args(SourceName))
