"""SGD with momentum for all parameters of a network in one launch, low-precision copies included.

    g = grad / grad_scale + weight_decay * p
    buffer = momentum * buffer + g
    p = p - lr * (g + momentum * buffer)      Nesterov; else p - lr * buffer, or p - lr * g
    copy = p rounded to bf16 or fp16          for filters that the next step reads so

A network has dozens of parameters, most of them with 16 to 64 elements, and a launch takes longer
than moving one. So a table on the device holds the addresses of all, and a program takes one chunk
of one parameter. Gradients may lie elsewhere in every step; then the table is copied again, which
in a CUDA graph is a memcpy of its own.

Bytes: parameter and buffer read and written, gradient read, copy written: 20 an fp32 element, or 22
with a copy.

Numerics: fp32 in the order of torch.optim.SGD, with which it agrees to rounding; copies are rounded
once, to nearest even. Nothing is written where found_inf is not 0. Deterministic.
Source: torch.optim.SGD; Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.primitives import round_to, wait_for_previous_kernel

__all__ = ["SGDTensors", "SGDUpdate"]

# Elements of a program: two loads of 16 bytes a thread and operand.
BLOCK = 1024

# Numbers that the table holds of a parameter: see `_sgd_kernel`.
NUM_FIELDS = 7

_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _update(
    p_ptr,  # fp32 in and out, as is buffer_ptr
    g_ptr,  # fp32 in
    buffer_ptr,
    copy_ptr,  # COPY_DTYPE out, where has_copy
    has_copy,
    offs,  # [BLOCK]
    mask,
    lr,
    grad_scale,  # None: gradients are not scaled
    weight_decay,
    momentum,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
):
    """One chunk of one parameter; without a mask the loads are wide."""
    p = tl.load(p_ptr + offs, mask=mask)
    g = tl.load(g_ptr + offs, mask=mask)
    if grad_scale is not None:
        g = tl.div_rn(g, grad_scale)
    # 0 times an infinity is a NaN, and a parameter that does not decay adds nothing.
    g = tl.where(weight_decay != 0.0, g + weight_decay * p, g)
    if HAS_MOMENTUM:
        buffer = momentum * tl.load(buffer_ptr + offs, mask=mask) + g
        tl.store(buffer_ptr + offs, buffer, mask=mask)
        g = g + momentum * buffer if NESTEROV else buffer
    p = p - lr * g
    tl.store(p_ptr + offs, p, mask=mask)
    if COPY_DTYPE is not None:  # noqa: SIM102 - known to the compiler, and known to a program
        if has_copy:
            tl.store(copy_ptr + offs, round_to(p, COPY_DTYPE), mask=mask)


@triton.jit
def _sgd_kernel(
    table_ptr,  # (num_params, 7) int64 in: addresses of parameter, gradient, buffer and copy (0:
    #             there is none), of the () fp32 rate, number of elements, bits of the fp32 decay
    chunks_ptr,  # (num_chunks, 2) int64 in: row of the table, first element
    grad_scale_ptr,  # () fp32 in: gradients are multiplied by it; None: they are not
    found_inf_ptr,  # () fp32 in: not 0 leaves everything as it is; None: nobody looked
    momentum,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    COPY_DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes, of every address
    NUM_FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    chunk_ptr = chunks_ptr + 2 * tl.program_id(0)
    row_ptr = table_ptr + NUM_FIELDS * tl.load(chunk_ptr)
    start = tl.load(chunk_ptr + 1)
    g_address = tl.load(row_ptr + 1)
    copy_address = tl.load(row_ptr + 3)
    lr = tl.load(tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32)))
    num_elements = tl.load(row_ptr + 5)
    weight_decay = tl.load(row_ptr + 6).to(tl.int32).to(tl.float32, bitcast=True)
    p_ptr = tl.multiple_of(tl.load(row_ptr).to(tl.pointer_type(tl.float32)), ALIGNMENT)
    g_ptr = tl.multiple_of(g_address.to(tl.pointer_type(tl.float32)), ALIGNMENT)
    buffer_ptr = tl.multiple_of(tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32)), ALIGNMENT)
    copy_ptr = None
    if COPY_DTYPE is not None:
        copy_ptr = tl.multiple_of(copy_address.to(tl.pointer_type(COPY_DTYPE)), ALIGNMENT)
    grad_scale = None
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr)
    moves = g_address != 0
    if found_inf_ptr is not None:
        moves = moves & (tl.load(found_inf_ptr) == 0.0)

    offs = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    has_copy = copy_address != 0
    if moves:
        if start + BLOCK <= num_elements:
            _update(
                p_ptr, g_ptr, buffer_ptr, copy_ptr, has_copy, offs, None, lr, grad_scale,
                weight_decay, momentum, HAS_MOMENTUM, NESTEROV, COPY_DTYPE,
            )  # fmt: skip
        else:
            _update(
                p_ptr, g_ptr, buffer_ptr, copy_ptr, has_copy, offs, offs < num_elements, lr,
                grad_scale, weight_decay, momentum, HAS_MOMENTUM, NESTEROV, COPY_DTYPE,
            )  # fmt: skip


class SGDTensors(NamedTuple):
    """One parameter and what its update takes.

    param: any shape, fp32, in any dense layout. grad: of its shape; None leaves all as it is.
    momentum_buffer: its shape and strides, fp32; None without momentum. copy: its shape and
    strides, bf16 or fp16, is given the new parameter; or None. lr: () fp32 on the device, read when
    the kernel runs. weight_decay: of this parameter.
    """

    param: torch.Tensor
    grad: torch.Tensor | None
    momentum_buffer: torch.Tensor | None
    copy: torch.Tensor | None
    lr: torch.Tensor
    weight_decay: float


class SGDUpdate:
    """The update of one set of parameters, again and again.

    Args:
        params: fp32 and dense, on one device; what moves them keeps their number and sizes.

    Raises:
        ValueError: when a parameter is of another dtype, or not dense.
    """

    def __init__(self, params: Sequence[torch.Tensor]):
        for param in params:
            _check_dense("a parameter", param, torch.float32, param)
        chunks = [
            (row, start)
            for row, param in enumerate(params)
            for start in range(0, param.numel(), BLOCK)
        ]
        device = params[0].device
        self._sizes = [param.numel() for param in params]
        self._chunks = torch.tensor(chunks, dtype=torch.int64, device=device)
        self._table = _DeviceTable((len(params), NUM_FIELDS), device)

    def __call__(
        self,
        tensors: Sequence[SGDTensors],
        *,
        momentum: float,
        nesterov: bool,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ) -> None:
        """Move all parameters, their buffers and copies in place.

        Args:
            tensors: of every parameter, in the order of the constructor's.
            momentum: share of the buffer that stays; with 0 there are no buffers.
            nesterov: see the formulas above.
            grad_scale: () fp32 by which the gradients were multiplied, or None.
            found_inf: () fp32, not 0 where a gradient is not finite; then nothing moves.

        Raises:
            ValueError: when a buffer or a copy is not as `SGDTensors` says, or a parameter has
                another size than it had.
            RuntimeError: when a CUDA graph is captured before any step was taken.
        """
        if [t.param.numel() for t in tensors] != self._sizes:
            raise ValueError("parameters must keep the sizes that the update was made for")
        # Those brought into another layout or dtype live here until the kernel is queued.
        grads = [None if t.grad is None else _like_param(t.grad, t.param) for t in tensors]
        rows = [_row(t, grad) for t, grad in zip(tensors, grads, strict=True)]
        copies = {t.copy.dtype for t in tensors if t.copy is not None}
        if len(copies) > 1:
            raise ValueError(f"all copies must have one dtype, got {sorted(map(str, copies))}")
        is_aligned = all(address % 16 == 0 for row in rows for address in row[:4])
        args = {
            "table_ptr": self._table.hold(rows),
            "chunks_ptr": self._chunks,
            "grad_scale_ptr": grad_scale,
            "found_inf_ptr": found_inf,
            "momentum": momentum,
            "HAS_MOMENTUM": momentum != 0,
            "NESTEROV": nesterov,
            "COPY_DTYPE": _TRITON_DTYPES[copies.pop()] if copies else None,
            "ALIGNMENT": 16 if is_aligned else 4,
            "NUM_FIELDS": NUM_FIELDS,
            "BLOCK": BLOCK,
        }
        moved = [t for t in tensors if t.grad is not None]
        kept = sum(num_bytes(t.param, t.momentum_buffer) for t in moved)
        launch(
            _sgd_kernel,
            (len(self._chunks),),
            args,
            num_warps=4,
            num_stages=1,
            traffic=Traffic(
                reads=kept + num_bytes(*(t.grad for t in moved)),
                writes=kept + num_bytes(*(t.copy for t in moved)),
                flops=7 * sum(t.param.numel() for t in moved),
            ),
        )


def _check_dense(name: str, t: torch.Tensor, dtype: torch.dtype, like: torch.Tensor) -> None:
    """Demand dtype, and the strides that a dense tensor like `like` has.

    Raises: ValueError: when it has others.
    """
    wanted = torch.empty_like(like, device="meta").stride()
    if t.dtype != dtype or t.shape != like.shape or t.stride() != wanted:
        raise ValueError(
            f"{name} must be {dtype} {tuple(like.shape)} with the strides {wanted} of a dense "
            f"tensor, got {t.dtype} {tuple(t.shape)} with {t.stride()}"
        )


def _like_param(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return a gradient in dtype and memory order of its parameter."""
    if grad.dtype == param.dtype and grad.stride() == param.stride():
        return grad
    return torch.empty_like(param).copy_(grad)


