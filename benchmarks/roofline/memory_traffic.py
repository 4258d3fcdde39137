"""Bytes of a fused training step, launch by launch: `python -m benchmarks.roofline.memory_traffic`.

A tensor pass is one read or one write of a tensor as large as the block's largest activation.
Counted is what the launches of a fused net declare: its modules run on the meta device, where every
registered op is computed by the Triton back end, which records its launches and starts none.
Filters, statistics and sums of tiles, and split-K partials are no activations; what they add is
counted beside the passes. `--document FILE` writes the table of a basic block between the marks
`<!-- passes -->` and `<!-- end -->` of a document.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.fusion.fuse import fuse
from fastres.kernels import ops
from fastres.kernels.block import Backend
from fastres.kernels.dispatch import force_backend
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.launch import Launch, num_bytes, recording
from fastres.model.resnet import create_model
from fastres.output import reader_may_leave

__all__ = ["BlockTraffic", "block_table", "count_net", "fill", "main", "record_op"]

_FORWARD_OPS = ("conv_bn_relu_fwd", "residual_block_fwd")
_BLOCK = re.compile(r"(<!-- passes -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class BlockTraffic:
    """One call of a registered op, forward and backward.

    Attributes:
        op: its name.
        unit: bytes of its largest activation.
        launches: those of forward, then those of backward.
    """

    op: str
    unit: int
    launches: list[Launch] = field(default_factory=list)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all activations that all launches read and write."""
        return sum(num_bytes(*activations(launch).values()) for launch in self.launches)

    @property
    def bytes(self) -> int:
        """Bytes that all launches declare."""
        return sum(launch.traffic.bytes for launch in self.launches)

    @property
    def passes(self) -> float:
        """Passes over the largest activation."""
        return self.activation_bytes / self.unit


def activations(launch: Launch) -> dict[str, Tensor]:
    """The arguments of a launch that are activations or their gradients, by name."""
    is_filter = ("w_ptr", "w_desc", "dw_ptr", "partials_ptr")
    return {
        name: tensor
        for name, tensor in launch.tensors.items()
        if tensor.dim() == 4 and name not in is_filter
    }


def record_op(func: Any, args: tuple) -> tuple[Any, list[Launch]]:
    """Compute a registered training op on meta tensors by the Triton back end.

    Returns: its result, and the launches that it would make.
    """
    implement = ops.forward_impl if func.__name__.startswith(_FORWARD_OPS) else ops.backward_impl
    with force_backend(cast(Backend, gpu_backend)), recording() as launches:
        return implement(*args), launches


class _Recorder(TorchDispatchMode):
    """Keeps the launches of every registered op of a net, forward beside backward."""

    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[BlockTraffic] = []
        self._open: list[BlockTraffic] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "fastres":
            return func(*args, **(kwargs or {}))
        result, launches = record_op(func, args)
        name = func.__name__.partition(".")[0]
        if name.endswith("_fwd"):
            block = BlockTraffic(name.removesuffix("_fwd"), 0)
            self.blocks.append(block)
            self._open.append(block)
        else:
            # Backward meets the blocks from the last to the first.
            block = self._open.pop()
        block.launches += launches
        sizes = [num_bytes(t) for launch in launches for t in activations(launch).values()]
        block.unit = max(block.unit, *sizes)
        return result


def count_net(
    model: nn.Module, batch: int, dtype: torch.dtype = torch.bfloat16, size: int = 32
) -> list[BlockTraffic]:
    """Forward and backward of a net, fused: its stem and blocks, in order.

    Args:
        model: a net that `fuse` recognises; it is not changed.
        batch: images a step.
        dtype: of activations and filters.
        size: height and width of the images.
    """
    net = fuse(model, verbose=False).to("meta").train()
    # As under autocast, which the meta device has not: filters in the dtype of the images.
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.to(dtype)
    images = torch.empty(batch, 3, size, size, device="meta", dtype=dtype)
    recorder = _Recorder()
    with recorder:
        net(images.contiguous(memory_format=torch.channels_last)).sum().backward()
    return recorder.blocks


def _operand_names(launch: Launch, writes: bool) -> str:
    """The activations that a launch reads or writes, by their names in its kernel."""
    written = {
        "fprop": "y_ptr",
        "bn_apply": "out_ptr",
        "bn_backward_reduce": "g_ptr",
        "dgrad": "dx_ptr",
        "conv_backward": "dx_ptr",
    }
    outputs = {pointer for word, pointer in written.items() if word in launch.name}
    names = [name for name in activations(launch) if (name in outputs) == writes]
    return ", ".join(name.rpartition("_")[0] for name in names)


def block_table(batch: int = 512, width: int = 16) -> str:
    """The launches of one basic block of ResNet-20's first stage as a Markdown table.

    Columns: kernel, activations read, activations written, passes, and what else it moves in
    thousandths of a pass.
    """
    model = create_model("resnet20", width=width / 16)
    block = count_net(model, batch)[1]
    lines = [
        "| launch | reads | writes | passes | other bytes, in passes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for launch in block.launches:
        moved = num_bytes(*activations(launch).values())
        rest = (launch.traffic.bytes - moved) / block.unit
        name = launch.name.removesuffix("_kernel")
        cells = (_operand_names(launch, False) or "-", _operand_names(launch, True) or "-")
        lines.append(f"| `{name}` | {' | '.join(cells)} | {moved / block.unit:g} | {rest:.3f} |")
    rest = (block.bytes - block.activation_bytes) / block.unit
    lines.append(f"| sum | | | {block.passes:g} | {rest:.3f} |")
    return "\n".join(lines) + "\n"


def fill(document: str) -> str:
    """Return `document` with the table between its marks counted anew."""
    return _BLOCK.sub(lambda found: found.group(1) + block_table() + found.group(2), document)


def _net_table(name: str, batch: int) -> Iterator[str]:
    blocks = count_net(create_model(name), batch)
    yield f"{name}, batch {batch}, bf16"
    for number, block in enumerate(blocks):
        rest = (block.bytes - block.activation_bytes) / block.unit
        yield f"  {number:2d} {block.op:18s} {block.passes:6.2f} passes + {rest:.2f} other"
    residual = [block for block in blocks if block.op == "residual_block"]
    units = sum(block.unit for block in residual)
    total = sum(block.activation_bytes for block in blocks) / units
    yield f"  a residual block, stem shared out: {total:.2f} passes"
    yield f"  an image: {sum(block.bytes for block in blocks) / batch / 1e6:.2f} MB"


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or write the block's into a document."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline.memory_traffic", description=__doc__
    )
    parser.add_argument("--document", type=Path, help="write the table of a block into this file")
    parser.add_argument("--batch", type=int, default=512)
    options = parser.parse_args(argv)
    if options.document is not None:
        options.document.write_text(fill(options.document.read_text()))
        return 0
    print(block_table(options.batch))
    for name in ("resnet20", "resnet18"):
        print("\n".join(_net_table(name, options.batch)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
