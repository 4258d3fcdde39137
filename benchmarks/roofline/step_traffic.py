"""Bytes and operations of one training step, counted from the model on the meta device.

    eager   every operator of torch reads its operands and writes its result
    fused   the same, but the registered ops of the fused net move what their launches do: images
            and filters, as harness/launch_bytes.py counts them

Both are traced: one dispatch mode sees every operator of forward, loss and backward. Caches can
serve part of this where tensors are small, so memory is a floor only for tensors beyond them.
"""

import copy
import importlib.util
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.launch_bytes import tensor_bytes
from fastres.fusion.fuse import fuse
from fastres.kernels.conv_shape import ConvShape

__all__ = [
    "CATEGORIES",
    "StepWork",
    "TracedConv",
    "category_of_operator",
    "conv_layers",
    "count_step",
]

CATEGORIES = (
    "fused operators",
    "convolutions",
    "batch norm",
    "ReLU",
    "add",
    "optimizer",
    "casts and copies",
    "head and loss",
    "other",
)

# First match wins; names as torch's profiler and dispatcher spell them. The CPU's fused operators
# are autograd functions of whole blocks, convolutions included.
_OPERATORS = (
    ("fused operators", ("fastres::", "_eagerblock")),
    ("convolutions", ("convolution", "conv2d")),
    ("batch norm", ("batch_norm",)),
    ("ReLU", ("relu", "threshold", "clamp_min")),
    ("optimizer", ("sgd", "adam_", "adamw", "_foreach", "optimizer")),
    ("casts and copies", ("_to_copy", "copy_", "clone", "contiguous", "zero_", "fill_", "zeros")),
    (
        "head and loss",
        ("addmm", "mm", "linear", "mean", "softmax", "nll", "cross_entropy", "argmax", "sum"),
    ),
    ("add", ("add", "accumulategrad")),
)

# An update with momentum reads weight, gradient and momentum and writes weight and momentum.
_OPTIMIZER_BYTES = 5 * 4
# Batch norm reads its input twice: once for the statistics, once to apply them.
_EXTRA_READS = {"native_batch_norm": 1, "native_batch_norm_backward": 2}


@dataclass(frozen=True)
class TracedConv:
    """A convolution of a network as one image meets it; needs_dgrad: all but the first do."""

    name: str
    shape: ConvShape
    needs_dgrad: bool

    @property
    def label(self) -> str:
        """Its shape for people: 3x3/2 16 -> 32, 32x32."""
        shape = self.shape
        stride = f"/{shape.stride}" if shape.stride > 1 else ""
        return f"{shape.R}x{shape.S}{stride} {shape.C} -> {shape.K}, {shape.H}x{shape.W}"


@dataclass(frozen=True)
class StepWork:
    """What a training step of `batch_size` images asks of the machine.

    Attributes:
        flops: of all convolutions and the classifier, forward and backward.
        bytes: {scheme: bytes}, schemes as at the head of the file, optimizer included; without
            "fused" where Triton is not installed, whose launches are counted.
        eager_bytes: {category: bytes} of the scheme "eager".
    """

    flops: int
    bytes: dict[str, int]
    eager_bytes: dict[str, int]

    @property
    def fewest_bytes(self) -> int:
        """Bytes of the scheme that moves least."""
        return min(self.bytes.values())


def category_of_operator(name: str) -> str:
    """Return which of CATEGORIES an operator belongs to, by its name in torch."""
    plain = name.removeprefix("aten::").lower()
    for category, words in _OPERATORS:
        if any(word in plain for word in words):
            return category
    return "other"


def conv_layers(model: nn.Module, image_size: int = 32) -> list[TracedConv]:
    """List the convolutions of `model` for one RGB image, in the order in which they run."""
    found: list[TracedConv] = []

    def record(name: str, conv: nn.Conv2d, inputs: Tensor, output: Tensor) -> None:
        n, c, h, w = inputs.shape
        (r, s), stride = conv.kernel_size, conv.stride[0]
        padding = conv.padding[0] if isinstance(conv.padding, tuple) else 0
        shape = ConvShape(n, h, w, c, output.shape[1], r, s, stride, padding)
        found.append(TracedConv(name, shape, needs_dgrad=bool(found)))

    traced = copy.deepcopy(model).to("meta").eval()
    for name, module in traced.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda conv, inputs, output, name=name: record(name, conv, inputs[0], output)
            )
    with torch.no_grad():
        traced(torch.empty(1, 3, image_size, image_size, device="meta"))
    return found


def count_step(model: nn.Module, batch_size: int, dtype: torch.dtype) -> StepWork:
    """Count one training step of `model` with activations of `dtype` and fp32 parameters.

    Casts between the two are not counted: a step can do without them.

    Args:
        model: a ResNet; it is left alone.
        batch_size: images of the step.
        dtype: of activations and of the filters that convolutions read.
    """
    layers = conv_layers(model)
    params = sum(p.numel() for p in model.parameters())
    classifier = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    products = ((2 + layer.needs_dgrad) * layer.shape.flops for layer in layers)
    counts = {"eager": _trace(model, batch_size, dtype)}
    if importlib.util.find_spec("triton") is not None:
        counts["fused"] = _trace(fuse(model, verbose=False), batch_size, dtype)
    for count in counts.values():
        count["optimizer"] = params * _OPTIMIZER_BYTES
    return StepWork(
        flops=(sum(products) + 6 * classifier) * batch_size,
        bytes={scheme: sum(count.values()) for scheme, count in counts.items()},
        eager_bytes=dict(counts["eager"]),
    )


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of every operator that is not a view, those of registered ops by launch."""

    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace == "fastres":
            from benchmarks.roofline.memory_traffic import record_op

            result, launches = record_op(func, args)
            self.bytes["fused operators"] += tensor_bytes(launches)
            return result
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            inputs = _tensors((args, kwargs or {}))
            operands = [*inputs, *_tensors(result)]
            name = func.overloadpacket.__name__
            again = _EXTRA_READS.get(name, 0) * _num_bytes(inputs[:1])
            self.bytes[category_of_operator(name)] += again + _num_bytes(operands)
        return result


def _num_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _tensors(tree: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _trace(model: nn.Module, batch_size: int, dtype: torch.dtype) -> Counter[str]:
    """Bytes by category of forward, loss and backward, filters and classifier in `dtype`."""
    traced = copy.deepcopy(model).to("meta").train()
    traced.to(memory_format=torch.channels_last)
    for module in traced.modules():
        # As under autocast: batch norm keeps its parameters in float32.
        if not isinstance(module, nn.BatchNorm2d):
            module._apply(lambda t: t.to(dtype), recurse=False)
    images = torch.empty(batch_size, 3, 32, 32, device="meta", dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.empty(batch_size, device="meta", dtype=torch.int64)
    with _Traffic() as traffic:
        F.cross_entropy(traced(images), labels).backward()
    return traffic.bytes
