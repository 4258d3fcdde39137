"""Bytes and operations of one training step, counted from the model on the meta device.

Four ways through memory, from most to fewest bytes, with their passes over a basic block:

    eager     42: every operator of torch reads its operands and writes its result; traced.
    compile   about 30: an estimate of what torch.compile leaves after fusing.
    fused     25: the launches of fastres.kernels.
    least     23: the same with every reduction in the epilogue of the convolution before it.

A pass is one read or one write of an activation-sized tensor. Of a convolution with input X and
output Y, forward moves X + Y, dgrad 2X + 2Y (gradient and y in, y of the layer before in, gradient
out), wgrad X + 2Y. The end of a block adds 3 in the forward pass (y, shortcut, out) and in the
backward pass 4 (dout, out, y, g) or, reduced in the epilogue of the dgrad behind it, 2. Caches can
serve part of this where tensors are small, so memory is a floor only for tensors beyond them.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.model.resnet import BasicBlock, Bottleneck

__all__ = [
    "CATEGORIES",
    "ConvLayer",
    "StepWork",
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
# are autograd functions named after the chain of layers that they compute, convolutions included.
_OPERATORS = (
    ("fused operators", ("fastres::", "chain")),
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
class ConvLayer:
    """One convolution of a network, for one image: input (C, H, W), output (K, P, Q)."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: int
    stride: int
    padding: int
    needs_dgrad: bool

    @property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...], int, int, int]:
        """What decides its time: layers of one shape are measured once."""
        return (self.inputs, self.outputs, self.kernel, self.stride, self.padding)

    @property
    def label(self) -> str:
        """Its shape for people: 3x3/2 16 -> 32, 32x32."""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        (channels, height, width), filters = self.inputs, self.outputs[0]
        return f"{self.kernel}x{self.kernel}{stride} {channels} -> {filters}, {height}x{width}"

    @property
    def num_x(self) -> int:
        """Elements of the input of one image."""
        return self.inputs[0] * self.inputs[1] * self.inputs[2]

    @property
    def num_y(self) -> int:
        """Elements of the output of one image."""
        return self.outputs[0] * self.outputs[1] * self.outputs[2]

    @property
    def flops(self) -> int:
        """Operations of any one of fprop, dgrad and wgrad for one image, padding included."""
        return 2 * self.num_y * self.inputs[0] * self.kernel**2


@dataclass(frozen=True)
class StepWork:
    """What a training step of `batch_size` images asks of the machine.

    Attributes:
        flops: of all convolutions and the classifier, forward and backward.
        bytes: {scheme: bytes}, schemes as at the head of the file, optimizer included.
        eager_bytes: {category: bytes} of the scheme "eager".
        block_bytes: of the outputs of all residual blocks: what one pass a block moves.
    """

    flops: int
    bytes: dict[str, int]
    eager_bytes: dict[str, int]
    block_bytes: int


def category_of_operator(name: str) -> str:
    """Return which of CATEGORIES an operator belongs to, by its name in torch."""
    plain = name.removeprefix("aten::").lower()
    for category, words in _OPERATORS:
        if any(word in plain for word in words):
            return category
    return "other"


def conv_layers(model: nn.Module, image_size: int = 32) -> list[ConvLayer]:
    """List the convolutions of `model` for one RGB image, in the order in which they run."""
    found: list[ConvLayer] = []

    def record(name: str, conv: nn.Conv2d, inputs: Tensor, output: Tensor) -> None:
        (kernel, _), (stride, _) = conv.kernel_size, conv.stride
        (padding, _) = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
        shapes = (tuple(inputs.shape[1:]), tuple(output.shape[1:]))
        found.append(ConvLayer(name, *shapes, kernel, stride, padding, needs_dgrad=bool(found)))

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
        model: a ResNet of fastres; it is left alone.
        batch_size: images of the step.
        dtype: of activations and of the filters that convolutions read.
    """
    layers = conv_layers(model)
    params = sum(p.numel() for p in model.parameters())
    classifier = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    flops = sum((2 + layer.needs_dgrad) * layer.flops for layer in layers) + 6 * classifier
    filters = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    # Filters are read twice and their gradient is written once.
    per_step = 3 * filters * dtype.itemsize + params * _OPTIMIZER_BYTES
    ends = list(_block_ends(model))
    block_elements = sum(ends)
    convs = sum(_conv_elements(layer) for layer in layers)
    # The stem's output meets batch norm and ReLU once each way: y and out, dout, out, y and g.
    stem = 6 * layers[0].num_y
    eager = _trace_eager(model, batch_size, dtype)
    eager["optimizer"] = params * _OPTIMIZER_BYTES

    def moved(block_end: int) -> int:
        elements = convs + stem + block_end * block_elements
        return elements * batch_size * dtype.itemsize + per_step

    return StepWork(
        flops=flops * batch_size,
        bytes={
            "eager": sum(eager.values()),
            "compile": moved(12),
            "fused": moved(7),
            "least": moved(5),
        },
        eager_bytes=dict(eager),
        block_bytes=block_elements * batch_size * dtype.itemsize,
    )


def _conv_elements(layer: ConvLayer) -> int:
    """Elements that the three products of a convolution read and write, operands formed inside."""
    forward = layer.num_x + layer.num_y
    dgrad = 2 * (layer.num_x + layer.num_y) if layer.needs_dgrad else 0
    return forward + dgrad + layer.num_x + 2 * layer.num_y


def _block_ends(model: nn.Module) -> Iterator[int]:
    """Yield the output elements of every residual block, for one image."""
    sizes = {layer.name: layer.num_y for layer in conv_layers(model)}
    for name, module in model.named_modules():
        if isinstance(module, BasicBlock | Bottleneck):
            last = "conv2" if isinstance(module, BasicBlock) else "conv3"
            yield sizes[f"{name}.{last}"]


class _Bytes(TorchDispatchMode):
    """Adds up the bytes of the operands and results of every operator that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            inputs = _tensors((args, kwargs or {}))
            operands = [*inputs, *_tensors(result)]
            name = func.overloadpacket.__name__
            again = _EXTRA_READS.get(name, 0) * _num_bytes(inputs[:1])
            self.found[category_of_operator(name)] += again + _num_bytes(operands)
        return result


def _num_bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _tensors(tree: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _trace_eager(model: nn.Module, batch_size: int, dtype: torch.dtype) -> Counter[str]:
    """Bytes by category of forward, loss and backward."""
    traced = copy.deepcopy(model).to(device="meta", dtype=dtype).train()
    images = torch.empty(batch_size, 3, 32, 32, device="meta", dtype=dtype)
    labels = torch.empty(batch_size, device="meta", dtype=torch.int64)
    with _Bytes() as counter:
        F.cross_entropy(traced(images), labels).backward()
    return counter.found
