"""From a project's state_dict to a network of fastres and back; whatever does not fit is named."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from fastres.config import Config
from fastres.conversion.sources import SOURCES, Normalisation, Source, SourceName
from fastres.data.dataset import CIFAR10_CLASSES
from fastres.data.readers.cifar import CIFAR100_CLASSES
from fastres.engine.checkpoint_schema import check_values
from fastres.errors import FailureError, UsageError
from fastres.inference.trained import TrainedNetwork
from fastres.model.resnet import MODELS, BasicBlock, Bottleneck, ResNet, create_model, network_of

__all__ = ["from_state_dict", "to_state_dict"]

_COUNTER = "num_batches_tracked"
_SHOWN = 3
# What 10 and 100 outputs are taken to mean where nobody says it.
_DATASETS = {CIFAR10_CLASSES: "cifar10", CIFAR100_CLASSES: "cifar100"}
_IMAGENET_CLASSES = 1000


def from_state_dict(
    state: Mapping[str, Tensor],
    source_name: SourceName,
    path: Path,
    *,
    classes: Sequence[str] | None = None,
    normalisation: Normalisation | None = None,
) -> TrainedNetwork:
    """Return the network of fastres that computes what the project's does with these weights.

    Args:
        state: their state_dict, wrappers and prefixes off, float32.
        source_name: the project.
        path: the file, for errors and records.
        classes: names of the outputs; None takes CIFAR's for 10 and 100 of them and, where
            torchvision is there to ask, ImageNet's for 1000.
        normalisation: of the images; None takes the project's own.

    Raises:
        FailureError: naming parameters that are missing, left over or of another shape.
        UsageError: for another number of classes than there are outputs.
    """
    source = SOURCES[source_name]
    config = _network_options(state, source_name, path)
    head = state.get(source.name_of("fc.weight"))
    if head is None or head.ndim != 2:
        raise FailureError(f"{path} lacks the classifier, {source.name_of('fc.weight')}")
    count = len(head)
    names = tuple(classes) if classes is not None else _class_names(count)
    if len(names) != count:
        raise UsageError(f"{path} has {count:,} classes, and {len(names):,} names were given")
    # Before a network is allocated that is as large as the file says.
    with torch.device("meta"):
        wanted = {source.name_of(k): v for k, v in network_of(config, count).state_dict().items()}
    _check(state, wanted, source, path)
    check_values(state, path)
    model = network_of(config, count)
    for key, target in model.state_dict().items():
        if (found := state.get(source.name_of(key))) is not None:
            target.copy_(found)
    normalisation = normalisation or source.normalisation.get(count, source.otherwise)
    return TrainedNetwork(
        model.eval(),
        config,
        names,
        normalisation.mean,
        normalisation.std,
        dataset=_DATASETS.get(names, "folder"),
        dataset_fingerprint="",
        source=path,
    )


def to_state_dict(network: TrainedNetwork, source_name: SourceName) -> dict[str, Tensor]:
    """Return the weights under the names of a project whose network computes the same.

    Raises:
        UsageError: when the project has no such network.
    """
    source, config, model = SOURCES[source_name], network.config, network.model
    if config.model not in source.models:
        raise UsageError(f"{source_name} has no {config.model}, only {', '.join(source.models)}")
    if config.stem != source.stem:
        raise UsageError(
            f"the networks of {source_name} start with the stem {source.stem}, and this one with "
            f"{config.stem}"
        )
    state = model.state_dict()
    if not source.pads and not any("downsample" in key for key in state):
        raise UsageError(f"{source_name} has no network whose shortcuts pad with zeros")
    return {
        source.name_of(key): tensor
        for key, tensor in state.items()
        if source.has_counters or not key.endswith(_COUNTER)
    }


def _has_residuals(model: nn.Module) -> bool:
    blocks = (m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck))
    return all(block.residual for block in blocks)


def _network_options(state: Mapping[str, Tensor], source_name: SourceName, path: Path) -> Config:
    """Read depth, width and shortcuts off the names and shapes."""
    source = SOURCES[source_name]

    def has(key: str) -> bool:
        return source.name_of(key) in state

    stem = state.get(source.name_of("conv1.weight"))
    if stem is None or stem.ndim != 4:
        raise FailureError(
            f"{path} lacks the first convolution of {source_name}'s ResNets, "
            f"{source.name_of('conv1.weight')}"
        )
    depths: list[int] = []
    while has(f"layer{len(depths) + 1}.0.conv1.weight"):
        stage = f"layer{len(depths) + 1}"
        depths.append(next(n for n in itertools.count(1) if not has(f"{stage}.{n}.conv1.weight")))
    block = Bottleneck if has("layer1.0.conv3.weight") else BasicBlock
    model = _model_of(block, tuple(depths)) if len(depths) == source.stages else None
    if model is None:
        raise FailureError(
            f"{path} has stages of {', '.join(map(str, depths)) or 'no'} blocks "
            f"({block.__name__}), and no ResNet of {source_name} that fastres knows has"
        )
    projects = has("layer2.0.downsample.0.weight")
    return Config(
        model=model,
        width=stem.shape[0] / MODELS[model].channels,
        shortcut="A" if source.pads and not projects else "B",
        stem=source.stem,
        recipe=f"converted-{source_name}",
    )


def _model_of(block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...]) -> str | None:
    for name in MODELS:
        with torch.device("meta"):
            model = create_model(name)
        if not isinstance(model, ResNet) or not _has_residuals(model):
            continue
        stages = [getattr(model, stage) for stage in model.stages]
        if tuple(map(len, stages)) == depths and isinstance(stages[0][0], block):
            return name
    return None


def _check(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Source, path: Path
) -> None:
    missing = [k for k in wanted if k not in state and not k.endswith(_COUNTER)]
    left_over = [k for k in state if k not in wanted]
    reshaped = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    parts = [
        f"{what} {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
        for what, names in (
            ("lacks", missing),
            ("has besides", left_over),
            ("has in another shape", reshaped),
        )
        if names
    ]
    if parts:
        raise FailureError(
            f"{path} is no ResNet as in {source.url}: it {'; it '.join(parts)}"
            + ("; pre-activation networks are not read" if _is_preact(missing, source) else "")
        )


def _is_preact(missing: Sequence[str], source: Source) -> bool:
    return {source.name_of(f"bn1.{leaf}") for leaf in ("weight", "running_mean")} <= set(missing)


def _class_names(count: int) -> tuple[str, ...]:
    known = {len(names): names for names in _DATASETS}
    if count == _IMAGENET_CLASSES:
        # torchvision does not fit every build of torch.
        with suppress(ImportError, RuntimeError, OSError):
            from torchvision.models import ResNet18_Weights

            known[count] = tuple(ResNet18_Weights.DEFAULT.meta["categories"])
    return known.get(count) or tuple(f"class {number}" for number in range(count))
