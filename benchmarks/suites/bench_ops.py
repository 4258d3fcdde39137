"""The fused ops on the layers of ResNet-20, -18 and -50, forward, backward and both.

    eager, channels_last    torch in float32, NCHW and NHWC
    amp, compile            torch in 16 bits, NHWC; the same by torch.compile
    fused                   the fused op in 16 bits on the route of the launch table
    triton, cudnn           the fused op with all convolutions on one route (GPU)

On a CPU by the wall clock, operands as hot as they fit into its caches; on a GPU the kernels alone,
as a CUDA graph replayed with a cold L2 cache.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from benchmarks.harness import error_bound
from benchmarks.harness.ablation import Unavailable, here, low_precision, why_not
from benchmarks.harness.records import BenchmarkInfo
from benchmarks.harness.scheduler import Prepared
from benchmarks.harness.timing import graph_sample, peak_bytes, wall_sample
from benchmarks.suites import op_cases
from benchmarks.suites.op_cases import Inputs, OpCase, Pass

PROVIDERS = ("eager", "channels_last", "amp", "compile", "fused", "triton", "cudnn")
DEVICE = here()
BATCHES = {
    "cpu": {"resnet20": 32, "resnet18": 4, "resnet50": 2},
    "cuda": {"resnet20": 512, "resnet18": 256, "resnet50": 128},
}[DEVICE.type]
CASES = op_cases.all_cases(BATCHES)
# Compiling takes seconds on a GPU and a quarter of a minute on a CPU, so not every layer has it.
_COMPILED = {
    "cpu": ("residual_block resnet20 stage1", "residual_block resnet18 stage1"),
    "cuda": tuple(
        f"{op} {net} {stage}"
        for op in ("residual_block", "conv_bn_relu")
        for net in ("resnet20", "resnet18")
        for stage in ("stage1", "stage3")
    ),
}[DEVICE.type]
_QUICK = ("residual_block resnet20 stage2", "conv_bn_folded resnet20 stage2")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}

Op = Callable[[OpCase, Inputs], Tensor]


def _passes(case: OpCase) -> tuple[Pass, ...]:
    """Which passes of a case are timed here: on a CPU the wide networks have one, for the time."""
    if case.op == "conv_bn_folded":
        return ("forward",)
    if DEVICE.type == "cpu" and case.net != "resnet20":
        return ("both",)
    return ("forward", "backward", "both")


def _params() -> list:
    """Every pass of every case, its share of the budget, and `full` where --quick leaves it out."""
    params = []
    for case in CASES:
        slow = case.name in _COMPILED and DEVICE.type == "cpu"
        marks = [pytest.mark.share(8.0 if slow else 0.5)]
        if case.name not in _QUICK:
            marks.append(pytest.mark.full)
        params += [
            pytest.param(case, what, id=f"{case.name} {what}", marks=marks)
            for what in _passes(case)
        ]
    return params


def _low(device: torch.device) -> torch.dtype:
    """The dtype of the fused op here: 16 bits where the machine computes in them."""
    try:
        return _DTYPES[low_precision(device)]
    except Unavailable:
        return torch.float32


def _dtype(provider: str) -> torch.dtype:
    return torch.float32 if provider in ("eager", "channels_last") else _low(DEVICE)


def _forced(provider: str) -> AbstractContextManager[None]:
    """Run all convolutions of fused ops on the route that a provider is named after, if any.

    Backward passes choose their route when they run, so they belong inside the context too.
    """
    if provider not in ("triton", "cudnn"):
        return nullcontext()
    from fastres.kernels.gpu.launch_table import force_route

    return force_route("triton" if provider == "triton" else "cudnn")


@functools.lru_cache(maxsize=1)
def _compiled(case: OpCase) -> Op:
    """The eager op compiled; the passes of a case share it."""
    # Every case compiles the same function anew, and dynamo gives up after a few of them.
    torch.compiler.reset()
    return torch.compile(op_cases.eager, dynamic=False, fullgraph=True)


def _op(provider: str, case: OpCase) -> Op:
    """Return the function of a provider.

    Raises:
        Unavailable: where the provider or the case cannot be had.
    """
    reason = why_not(provider, DEVICE)
    if provider in ("triton", "cudnn") and DEVICE.type != "cuda":
        reason = "the kernels' routes need an NVIDIA GPU"
    if provider == "compile" and case.name not in _COMPILED:
        reason = f"compiled for {len(_COMPILED)} layers alone, for the time that it takes"
    if reason:
        raise Unavailable(reason)
    if provider == "amp":
        low_precision(DEVICE)
    if provider == "compile":
        return _compiled(case)
    return op_cases.eager if provider in ("eager", "channels_last", "amp") else op_cases.fused_op


def _results(op: Op, case: OpCase, inputs: Inputs) -> list[Tensor]:
    """The output and, where there are any, all gradients."""
    if case.op == "conv_bn_folded":
        with torch.no_grad():
            return [op(case, inputs)]
    out = op(case, inputs.require_grad())
    return [out.detach(), *torch.autograd.grad(out, inputs.learned(), inputs.dout)]


@functools.lru_cache(maxsize=1)
def _references(case: OpCase) -> dict[torch.dtype, list[Tensor]]:
    """Eager results in float64, the truth, and in the dtype of the fused op, the baseline."""
    return {
        dtype: _results(op_cases.eager, case, op_cases.make_inputs(case, dtype, DEVICE, nhwc=True))
        for dtype in (torch.float64, _low(DEVICE))
    }


@functools.lru_cache(maxsize=len(PROVIDERS))
def _check(provider: str, case: OpCase) -> None:
    """Raise AssertionError where the provider computes something else; eager is the baseline."""
    if provider in ("eager", "channels_last", "amp"):
        return
    dtype = _dtype(provider)
    inputs = op_cases.make_inputs(case, dtype, DEVICE, nhwc=True)
    references = _references(case)
    with _forced(provider):
        results = _results(_op(provider, case), case, inputs)
    truth = references[torch.float64]
    error_bound.check(f"{case.name} {provider}", results, references[dtype], truth, dtype)


def _calls(op: Op, case: OpCase, what: Pass, inputs: Inputs) -> tuple[Callable, Callable | None]:
    """Return what is timed, and what must have run before."""
    if case.op == "conv_bn_folded":
        return torch.no_grad()(lambda: op(case, inputs)), None
    learned = inputs.require_grad().learned()
    if what == "forward":
        return lambda: op(case, inputs), None
    if what == "both":
        return lambda: torch.autograd.grad(op(case, inputs), learned, inputs.dout), None
    kept: list[Tensor] = []

    def keep() -> None:
        kept[:] = [op(case, inputs)]

    return lambda: torch.autograd.grad(kept[0], learned, inputs.dout, retain_graph=True), keep


def _prepare(case: OpCase, what: Pass, provider: str) -> Prepared:
    dtype = _dtype(provider)
    op = _op(provider, case)
    if provider == "compile" and what == "backward":
        raise Unavailable("a compiled backward pass frees what it reads: only timed with forward")
    _check(provider, case)
    inputs = op_cases.make_inputs(case, dtype, DEVICE, nhwc=provider != "eager")
    call, before = _calls(op, case, what, inputs)
    on_gpu = DEVICE.type == "cuda"
    if on_gpu:
        with _forced(provider):
            sample = graph_sample(call, DEVICE, cold=True, before=before)
    else:
        if before is not None:
            before()
        sample = wall_sample(call, DEVICE)
    counted = op_cases.count_bytes(case, dtype)
    info: BenchmarkInfo = {
        "suite": "ops",
        "case": f"{case.name} batch {case.layers[0].N} {what}",
        "dtype": str(dtype).removeprefix("torch."),
        "flops": case.flops(what),
        "clock": "CUDA graph replay, L2 cold" if on_gpu else "wall clock, caches hot",
    }
    if counted is not None:
        info["bytes"] = counted[what]
    if what == "both" or case.op == "conv_bn_folded":
        info["peak_bytes"] = peak_bytes(call, DEVICE)
    return Prepared(sample, info)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("case", "what"), _params())
def bench_op(measure, case, what, provider):
    """One pass of an op: with statistics of the batch, or folded for inference."""
    measure(functools.partial(_prepare, case, what), "eager")
