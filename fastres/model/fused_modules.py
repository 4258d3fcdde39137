"""Fused modules: the reference's modules with another forward pass.

A fused module is a subclass of the module that it speeds up and overrides `forward` alone. It has
the same children, parameters, buffers and state_dict keys, because it inherits them, and where it
cannot fuse it falls back to `super().forward`: the reference itself. So it does wherever something
stands between a module's call and what it computes, see interception.py.

    training     one op a block, statistics of the batch; the running ones are moved here
    evaluation   batch norms folded into their convolutions, where no gradient is wanted
    otherwise    the reference: evaluation with gradients, batch norms frozen one by one, no images
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.kernels import ops
from fastres.kernels.conv_types import stat_dtype
from fastres.kernels.gpu.counters import own_counters
from fastres.kernels.ops_head import is_worth_an_op, pool_linear, smooth_cross_entropy
from fastres.model.conv_bn import (
    ConvBNModules,
    block_folded,
    can_fold,
    can_train,
    cast_dtype,
    conv_bn,
    conv_bn_folded,
    is_unmodified_relu,
    layer_params,
    recomputed_to_here,
    to_compute_dtype,
)
from fastres.model.interception import is_as_defined, is_intercepted, is_overridden
from fastres.model.resnet import BasicBlock, Bottleneck, ResNet, ResNet9
from fastres.model.running_stats import update_running_stats

__all__ = [
    "FusedBasicBlock",
    "FusedBlock",
    "FusedBottleneck",
    "FusedModule",
    "FusedResNet",
    "FusedResNet9",
    "FusedSequential",
    "SmoothCrossEntropy",
    "own_counters",
    "pool_classify",
]


class FusedModule(nn.Module):
    """What all fused modules share; mixed in before the class that is sped up."""

    _plain: ClassVar[type[nn.Module]]
    _plain_functions: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        kinds = cast(tuple[type[nn.Module], ...], cls.__mro__)
        cls._plain = kinds[kinds.index(FusedModule) + 1]
        names = [name for name in ("forward", "_forward_impl") if hasattr(cls._plain, name)]
        cls._plain_functions = {name: getattr(cls._plain, name) for name in names}

    @classmethod
    def is_plain_as_defined(cls) -> bool:
        """Whether nobody has replaced what the plain class computes."""
        return all(is_as_defined(cls._plain, name) for name in cls._plain_functions)

    def must_call_modules(self, x: Any) -> bool:
        """Whether only the plain module, which calls all others, does what is wanted of x."""
        return is_intercepted(x) or any(
            getattr(self._plain, name) is not function
            for name, function in self._plain_functions.items()
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what torch.jit.script compiles in place of this module."""
        return _to_plain(self, {})


