"""Steps of whole networks: what they leave behind, and that it is as near to fp64 as eager's.

Runs that train drift apart, and soon nothing but luck says which is nearer to the truth. So every
network begins each step with the parameters that eager training has come to, the fp64 truth too:
what is compared are logits and gradients of one step. Running statistics do not feed back, and are
each network's own from the first step to the evaluation behind the last. A step is a draw of the
error bound, as other images are: what is wrong is so in every step, or from the second one on.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.fusion.backend import fastres
from tests.helpers.interpreter import DEVICE
from tests.helpers.numerics import PooledErrorBound

__all__ = [
    "assert_same_counts",
    "check_steps",
    "compiled",
    "descend",
    "evaluate",
    "images",
    "step",
]

# Draws of images on which a net that the error bound refuses is judged. In nets whose last maps are
# one pixel a right one is over the bound in every seventh draw, and so in most of 9 draws for one
# test in 200, of which there are as many; in most of 25 for one in 100,000.
MOST_DRAWS = 25
LEARNING_RATE = 0.05


def images(batch: int, size: int, seed: int) -> Tensor:
    """Images of noise, (batch, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 3, size, size), generator=generator).to(DEVICE)


def compiled(model: nn.Module, rest: str = "aot_eager", mode: str | None = None) -> nn.Module:
    """A copy that `torch.compile` runs by fastres' backend, fused where that is slower too.

    rest, mode: as that takes them, which takes more at a time than `torch.compile` does.
    """
    faster = copy.deepcopy(model)
    faster.compile(backend=partial(fastres, mode=mode, options={"fuse": "all", "rest": rest}))
    return faster


def _autocast(dtype: torch.dtype) -> torch.autocast:
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(DEVICE.type, dtype if half else torch.bfloat16, enabled=half)


def step(net: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits, every gradient and every running statistic of a step; dtype is autocast's."""
    net.zero_grad()
    with _autocast(dtype):
        logits = net(x)
    labels = torch.arange(len(x), device=x.device)
    F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), labels).backward()
    grads = {f"grad {name}": p.grad for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers() if b.is_floating_point()}
    return {"logits": logits.detach(), **grads, **buffers}


def evaluate(net: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits where no gradient is wanted."""
    with torch.no_grad(), _autocast(dtype):
        return {"evaluated logits": net(x)}


def check_steps(
    model: nn.Module,
    faster: Mapping[str, nn.Module],
    dtype: torch.dtype,
    batch: int,
    size: int,
    *,
    num_steps: int = 1,
    evaluates: bool = False,
) -> None:
    """Every tensor of a step is as near to fp64 as eager's, in the median of a few draws.

    faster: copies of the model that are judged, by what made them. Batches are counted exactly.
    num_steps: in a row. evaluates: whether an evaluation follows them.
    """
    bounds = {door: PooledErrorBound(dtype, has_relu=True) for door in faster}
    start = copy.deepcopy(model.state_dict())
    truth, eager, nhwc = copy.deepcopy(model).double(), copy.deepcopy(model), copy.deepcopy(model)
    nets = {"truth": truth, "eager": eager, "nhwc": nhwc, **faster}

    def compare(run: Callable[..., dict[str, Tensor]], x: Tensor) -> None:
        results = {
            "truth": run(truth, x.double(), torch.float64),
            "nhwc": run(nhwc, x.contiguous(memory_format=torch.channels_last), dtype),
            **{name: run(nets[name], x, dtype) for name in ("eager", *faster)},
        }
        for name, value in results["truth"].items():
            baselines = [results[net][name] for net in ("eager", "nhwc")]
            for door, bound in bounds.items():
                assert results[door].keys() == results["truth"].keys()
                bound.add(name, results[door][name], baselines, value)

    for draw in range(MOST_DRAWS):
        for net in nets.values():
            net.train().load_state_dict(start)
        for number in range(num_steps):
            compare(step, images(batch, size, num_steps * draw + number))
            descend(eager, [net for net in nets.values() if net is not eager])
        if evaluates:
            for net in nets.values():
                net.eval()
            compare(evaluate, images(batch, size, draw))
        for door in faster:
            assert_same_counts(nets[door], eager)
        refused = [f"{door}: {what}" for door, b in bounds.items() for what in b.refused()]
        if not refused:
            return
    raise AssertionError("\n".join(refused))


@torch.no_grad()
def descend(eager: nn.Module, others: list[nn.Module]) -> None:
    """Take a step of gradient descent, and give the parameters to the others."""
    for parameter, *copies in zip(
        eager.parameters(), *(net.parameters() for net in others), strict=True
    ):
        parameter -= LEARNING_RATE * parameter.grad
        for copied in copies:
            copied.copy_(parameter)


def assert_same_counts(net: nn.Module, eager: nn.Module) -> None:
    """Whatever counts, such as `num_batches_tracked`, must do so exactly."""
    own = dict(net.named_buffers())
    for name, value in eager.named_buffers():
        if not value.is_floating_point():
            assert torch.equal(own[name], value), f"{name}: {own[name]} for {value}"
