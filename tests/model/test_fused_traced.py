"""Fused nets on the CPU kernels, recorded: as their plain modules, or by torch.compile as ops."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from fastres.fusion.fuse import fuse
from fastres.kernels import dispatch, ops
from fastres.kernels.conv_types import ConvBN
from fastres.kernels.cpu import backend as cpu_backend
from fastres.kernels.cpu import build as cpu_build
from fastres.kernels.reference import backend as reference_backend
from fastres.model.resnet import create_model
from tests.helpers.interpreter import HAS_GPU


@pytest.fixture(autouse=True)
def _cpu_kernels(monkeypatch):
    if HAS_GPU or cpu_build.library() is None:
        pytest.skip(f"no CPU kernels: {cpu_build.unavailable() or 'the tests run on a GPU'}")
    monkeypatch.setattr(dispatch, "_triton_backend", lambda: None)
    assert dispatch.choose_backend(images(0)) is cpu_backend


def images(seed: int, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def record_jit(net):
    return torch.jit.trace(net, images(0), check_trace=False)


def record_fx(net):
    return make_fx(net)(images(0))


def record_export(net):
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(net, (images(0),), dynamic_shapes=({0: batch},)).module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("record", [record_jit, record_fx, record_export])
@torch.no_grad()
def test_a_recorded_net_answers_other_images(record):
    plain = create_model("resnet8", seed=0).eval().requires_grad_(False)
    recorded = record(fuse(plain, verbose=False))
    torch.testing.assert_close(recorded(images(1)), plain(images(1)), rtol=0, atol=0)


def test_an_exported_net_takes_any_batch():
    plain = create_model("resnet8", seed=0).eval().requires_grad_(False)
    with torch.no_grad():
        recorded = record_export(fuse(plain, verbose=False))
        torch.testing.assert_close(recorded(images(1, 7)), plain(images(1, 7)), rtol=0, atol=0)


def test_autocast_around_an_op_changes_nothing_in_it():
    """Forward and backward: a matrix product inside would be rounded to bf16."""
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(8, 3, 1, 1, generator=generator)
    layer = ConvBN(w, torch.ones(8), torch.zeros(8), 2, 0)
    grads = []
    for enabled in (False, True):
        own = layer._replace(w=w.clone().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, _ = ops.conv_bn_relu(images(0), own)
            out.square().sum().backward()
        grads.append((out, own.w.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_compiled_is_eager():
    faster = fuse(create_model("resnet8", width=0.5, seed=0), verbose=False)
    compiled = torch.compile(copy.deepcopy(faster), backend="aot_eager", fullgraph=True)
    for net in (faster, compiled):
        net(images(0)).square().sum().backward()
    for a, b in zip(faster.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_copies_of_a_net_are_compiled_once():
    net = fuse(create_model("resnet8", seed=0), verbose=False).train()
    counter = CompileCounter()
    torch.compiler.reset()
    for _ in range(3):
        torch.compile(copy.deepcopy(net), backend=counter, fullgraph=True)(images(0))
    assert counter.frame_count == 1


class Wrapper(torch.Tensor):
    """A tensor whose numbers lie in another one, as those of a DTensor or a quantised weight do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inner if isinstance(value, cls) else value

        return op(*torch.utils._pytree.tree_map(unwrap, args), **(kwargs or {}))


@torch.no_grad()
def test_filters_without_numbers_of_their_own_are_left_to_torch():
    generator = torch.Generator().manual_seed(0)

    def filters():
        values = torch.randn(16, 16, 3, 3, generator=generator) / 12
        return values.bfloat16().contiguous(memory_format=torch.channels_last)

    x = torch.randn(2, 16, 8, 8, generator=generator).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last)
    layers = [ConvBN(filters(), torch.ones(16), torch.zeros(16), 1, 1) for _ in range(2)]
    fold = torch.ones(2, 16)
    wrapped = [layer._replace(w=Wrapper(layer.w)) for layer in layers]
    for run in (
        lambda layers: ops.conv_bn_folded(x, layers[0], fold),
        lambda layers: ops.residual_block_folded(x, layers, [fold] * 2),
        lambda layers: ops.conv_bn_relu(x, layers[0])[0],
    ):
        got = run(wrapped)
        with dispatch.force_backend(reference_backend):
            torch.testing.assert_close(got, run(layers))