def _to_plain(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """The same parameters and buffers in modules of the plain classes; `module` stays as it is.

    done: {id of a module: what became of it}, for those that occur twice.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return module
    if id(module) not in done:
        kind = type(module)
        # A class that somebody derived from ours has a forward of its own.
        if isinstance(module, FusedModule) and kind.__module__.startswith("fastres."):
            kind = module._plain
        plain = done[id(module)] = kind.__new__(kind)
        children = {
            name: child if child is None else _to_plain(child, done)
            for name, child in module._modules.items()
        }
        plain.__dict__ = {**vars(module), "_modules": children}
    return done[id(module)]


class FusedSequential(FusedModule, nn.Sequential):
    """A Sequential in which every run of conv, bn (, relu) of `fused_runs` is one op.

    Attributes:
        fused_runs: {index of a convolution: length of its run, 2 or 3}. A slice has none: it is a
            new Sequential, and its modules run one by one.
    """

    fused_runs: Mapping[int, int] = MappingProxyType({})

    def forward(self, input: Tensor) -> Tensor:
        """Apply the modules in order; the argument is called as in nn.Sequential."""
        if self.must_call_modules(input):
            return super().forward(input)
        x, modules = input, list(self)
        is_nchw = input.is_contiguous() and all(p.is_contiguous() for p in self.parameters())
        i = 0
        while i < len(modules):
            run = modules[i : i + self.fused_runs.get(i, 1)]
            if len(run) == 1:
                x = run[0](x)
            else:
                x = conv_bn(x, ConvBNModules(*cast(Any, run[:2])), relu=is_unmodified_relu(run[-1]))
                if len(run) == 3 and not is_unmodified_relu(run[-1]):
                    x = run[-1](x)
            i += len(run)
        # Ops return channels_last; what follows may ask for a view of the layout that torch gives.
        return x.contiguous() if is_nchw else x


class FusedBlock(FusedModule):
    """The fused forward pass of a residual block; mixed in before the class of the block.

    Attributes:
        depth: convolutions of the main path, named conv1, bn1, conv2, bn2 and so on.
        fused_downsample: whether `downsample` is a convolution and a batch norm to be fused.
    """

    depth: int
    fused_downsample = True

    def _layers(self) -> tuple[list[ConvBNModules], ConvBNModules | None]:
        """The layers of the main path, and that of the projection."""
        layers = [
            ConvBNModules(getattr(self, f"conv{i}"), getattr(self, f"bn{i}"))
            for i in range(1, self.depth + 1)
        ]
        downsample: Any = self.downsample
        # No other class: one derived from it may compute something else.
        is_layer = type(downsample) is nn.Sequential and len(downsample) == 2
        if (
            self.fused_downsample
            and is_layer
            and self._has_shortcut()
            and not is_overridden(downsample)
        ):
            return layers, ConvBNModules(*downsample)
        return layers, None

    def forward(self, x: Tensor) -> Tensor:
        """Map x as the block does."""
        if self.must_call_modules(x):
            return super().forward(x)
        layers, projection = self._layers()
        all_layers = [*layers, projection] if projection is not None else layers
        if hasattr(self, "relu") and not is_unmodified_relu(self.relu):
            return super().forward(x)
        if can_train(x, all_layers):
            return self._train(x, layers, projection)
        if can_fold(x, all_layers):
            return self._evaluate(x, layers, projection)
        return super().forward(x)

    def _given_shortcut(self, x: Tensor, projection: ConvBNModules | None) -> Tensor | None:
        """The output of a downsample that is not fused."""
        if projection is not None or self.downsample is None or not self._has_shortcut():
            return None
        return to_compute_dtype(cast(nn.Module, self.downsample)(x))

    def _has_shortcut(self) -> bool:
        """Whether there is a shortcut: the reference's plain nets have none."""
        return bool(getattr(self, "residual", True))

    def _train(
        self, x: Tensor, layers: list[ConvBNModules], projection: ConvBNModules | None
    ) -> Tensor:
        out, stats = ops.residual_block(
            to_compute_dtype(x),
            [layer_params(layer, x) for layer in layers],
            projection=None if projection is None else layer_params(projection, x),
            residual=self._given_shortcut(x, projection),
            add_input=self._has_shortcut(),
        )
        all_layers = [*layers, projection] if projection else layers
        update_running_stats([layer.bn for layer in all_layers], stats)
        return recomputed_to_here(out)

    def _evaluate(
        self, x: Tensor, layers: list[ConvBNModules], projection: ConvBNModules | None
    ) -> Tensor:
        shortcut = self._given_shortcut(x, projection)
        if shortcut is None:
            has_shortcut = self._has_shortcut()
            return block_folded(x, layers, projection=projection, add_input=has_shortcut)
        *inner, last = layers
        for layer in inner:
            x = conv_bn_folded(x, layer, relu=True)
        # A shortcut that is not fused may want a gradient.
        return conv_bn(x, last, residual=shortcut)


class FusedBasicBlock(FusedBlock, BasicBlock):
    """`BasicBlock`, fused."""

    depth = 2


class FusedBottleneck(FusedBlock, Bottleneck):
    """`Bottleneck`, fused."""

    depth = 3


def pool_classify(x: Tensor, fc: nn.Module) -> Tensor:
    """`fc(mean over pixels of x)`, in one op where fc is a plain nn.Linear and kernels run on x.

    Args:
        x: (N, C, H, W).
        fc: the classifier; the op uses its parameters as they are, in float32 under autocast.
            With a hook on it, it is called itself.

    Returns: (N, classes) in the dtype that autocast gives a linear layer.
    """
    if type(fc) is nn.Linear and not is_overridden(fc) and x.shape[0] > 0 and is_worth_an_op(x):
        return pool_linear(x, fc.weight, fc.bias).to(cast_dtype(x))
    return fc(x.mean(dim=(2, 3)))


class SmoothCrossEntropy(nn.Module):
    """`nn.CrossEntropyLoss(label_smoothing=...)`, in one op where kernels run on the logits.

    In float32 whatever the dtype of the logits. The op cannot wait to see labels that are no class
    and makes the loss NaN for them; elsewhere torch raises.

    Args:
        label_smoothing: share of the target spread evenly over all classes, 0 to 1.
    """

    def __init__(self, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Map logits (N, classes) and labels (N,) int64 to the mean loss ()."""
        if is_worth_an_op(logits):
            return smooth_cross_entropy(logits, labels, self.label_smoothing)
        wide = logits.to(stat_dtype(logits.dtype))
        return F.cross_entropy(wide, labels, label_smoothing=self.label_smoothing)


class FusedResNet(FusedModule, ResNet):
    """`ResNet` with a fused stem and head; its blocks are fused on their own."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        if self.must_call_modules(x):
            return super().forward(x)
        x = conv_bn(x, ConvBNModules(self.conv1, self.bn1))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return pool_classify(x, self.fc)


class FusedResNet9(FusedModule, ResNet9):
    """`ResNet9` with a fused stem; its blocks are fused on their own."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        if self.must_call_modules(x):
            return super().forward(x)
        x = conv_bn(x, ConvBNModules(self.conv1, self.bn1))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.amax(dim=(2, 3))) * self.logit_scale
