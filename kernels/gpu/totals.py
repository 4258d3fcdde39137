"""What a training step adds to the sums of its epoch, in one launch.

    totals += (N * loss, rows whose largest logit is the label's, N, whether loss is not finite)

Letters: logits (N, classes), labels (N,), loss the mean over the batch.

Bytes: logits and labels read once. One program: a batch has thousands of logits.

Numerics: the loss is widened to fp64 before it is multiplied; counts are exact. Where logits are
equal the first counts, and a NaN is larger than all else, as in torch.argmax. Deterministic.
Source: own derivation.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.gpu.checks import check_vector, index_dtype
from fastres.kernels.gpu.launch import Traffic, launch, num_bytes
from fastres.kernels.gpu.primitives import wait_for_previous_kernel

__all__ = ["add_to_totals"]

# Elements of a tile of logits.
TILE = 8192


@triton.jit
def _first(found, offs_k, BLOCK_K: tl.constexpr):
    """First column [rows] where `found` [rows, BLOCK_K] is true; BLOCK_K where there is none."""
    return tl.min(tl.where(found, offs_k[None, :], BLOCK_K), axis=1)


@triton.jit
def _add_to_totals_kernel(
    totals_ptr,  # (4,) fp64 in and out: loss, right answers, images, batches without finite loss
    loss_ptr,  # () fp32 in
    logits_ptr,  # (N, NUM_CLASSES) in
    labels_ptr,  # (N,) int64 in
    num_images,
    NUM_CLASSES: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous_kernel(PDL)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < NUM_CLASSES
    right = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for first in range(0, num_images, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N).to(INDEX)
        mask_n = offs_n < num_images
        logits = tl.load(
            logits_ptr + offs_n[:, None] * NUM_CLASSES + offs_k[None, :],
            mask=mask_n[:, None] & mask_k[None, :],
            other=float("-inf"),
        ).to(tl.float32)  # [BLOCK_N, BLOCK_K]
        label = tl.load(labels_ptr + offs_n, mask=mask_n, other=-1)
        is_nan = logits != logits
        first_nan = _first(is_nan, offs_k, BLOCK_K)
        numbers = tl.where(is_nan, float("-inf"), logits)
        first_largest = _first(numbers == tl.max(numbers, axis=1)[:, None], offs_k, BLOCK_K)
        answer = tl.where(first_nan < BLOCK_K, first_nan, first_largest)
        right += (answer == label).to(tl.int32)

    loss = tl.load(loss_ptr)
    is_lost = (loss != loss) | (tl.abs(loss) == float("inf"))
    tl.store(totals_ptr, tl.load(totals_ptr) + loss.to(tl.float64) * num_images)
    num_right = tl.sum(right, axis=0).to(tl.float64)
    tl.store(totals_ptr + 1, tl.load(totals_ptr + 1) + num_right)
    tl.store(totals_ptr + 2, tl.load(totals_ptr + 2) + num_images)
    tl.store(totals_ptr + 3, tl.load(totals_ptr + 3) + is_lost.to(tl.float64))


def add_to_totals(
    totals: torch.Tensor, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor
) -> None:
    """Add a batch to the sums of an epoch, in place.

    Args:
        totals: (4,) fp64: sum of losses, number of right answers, of images, and of batches whose
            loss is not finite.
        loss: () fp32, mean over the batch.
        logits: (N, classes) contiguous; bf16, fp16, fp32.
        labels: (N,) int64 contiguous.

    Raises: ValueError: when a tensor's shape, dtype or layout is not as above.

    Numerics: exact counts, fp64 sums. Deterministic.
    """
    if tuple(totals.shape) != (4,) or totals.dtype != torch.float64 or not totals.is_contiguous():
        raise ValueError(f"totals must be (4,) float64, got {tuple(totals.shape)} {totals.dtype}")
    check_vector("loss", loss, ())
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(
            f"logits must be (N, classes) and contiguous, got {tuple(logits.shape)} with strides "
            f"{logits.stride()}"
        )
    n, num_classes = logits.shape
    if labels.shape != (n,) or labels.dtype != torch.int64 or not labels.is_contiguous():
        raise ValueError(
            f"labels must be ({n},) int64 and contiguous, got {tuple(labels.shape)} {labels.dtype}"
        )
    block_k = max(16, triton.next_power_of_2(num_classes))
    block_n = min(max(1, TILE // block_k), triton.next_power_of_2(n))
    launch(
        _add_to_totals_kernel,
        (1,),
        {
            "totals_ptr": totals,
            "loss_ptr": loss,
            "logits_ptr": logits,
            "labels_ptr": labels,
            "num_images": n,
            "NUM_CLASSES": num_classes,
            "INDEX": index_dtype(logits),
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        num_warps=8,
        num_stages=1,
        traffic=Traffic(
            reads=num_bytes(totals, loss, logits, labels),
            writes=num_bytes(totals),
            flops=3 * logits.numel(),
        ),
    )
