"""Label-smoothed cross-entropy with mean reduction: the loss and its gradient in one pass.

    z' = z - max z;  p = exp(z') / sum exp(z');  q = (1 - s) * onehot(label) + s / classes
    loss = mean over images of (log sum exp(z') - sum q * z');  dlogits = (p - q) / N

Letters: z the logits (N, classes), s the label smoothing, q the target distribution.

A program reads some rows of logits once and writes their gradient and their share of the mean. A
second kernel adds the shares; small heads fit one program and need none. Backward multiplies the
gradient by the incoming one, the loss scale of fp16 included, before it is rounded: the gradient is
kept in fp32, since unscaled it would underflow in fp16.

Numerics: fp32 whatever the logits' dtype, as `F.cross_entropy` under autocast. Subtracting the
largest logit first means that no exponential overflows and a common offset costs no digits.
Deterministic: shares are added in fixed order. NaN and inf come through as in torch. A label that
is no class makes the loss and its row of the gradient NaN, where torch stops the process's GPU with
an assertion; there is no ignore_index.
Source: Szegedy et al. 2016, section 7, https://arxiv.org/abs/1512.00567; own derivation.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.gpu.checks import check_vector, index_dtype
from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.primitives import round_to, wait_for_previous_kernel

__all__ = ["smooth_cross_entropy_bwd", "smooth_cross_entropy_fwd"]

# Elements of a tile of logits: 32 a thread of 8 warps, and a batch of 512 with ten classes.
TILE = 8192

# Shares of the loss that the adding program reads at a time; elements of a tile of the backward.
BLOCK = 1024


@triton.jit
def _smooth_cross_entropy_fwd_kernel(
    logits_ptr,  # (N, NUM_CLASSES) in
    labels_ptr,  # (N,) int64 in
    loss_ptr,  # (num_tiles,) fp32 out: the tile's share of the mean
    dlogits_ptr,  # (N, NUM_CLASSES) fp32 out
    num_images,
    on_label,  # 1 - s
    on_each,  # s / NUM_CLASSES
    NUM_CLASSES: tl.constexpr,
    SMOOTH: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    offs_n = tl.program_id(0).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < num_images
    mask_k = offs_k < NUM_CLASSES
    offs = offs_n[:, None] * NUM_CLASSES + offs_k[None, :]
    mask = mask_n[:, None] & mask_k[None, :]
    logits = tl.load(logits_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    logits = tl.where(mask_k[None, :], logits, float("-inf"))
    label = tl.load(labels_ptr + offs_n, mask=mask_n, other=0)
    is_class = (label >= 0) & (label < NUM_CLASSES)
    on_target = offs_k[None, :] == label[:, None]

    # A NaN may or may not be the largest; subtracted from anything it is NaN either way.
    shifted = logits - tl.max(logits, axis=1)[:, None]
    exponentials = tl.exp(shifted)
    total = tl.sum(exponentials, axis=1)
    loss = tl.log(total) - on_label * tl.sum(tl.where(on_target, shifted, 0.0), axis=1)
    grad = exponentials / total[:, None] - tl.where(on_target, on_label, 0.0)
    if SMOOTH:
        loss -= on_each * tl.sum(tl.where(mask_k[None, :], shifted, 0.0), axis=1)
        grad -= on_each
    loss = tl.where(is_class, loss, float("nan"))
    grad = tl.where(is_class[:, None], grad, float("nan"))
    share = tl.sum(tl.where(mask_n, loss, 0.0), axis=0) / num_images
    tl.store(loss_ptr + tl.program_id(0), share)
    tl.store(dlogits_ptr + offs, grad / num_images, mask=mask)


@triton.jit
def _add_shares_kernel(
    shares_ptr,  # (num_shares,) fp32 in
    loss_ptr,  # (1,) fp32 out
    num_shares,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, num_shares, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        sums += tl.load(shares_ptr + offs, mask=offs < num_shares, other=0.0)
    tl.store(loss_ptr, tl.sum(sums, axis=0))


def smooth_cross_entropy_fwd(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of logits against smoothed labels, and its gradient.

    Args:
        logits: (N, classes) contiguous; bf16, fp16, fp32.
        labels: (N,) int64 contiguous, 0 to classes - 1.
        label_smoothing: s, 0 to 1.

    Returns: loss: () fp32. dlogits: (N, classes) fp32, of the loss by the logits.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above.

    Numerics: fp32. A label out of range gives NaN. Deterministic.
    """
    _check_logits(logits, labels)
    n, num_classes = logits.shape
    block_k = max(16, triton.next_power_of_2(num_classes))
    block_n = min(max(1, TILE // block_k), triton.next_power_of_2(n))
    num_tiles = triton.cdiv(n, block_n)
    shares = logits.new_empty(num_tiles, dtype=torch.float32)
    dlogits = torch.empty_like(logits, dtype=torch.float32)
    launch(
        _smooth_cross_entropy_fwd_kernel,
        (num_tiles,),
        {
            "logits_ptr": logits,
            "labels_ptr": labels,
            "loss_ptr": shares,
            "dlogits_ptr": dlogits,
            "num_images": n,
            "on_label": 1.0 - label_smoothing,
            "on_each": label_smoothing / num_classes,
            "NUM_CLASSES": num_classes,
            "SMOOTH": label_smoothing > 0,
            "INDEX": index_dtype(logits),
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        num_warps=8,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(logits, labels),
            writes=num_bytes(shares, dlogits),
            flops=8 * logits.numel(),
        ),
    )
    if num_tiles == 1:
        return shares.view(()), dlogits
    loss = shares.new_empty(())
    launch(
        _add_shares_kernel,
        (1,),
        {"shares_ptr": shares, "loss_ptr": loss, "num_shares": num_tiles, "BLOCK": BLOCK},
        num_warps=4,
        num_stages=1,
        traffic=Traffic(reads=num_bytes(shares), writes=num_bytes(loss), flops=num_tiles),
        trips=triton.cdiv(num_tiles, BLOCK),
    )
    return loss, dlogits


def _check_logits(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Check the arguments of `smooth_cross_entropy_fwd`."""
    if logits.dim() != 2 or logits.numel() == 0:
        raise ValueError(f"logits must have shape (N, classes), got {list(logits.shape)}")
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"logits must be bfloat16, float16 or float32, got {logits.dtype}")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be ({logits.shape[0]},) int64, got {list(labels.shape)} {labels.dtype}"
        )
    for name, tensor in (("logits", logits), ("labels", labels)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


@triton.jit
def _smooth_cross_entropy_bwd_kernel(
    dloss_ptr,  # () fp32 in
    grad_ptr,  # (num_elements,) fp32 in: of the loss
    dlogits_ptr,  # (num_elements,) out
    num_elements,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    offs = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    dlogits = tl.load(grad_ptr + offs, mask=mask, other=0.0) * tl.load(dloss_ptr)
    tl.store(dlogits_ptr + offs, round_to(dlogits, dlogits_ptr.dtype.element_ty), mask=mask)


def smooth_cross_entropy_bwd(
    dloss: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`dlogits = dloss * grad`, rounded once to `dtype`.

    Args:
        dloss: () fp32, gradient of the loss.
        grad: (N, classes) fp32 contiguous, from the forward.
        dtype: of the logits.

    Returns: dlogits: (N, classes), dtype.

    Raises: ValueError: when a tensor's shape, dtype, device or layout is not as above.

    Numerics: fp32, one rounding. Deterministic.
    """
    check_vector("dloss", dloss, ())
    check_vector("grad", grad, tuple(grad.shape))
    dlogits = torch.empty_like(grad, dtype=dtype)
    launch(
        _smooth_cross_entropy_bwd_kernel,
        (triton.cdiv(grad.numel(), BLOCK),),
        {
            "dloss_ptr": dloss,
            "grad_ptr": grad,
            "dlogits_ptr": dlogits,
            "num_elements": grad.numel(),
            "INDEX": index_dtype(grad),
            "BLOCK": BLOCK,
        },
        num_warps=4,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(dloss, grad), writes=num_bytes(dlogits), flops=grad.numel()
        ),
    )
    return dlogits