def _row(t: SGDTensors, grad: torch.Tensor | None) -> list[int]:
    """What the table holds of a parameter."""
    for name, other in (("momentum_buffer", t.momentum_buffer), ("copy", t.copy)):
        if other is not None and other.stride() != t.param.stride():
            raise ValueError(
                f"{name} must have the strides {t.param.stride()} of its parameter, "
                f"got {other.stride()}"
            )
    addresses = [
        0 if other is None else other.data_ptr()
        for other in (t.param, grad, t.momentum_buffer, t.copy, t.lr)
    ]
    (decay_bits,) = struct.unpack("<i", struct.pack("<f", t.weight_decay))
    return [*addresses, t.param.numel(), decay_bits]


class _DeviceTable:
    """A table of int64 that the host fills and kernels read.

    On CUDA it is copied from pinned memory, so that the host waits for nothing. In a CUDA graph the
    copy is a node which reads that memory in every replay: a capture has its own, which stays.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device):
        self._shape = shape
        self._on_device = torch.empty(shape, dtype=torch.int64, device=device)
        self._held: list[list[int]] | None = None
        # Neither kind of memory may be allocated in a capture, so one pair is kept ready.
        self._for_capture: tuple[torch.Tensor, torch.Tensor] | None = None
        self._captured: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hold(self, rows: list[list[int]]) -> torch.Tensor:
        """Return the table on the device with these rows in it.

        Raises: RuntimeError: when a graph is captured before anything was held outside of one.
        """
        if self._on_device.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._hold_in_graph(rows)
        if self._on_device.is_cuda and self._for_capture is None:
            pinned = torch.empty(self._shape, dtype=torch.int64, pin_memory=True)
            self._for_capture = (pinned, torch.empty_like(self._on_device))
        if rows != self._held:
            # A new tensor each time: a copy from the last one may still be under way.
            host = torch.tensor(rows, dtype=torch.int64, pin_memory=self._on_device.is_cuda)
            self._on_device.copy_(host, non_blocking=True)
            self._held = rows
        return self._on_device

    def _hold_in_graph(self, rows: list[list[int]]) -> torch.Tensor:
        if self._for_capture is None:
            raise RuntimeError("take a step of SGD before a CUDA graph of one is captured")
        host, on_device = self._for_capture
        self._captured.append(self._for_capture)
        self._for_capture = None
        host.copy_(torch.tensor(rows, dtype=torch.int64))
        on_device.copy_(host, non_blocking=True)
        return on_device
