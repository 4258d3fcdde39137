"""`fuse`: any ResNet with its convolutions, batch norms, ReLUs and additions in fused ops.

A fused module is a subclass of the original that overrides `forward`, see fused_modules.py, so
fusing a copy is changing classes: no parameter moves, no key changes. Recognised are the nets and
blocks of fastres and of torchvision, by exact type, and conv, bn (, relu) in a row in any
nn.Sequential. A module with a hook on it is never absorbed.
"""

import copy
import functools
import importlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastres.model.conv_bn import (
    ConvBNModules,
    conv_bn,
    is_unmodified_relu,
    why_not_fused,
)
from fastres.model.fused_modules import (
    FusedBasicBlock,
    FusedBlock,
    FusedBottleneck,
    FusedModule,
    FusedResNet,
    FusedResNet9,
    FusedSequential,
    pool_classify,
)
from fastres.model.interception import is_overridden, replaced_functions
from fastres.model.resnet import BasicBlock, Bottleneck, ResNet, ResNet9

__all__ = ["fuse"]

_TORCHVISION = "torchvision.models.resnet"


class TorchvisionStem(FusedModule):
    """The fused stem and head of torchvision's ResNet; mixed in before the class of the net."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        net = cast(Any, self)
        if self.must_call_modules(x):
            return cast(Any, super())._forward_impl(x)
        has_relu = is_unmodified_relu(net.relu)
        x = conv_bn(x, ConvBNModules(net.conv1, net.bn1), relu=has_relu)
        x = net.maxpool(x if has_relu else net.relu(x))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        if _is_global_mean(net.avgpool):
            return pool_classify(x, net.fc)
        return net.fc(torch.flatten(net.avgpool(x), 1))


def fuse(model: nn.Module, *, verbose: bool = True) -> nn.Module:
    """A copy of `model` in which all that is recognised runs fused; the original is unchanged.

    Parameters, buffers and state_dict keys are the model's; nothing is shared with it, so an
    optimizer must be made for the copy. Training, evaluation, autocast, torch.compile and higher
    derivatives work as before. Left as they are: grouped, dilated and biased convolutions, other
    norms and activations, modules with hooks, batch norms without parameters or running statistics.
    Under transforms of torch.func, forward-mode differentiation, tracers, exporters, global hooks
    and tensor subclasses the plain modules run, see interception.py.

    Args:
        model: any module; the ResNets of fastres and torchvision and nn.Sequentials are recognised.
        verbose: print what was fused, and what was not and why.

    Returns: the fused copy, each recognised module of a subclass of its type.
    """
    fused = copy.deepcopy(model)
    absorbed: dict[str, str] = {}
    reasons: dict[str, str] = {}
    _visit(fused, "", absorbed, reasons)
    if verbose:
        print("\n".join(_report(fused, absorbed, reasons)))
    return fused


def _report(model: nn.Module, absorbed: dict[str, str], reasons: dict[str, str]) -> Iterator[str]:
    """Yield the lines of the report: every convolution, and where it runs or why it stays."""
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    # A projection is absorbed under the name of its Sequential, `downsample`.
    fused_in = {name: absorbed.get(name) or absorbed.get(name.rpartition(".")[0]) for name in convs}
    yield f"fuse: {sum(map(bool, fused_in.values()))} of {len(convs)} convolutions run fused"
    if replaced_functions():
        yield f"  none of them while {', '.join(replaced_functions())} is not torch's own"
    for name, owner in fused_in.items():
        reason = reasons.get(name, "batch norm does not follow it in a pattern known here")
        yield f"  {'fused     ' if owner else 'left alone'}  {name}: {owner or reason}"


def _visit(module: nn.Module, name: str, absorbed: dict[str, str], reasons: dict[str, str]) -> None:
    """Fuse what `module` is or holds, from the outside in.

    absorbed: {name: by what} of parts that no longer run by themselves. reasons: {name: why it
    stays} of convolutions. Both are added to.
    """
    kind: Any = type(module)
    fused_class: Any = _fused_class(kind)
    is_known = fused_class is not None and fused_class.is_plain_as_defined()
    if is_known and "forward" not in vars(module):
        against = _reasons_against(module)
        reasons.update({_join(name, part): reason for part, reason in against.items()})
        if isinstance(module, nn.Sequential):
            runs = _runs(module)
            if runs:
                module.__class__ = fused_class
                cast(FusedSequential, module).fused_runs = runs
        elif not against:
            module.__class__ = fused_class
            if isinstance(module, FusedBlock):
                module.fused_downsample = _is_projection(module.downsample)
    for part in _absorbed_parts(module):
        absorbed[_join(name, part)] = f"in {type(module).__name__} {name}".rstrip()
    for child_name, child in module.named_children():
        if _join(name, child_name) not in absorbed:
            _visit(child, _join(name, child_name), absorbed, reasons)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


@functools.cache
def _fused_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The fused subclass of a recognised type, or None."""
    known: dict[type[nn.Module], type[nn.Module]] = {
        nn.Sequential: FusedSequential,
        BasicBlock: FusedBasicBlock,
        Bottleneck: FusedBottleneck,
        ResNet: FusedResNet,
        ResNet9: FusedResNet9,
    }
    if kind in known:
        return known[kind]
    # Told by name, so that torchvision is imported by those alone who use it.
    return _torchvision_classes().get(kind) if kind.__module__ == _TORCHVISION else None


