"""What the codegen tool counts beside blocks and head is what the real training step launches.

The step runs on the meta device, where autocast and the fused optimizer are not to be had without
a little persuasion; its fused ops are left to their fakes, and what is launched between them is
recorded by the tool's own recorder.
"""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from fastres.config import Config
from fastres.engine.runtime import Runtime
from fastres.engine.step import TrainStep
from fastres.fusion.fuse import fuse
from fastres.kernels.dispatch import force_backend
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.tools.network_launches import record_update
from fastres.kernels.tools.networks import PRECISIONS
from fastres.kernels.tools.torch_launches import recording_all
from fastres.model import conv_bn, head, residual_block
from fastres.model.resnet import create_model

BATCH = 16


class MetaRuntime(Runtime):
    """The fastest route of a GPU, on the meta device."""

    def autocast(self):
        return nullcontext()


@pytest.fixture(params=["bf16", "fp16"])
def precision(request, monkeypatch):
    """Have a fused net on the meta device compute as under autocast of a GPU."""
    found = PRECISIONS[request.param]
    for module in (conv_bn, head, residual_block):
        monkeypatch.setattr(module, "cast_dtype", lambda x: found.dtype)
    monkeypatch.setattr(conv_bn, "_is_cast", lambda x: x.is_floating_point())
    with force_backend(gpu_backend):
        yield found


def launches_of_train_step(network, dtype):
    """What one step launches; its inputs are copied as they are for the replay of a graph."""
    runtime = MetaRuntime(
        device=torch.device("meta"),
        dtype=dtype,
        channels_last=True,
        route="fused",
        fused_optimizer=True,
    )
    model = fuse(create_model(network), verbose=False)
    runtime.place(model)
    config = Config(fast=True, model=network, batch_size=BATCH)
    step = TrainStep(model.train(), config, runtime, total_steps=100)
    # Torch has a fused optimizer for devices that compute, and asks before the first step.
    step.optimizer.rules[0]._need_device_dtype_check_for_fused = False
    given = torch.empty(BATCH, 3, 32, 32, device="meta", memory_format=torch.channels_last)
    labels = torch.empty(BATCH, dtype=torch.int64, device="meta")
    # The first step fills the optimizer's table for good, and makes the loss scale.
    step(0, given.to(dtype), labels)
    with recording_all() as launches:
        inputs = torch.empty_like(given, dtype=dtype).copy_(given)
        step(1, inputs, torch.empty_like(labels).copy_(labels))
    return launches


@pytest.mark.parametrize("network", ["resnet20", "resnet18"])
def test_every_launch_of_the_real_step_is_listed(precision, network):
    listed = Counter(map(described, record_update(network, BATCH, precision)))
    real = Counter(map(described, launches_of_train_step(network, precision.dtype)))
    # A graph copies the optimizer's table in each replay; an eager step whose addresses stay, as
    # those on meta do, copies none.
    (table,) = (listed - real).elements()
    assert table[0] == "copy_"
    assert real - listed == Counter()
    # For fp16 the loss is scaled, gradients are looked at and the scale is moved, in ten launches.
    assert real.total() == (16 if precision.dtype == torch.float16 else 6)


def described(launch):
    if launch.name == "sgd_kernel":
        # It finds copies of filters by their addresses, and tensors on meta have none.
        return (launch.name, launch.traffic.reads)
    return launch.name, launch.traffic.reads, launch.traffic.writes


def test_what_starts_no_kernel_is_no_launch():
    x = torch.empty(2, 16, 8, 8, device="meta")
    with recording_all() as launches:
        torch.empty_like(x).detach().view(-1)[3:].reshape(5, -1)
        x.permute(0, 2, 3, 1).expand(2, 8, 8, 16)
        x[:0].add_(1)
    assert launches == []


def test_bytes_and_arithmetic_of_what_torch_launches():
    x = torch.empty(2, 16, 8, 8, device="meta", dtype=torch.bfloat16)
    w = torch.empty(32, 16, 3, 3, device="meta", dtype=torch.bfloat16)
    y = torch.empty(2, 32, 8, 8, device="meta", dtype=torch.bfloat16)
    num_x, num_w, num_y = x.numel(), w.numel(), y.numel()
    options = [None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1]
    with recording_all() as launches:
        torch.ops.aten.convolution(x, w, *options)
        for outputs in ([True, True, False], [False, True, False]):
            torch.ops.aten.convolution_backward(y, x, w, *options, outputs)
        x.add_(x)
        x.fill_(1)
        x.float()
        tensors = [torch.empty(3, device="meta") for _ in range(111)]
        torch._foreach_add_(tensors, 1)
        scalars = [torch.empty((), device="meta") for _ in range(2)]
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, *scalars)
    found = [(x.name, x.traffic.reads, x.traffic.writes, x.traffic.flops) for x in launches]
    flops = 2 * num_y * 16 * 9
    dw = ("convolution_backward dw", 2 * (num_y + num_x), 2 * num_w, flops)
    assert found[:7] == [
        ("convolution", 2 * (num_x + num_w), 2 * num_y, flops),
        ("convolution_backward dx", 2 * (num_y + num_w), 2 * num_x, flops),
        dw,
        dw,
        ("add_", 4 * num_x, 2 * num_x, 0),
        ("fill_", 0, 2 * num_x, 0),
        ("_to_copy", 2 * num_x, 4 * num_x, 0),
    ]
    # Torch puts at most 110 tensors of one list into a launch.
    names = [name for name, *_ in found[7:]]
    assert names == ["_foreach_add_"] * 2 + ["_amp_foreach_non_finite_check_and_unscale_"] * 2
    # The second call reads two numbers more, and writes the one that says what it found.
    for calls, more in ((found[7:9], 0), (found[9:], 1)):
        assert sum(reads for _, reads, _, _ in calls) == 4 * (3 * 111 + 2 * more)
        assert sum(writes for _, _, writes, _ in calls) == 4 * (3 * 111 + more)