@functools.cache
def _torchvision_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """The fused subclass of every recognised class of torchvision; imports it."""
    originals = importlib.import_module(_TORCHVISION)
    mixins: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
        "BasicBlock": (FusedBlock, {"depth": 2}),
        "Bottleneck": (FusedBlock, {"depth": 3}),
        "ResNet": (TorchvisionStem, {}),
    }
    classes = {}
    for name, (mixin, attributes) in mixins.items():
        kind = getattr(originals, name)
        members = {**attributes, "__module__": __name__}
        classes[kind] = type(f"FusedTorchvision{name}", (mixin, kind), members)
    return classes


def __getattr__(name: str) -> Any:
    """Find the fused classes of torchvision by name, as unpickling a fused net does."""
    if name.startswith("FusedTorchvision"):
        for fused_class in _torchvision_classes().values():
            if fused_class.__name__ == name:
                return fused_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _absorbed_parts(module: nn.Module) -> list[str]:
    """Names of the children whose work a fused module does itself."""
    if isinstance(module, FusedSequential):
        return [str(i + k) for i, length in module.fused_runs.items() for k in range(length)]
    if isinstance(module, FusedBlock):
        parts = [part for layer in _layer_names(module) for part in layer]
        is_projected = module.fused_downsample and isinstance(module.downsample, nn.Sequential)
        return [*parts, "downsample"] if is_projected else parts
    if isinstance(module, FusedResNet | FusedResNet9 | TorchvisionStem):
        return ["conv1", "bn1"]
    return []


def _layer_names(module: nn.Module) -> list[tuple[str, str]]:
    """Names of convolution and batch norm, of a net's stem or a block's main path."""
    depth = sum(name.startswith("conv") for name, _ in module.named_children())
    return [(f"conv{i}", f"bn{i}") for i in range(1, depth + 1)]


def _reasons_against(module: nn.Module) -> dict[str, str]:
    """Why a recognised module cannot be fused: {name of a convolution: reason}."""
    if isinstance(module, nn.Sequential):
        parts = list(module)
        checks = {str(i): why_not_fused(*parts[i : i + 2]) for i in range(len(parts) - 1)}
        return {
            name: reason
            for name, reason in checks.items()
            if reason is not None and isinstance(parts[int(name)], nn.Conv2d)
        }
    layers = _layer_names(module)
    if hasattr(module, "relu") and not is_unmodified_relu(module.relu):
        return dict.fromkeys((conv for conv, _ in layers), "its activation is no plain ReLU")
    checks = {
        conv: why_not_fused(getattr(module, conv), getattr(module, bn)) for conv, bn in layers
    }
    first = next((f"{reason} in {conv}" for conv, reason in checks.items() if reason), None)
    return {} if first is None else {conv: checks[conv] or first for conv in checks}


def _is_global_mean(pool: nn.Module) -> bool:
    """Whether a pool is an AdaptiveAvgPool2d(1) without hooks."""
    is_plain = type(pool) is nn.AdaptiveAvgPool2d and not is_overridden(pool)
    return is_plain and pool.output_size in (1, (1, 1))


def _is_projection(downsample: Any) -> bool:
    """Whether a shortcut is a convolution and a batch norm that the block can absorb."""
    if type(downsample) is not nn.Sequential or len(downsample) != 2 or is_overridden(downsample):
        return False
    return why_not_fused(downsample[0], downsample[1]) is None


def _runs(modules: nn.Sequential) -> dict[int, int]:
    """Where conv, bn (, relu) stand in a row: {index of the convolution: length}."""
    parts = list(modules)
    runs = {}
    for i in range(len(parts) - 1):
        if why_not_fused(parts[i], parts[i + 1]) is None:
            last = parts[i + 2] if i + 2 < len(parts) else None
            runs[i] = 3 if is_unmodified_relu(last) else 2
    return runs
