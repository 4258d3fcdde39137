"""Peer: airbench94 with Muon, a published speed record on CIFAR-10, in plain PyTorch.

94.01 % on average over 200 runs in 2.59 s on an A100, as published. A port from what is published,
in our own words: net, whitening and views are described in Jordan 2024, "94% on CIFAR-10 in 3.29
seconds on a single GPU" (https://arxiv.org/abs/2404.00498), Muon in Jordan et al. 2024
(https://kellerjordan.github.io/posts/muon/); numbers are those of airbench94_muon.py in
https://github.com/KellerJordan/cifar10-airbench at 096d14d, and so are the head's random start of
standard deviation 1 and its logits divided by the number of features.

In the order in which it happens:

    whiten    filters of the first layer: eigenvectors of the 2x2 patches of 5,000 training images,
              each over the root of its variance, and their negatives; only their bias is trained
    batches   normalised and padded once; shifted by up to 2 pixels; a random half mirrored in even
              epochs, the other half in odd ones
    net       no shortcut: 3 x (conv, 2x2 max, norm, GELU, conv, norm, GELU), then 3x3 max and head
    filters   Muon: the gradient with momentum, its singular values brought near 1, is the update of
              filters whose norm was set to the root of their number
    the rest  SGD on a sum of losses, the weight decay divided by the rate
    evaluate  the mean of 6 views: the image and two shifts of it by a pixel, all mirrored as well

Seconds are those of whitening, training and the evaluation; decoding and a warm-up on random labels
come before. On a GPU weights and activations are fp16 and the net is compiled, as published. On a
CPU weights are fp32 under bf16 autocast where the processor has bf16 instructions, else all is
fp32, and nothing is compiled.
"""

import argparse
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from benchmarks.harness.timing import Stopwatch
from fastres import host, strict_json
from fastres.cli import guarded
from fastres.data.augmentation import shared_tensor
from fastres.data.dataset import Dataset, ImageSet
from fastres.data.source import split_validation
from fastres.engine import machine
from fastres.errors import UsageError
from fastres.model.summary import summarize

__all__ = ["Airbench94Muon", "AirbenchNet", "Muon", "PeerRun", "main", "orthogonalize"]

EPOCHS, BATCH_SIZE = 8.0, 2000
WIDTHS = (64, 256, 256)
MUON_LR, MUON_MOMENTUM = 0.24, 0.6
BIAS_LR, HEAD_LR, SGD_MOMENTUM = 0.053, 0.67, 0.85
WEIGHT_DECAY = 2e-6  # of a sum of losses over one image
WHITEN_BIAS_EPOCHS = 3
LABEL_SMOOTHING = 0.2
SHIFT = 2
_WHITEN_IMAGES, _WHITEN_EPSILON = 5000, 5e-4
# One polynomial of odd degree, applied again and again, brings singular values of 0..1 near 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class PeerRun(TypedDict):
    """One run: accuracies in percent, of six views and of the plain image; seconds by part."""

    test_accuracy: float
    one_view_accuracy: float
    seconds: float
    train_seconds: float


class _Norm(nn.BatchNorm2d):
    """Batch norm with a bias alone, whose running statistics forget fast."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


class _Group(nn.Module):
    """Two convolutions, the map halved after the first."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm1 = _Norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _Norm(channels)
        for conv in (self.conv1, self.conv2):
            # The first filters begin by passing their inputs on.
            nn.init.dirac_(conv.weight.data[: conv.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class AirbenchNet(nn.Module):
    """Eight layers without a shortcut: whitening, three groups of two convolutions, the head."""

    def __init__(self, num_classes: int = 10, widths: Sequence[int] = WIDTHS):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        channels = (24, *widths)
        self.groups = nn.Sequential(*map(_Group, channels[:-1], channels[1:]))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.std())

    @torch.no_grad()
    def set_whitening(self, images: Tensor) -> None:
        """Set the first filters from (N, 3, H, W) normalised images."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).movedim(1, 3).reshape(-1, 12)
        variances, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (variances + _WHITEN_EPSILON).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor, train_whiten_bias: bool = True) -> Tensor:
        """(N, 3, 32, 32) images to (N, num_classes) logits."""
        bias = self.whiten.bias
        if bias is not None and not train_whiten_bias:
            bias = bias.detach()
        x = F.gelu(F.conv2d(x, self.whiten.weight, bias))
        x = F.max_pool2d(self.groups(x), 3).flatten(1)
        return self.head(x) / x.shape[1]


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 3) -> Tensor:
    """Return a matrix of the same singular vectors, its singular values brought near 1."""
    a, b, c = _QUINTIC
    x = matrix.to(dtype)
    x = x / (x.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


class Muon:
    """Momentum, orthogonalised, on filters that are kept at one norm.

    Args:
        filters: (K, C, R, S) each.
        dtype: to orthogonalise in.
        orthogonal: `orthogonalize`, perhaps compiled.
    """

    def __init__(
        self,
        filters: Sequence[nn.Parameter],
        dtype: torch.dtype,
        orthogonal: Callable[[Tensor, torch.dtype], Tensor],
    ):
        self.filters, self.dtype, self.orthogonal = filters, dtype, orthogonal
        self.momenta = [torch.zeros_like(weight) for weight in filters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every filter by `lr` along its orthogonalised gradient."""
        for weight, momentum in zip(self.filters, self.momenta, strict=True):
            assert weight.grad is not None
            momentum.mul_(MUON_MOMENTUM).add_(weight.grad)
            ahead = weight.grad.add(momentum, alpha=MUON_MOMENTUM)
            update = self.orthogonal(ahead.flatten(1), self.dtype).reshape(ahead.shape)
            weight.mul_(len(weight) ** 0.5 / weight.norm())
            weight.sub_(update.to(weight.dtype), alpha=lr)


def _reflected(images: Tensor, padding: int) -> Tensor:
    return F.pad(images, (padding,) * 4, mode="reflect")


class _Update:
    """Muon for the filters, SGD for the biases and the head.

    Args:
        net: on its device; its gradients are those of a sum of losses.
        batch_size: that many.
        dtype, orthogonal: of `Muon`.
    """

    def __init__(
        self,
        net: AirbenchNet,
        batch_size: int,
        dtype: torch.dtype,
        orthogonal: Callable[[Tensor, torch.dtype], Tensor],
    ):
        filters = [weight for weight in net.groups.parameters() if weight.ndim == 4]
        biases = [bias for bias in net.groups.parameters() if bias.ndim == 1 and bias.requires_grad]
        decay = WEIGHT_DECAY * batch_size
        groups = [
            {"params": params, "lr": lr, "weight_decay": decay / lr}
            for params, lr in (
                ([net.whiten.bias], BIAS_LR),
                (biases, BIAS_LR),
                ([net.head.weight], HEAD_LR),
            )
        ]
        self.muon = Muon(filters, dtype, orthogonal)
        self.sgd = torch.optim.SGD(groups, momentum=SGD_MOMENTUM, nesterov=True, fused=True)
        self.peaks = [group["lr"] for group in self.sgd.param_groups]

    def __call__(self, share: float, share_of_whitening: float) -> None:
        """Move all weights and forget the gradients.

        share: of every peak rate, and of that of the first layer's bias, which is skipped once it
        has no gradient.
        """
        shares = (share_of_whitening, share, share)
        for group, peak, factor in zip(self.sgd.param_groups, self.peaks, shares, strict=True):
            group["lr"] = peak * max(factor, 0.0)
        self.sgd.step()
        self.muon.step(MUON_LR * share)
        self.sgd.zero_grad(set_to_none=True)
        for weight in self.muon.filters:
            weight.grad = None


class _Batches:
    """The training set on its device, padded; every batch is one gather.

    Args:
        images: (N, 3, 32, 32) normalised.
        labels: (N,).
        batch_size: the last partial batch of an epoch is dropped.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int):
        self.labels, self.batch_size = labels, batch_size
        mirrored = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        padded = _reflected(images, SHIFT).permute(0, 2, 3, 1).contiguous()
        size, shifts = images.shape[2], 2 * SHIFT + 1
        n, row, column, channel = padded.stride()
        # Every crop of every image, (N, top, left, 32, 32, 3), as a view of the padded set.
        self.crops = padded.as_strided(
            (len(images), shifts, shifts, size, size, 3), (n, row, column, row, column, channel)
        )

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def serve(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ((B, 3, 32, 32) channels-last, (B,)) in random order."""
        count, device = len(self.labels), self.labels.device
        order = torch.randperm(count, device=device)
        top, left = torch.randint(2 * SHIFT + 1, (2, count), device=device)
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            rows = order[first : first + self.batch_size]
            images = self.crops[rows, top[rows], left[rows]].permute(0, 3, 1, 2)
            # All at once in every other epoch, so that each image is seen both ways in turn.
            yield (images.flip(3) if epoch % 2 else images), self.labels[rows]


class Airbench94Muon:
    """The recipe on one data set and device; every `run` starts from a seed.

    Args:
        data: decoded.
        device: where everything is kept and computed.
        epochs, batch_size: 8 and 2,000 as published.
        widths: of the three groups.
        dtype: of all weights, activations and updates instead of the device's; for checks.
        compiled: put torch.compile around the net and the orthogonalisation; None: on a GPU.

    Raises:
        UsageError: for a batch larger than the training set, or no epochs.
    """

    def __init__(
        self,
        data: Dataset,
        device: torch.device,
        *,
        epochs: float = EPOCHS,
        batch_size: int = BATCH_SIZE,
        widths: Sequence[int] = WIDTHS,
        dtype: torch.dtype | None = None,
        compiled: bool | None = None,
    ):
        if not 1 <= batch_size <= len(data.train):
            raise UsageError(f"--batch-size must be between 1 and {len(data.train)} here")
        if not epochs > 0:
            raise UsageError(f"--epochs must be more than 0, got {epochs:g}")
        self.data, self.device, self.widths = data, device, widths
        self.epochs, self.batch_size = epochs, batch_size
        on_cuda = device.type == "cuda"
        instructions = torch.bfloat16 if host.bf16_instructions() else torch.float32
        self.compute_dtype = dtype or (torch.float16 if on_cuda else instructions)
        self.weight_dtype = dtype or (torch.float16 if on_cuda else torch.float32)
        self.update_dtype = dtype or (torch.bfloat16 if on_cuda else instructions)
        self.net = AirbenchNet(len(data.classes), widths).to(device, self.weight_dtype)
        self.net.to(memory_format=torch.channels_last)
        if self.weight_dtype == torch.float16:
            for module in self.net.modules():
                if isinstance(module, _Norm):
                    module.float()
        self._forward: Callable[..., Tensor] = self.net
        self._orthogonal: Callable[[Tensor, torch.dtype], Tensor] = orthogonalize
        if compiled if compiled is not None else on_cuda and machine.cxx_compiler() is not None:
            self._forward = torch.compile(self.net, mode="max-autotune" if on_cuda else "default")
            self._orthogonal = torch.compile(orthogonalize)
        self._train_images, self._train_labels = self._upload(data.train)
        self._test_images, self._test_labels = self._upload(data.test)

    def _upload(self, images: ImageSet) -> tuple[Tensor, Tensor]:
        pair = (shared_tensor(array) for array in (images.images, images.labels))
        pixels, labels = (tensor.to(self.device) for tensor in pair)
        return pixels, labels

    @property
    def precision(self) -> str:
        """Return what activations are computed in: fp16, bf16 or fp32."""
        return {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(self.compute_dtype, "fp32")

    @property
    def training_flops(self) -> int:
        """Return the operations of a training step an image, counted as fastres counts its own."""
        return summarize(self.net).training_flops

    @property
    def steps_per_epoch(self) -> int:
        """Return the whole batches of the training set."""
        return len(self.data.train) // self.batch_size

    @property
    def total_steps(self) -> int:
        """Return the steps of a run."""
        return math.ceil(self.epochs * self.steps_per_epoch)

    def warm_up(self) -> None:
        """Train on random labels and evaluate: all of it on a GPU, else a step of each kind."""
        self._reset(0)
        labels = torch.randint_like(self._train_labels, len(self.data.classes))
        if self.device.type == "cuda":
            self._train(labels, self.total_steps, self._whiten_bias_steps)
            self._evaluate(self._test_images)
        else:
            self._train(labels, 2, 1)
            self._evaluate(self._test_images[: self.batch_size])

    def run(self, seed: int) -> PeerRun:
        """Whiten, train and evaluate from `seed`."""
        self._reset(seed)
        watch = Stopwatch(self.device)
        watch.mark()
        self._train(self._train_labels, self.total_steps, self._whiten_bias_steps)
        watch.mark()
        views, plain = self._evaluate(self._test_images)
        watch.mark()
        train_seconds, evaluation_seconds = watch.seconds()
        return {
            "test_accuracy": self._accuracy(views),
            "one_view_accuracy": self._accuracy(plain),
            "seconds": train_seconds + evaluation_seconds,
            "train_seconds": train_seconds,
        }

    @property
    def _whiten_bias_steps(self) -> int:
        return math.ceil(WHITEN_BIAS_EPOCHS * self.steps_per_epoch)

    def _reset(self, seed: int) -> None:
        """Put a random start into the net, in place, and seed what follows."""
        torch.manual_seed(seed)
        start = AirbenchNet(len(self.data.classes), self.widths)
        self.net.load_state_dict(start.state_dict())

    def _normalized(self, pixels: Tensor) -> Tensor:
        """(N, 32, 32, 3) uint8 to (N, 3, 32, 32) channels-last in the dtype of activations."""
        dtype = torch.promote_types(self.compute_dtype, torch.float32)
        mean, std = (
            torch.tensor(values, dtype=dtype, device=self.device).mul_(255)
            for values in (self.data.mean, self.data.std)
        )
        return pixels.to(dtype).sub_(mean).div_(std).to(self.compute_dtype).permute(0, 3, 1, 2)

    def _autocast(self) -> torch.autocast:
        mixed = self.compute_dtype != self.weight_dtype
        dtype = self.compute_dtype if mixed else None
        return torch.autocast(self.device.type, dtype=dtype, enabled=mixed)

    def _train(self, labels: Tensor, total_steps: int, whiten_bias_steps: int) -> None:
        """Whiten and take all steps from the net's present weights."""
        net = self.net.train()
        images = self._normalized(self._train_images)
        # Spread over the set, which may be sorted by class.
        net.set_whitening(images[:: max(1, len(images) // _WHITEN_IMAGES)])
        batches = _Batches(images, labels, self.batch_size)
        del images
        update = _Update(net, self.batch_size, self.update_dtype, self._orthogonal)
        step = 0
        for epoch in range(math.ceil(total_steps / len(batches))):
            for inputs, targets in itertools.islice(batches.serve(epoch), total_steps - step):
                with self._autocast():
                    logits = self._forward(inputs, step < whiten_bias_steps)
                    loss = F.cross_entropy(
                        logits, targets, label_smoothing=LABEL_SMOOTHING, reduction="sum"
                    )
                loss.backward()
                update(1 - step / total_steps, 1 - step / whiten_bias_steps)
                step += 1

    @torch.no_grad()
    def _evaluate(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, classes) logits of six views together, and of the plain images."""
        self.net.eval()
        views, plain = [], []
        for images in self._normalized(pixels).split(BATCH_SIZE):
            size, around = images.shape[2], _reflected(images, 1)
            own, mirrored = self._logits(images), self._logits(images.flip(3))
            shifted = torch.zeros_like(own)
            for corner in (0, 2):
                moved = around[:, :, corner : corner + size, corner : corner + size]
                shifted += self._logits(moved) + self._logits(moved.flip(3))
            views.append((own + mirrored) / 4 + shifted / 8)
            plain.append(own)
        return torch.cat(views), torch.cat(plain)

    def _logits(self, images: Tensor) -> Tensor:
        with self._autocast():
            logits = self._forward(images.contiguous(memory_format=torch.channels_last))
        # A copy in any dtype, since a captured net returns the same memory every time.
        return logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)

    def _accuracy(self, logits: Tensor) -> float:
        return 100 * (logits.argmax(1) == self._test_labels).double().mean().item()


def _data(data_dir: str | None, limit: int | None) -> Dataset:
    data = fastres.load_dataset("auto" if data_dir else "synthetic", data_dir)
    if limit is None or limit >= len(data.train):
        return data
    return dataclasses.replace(data, train=split_validation(data.train, limit, 0)[1])


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.airbench94_muon",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", default=os.environ.get("FASTRES_DATA"), help="images; default: synthetic")
    add("--seed", type=int, default=0)
    add("--epochs", type=float, default=EPOCHS)
    add("--batch-size", type=int, default=BATCH_SIZE)
    add("--limit", type=int, help="use only so many training images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=host.usable_cores(), help="on a CPU; default: all cores")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="auto: on a GPU")
    return parser.parse_args(argv)


def _main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    machine.keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    peer = Airbench94Muon(
        _data(options.data_dir, options.limit),
        torch.device(options.device),
        epochs=options.epochs,
        batch_size=options.batch_size,
        compiled={"auto": None, "on": True, "off": False}[options.compile],
    )
    peer.warm_up()
    run = peer.run(options.seed)
    images = peer.total_steps * peer.batch_size
    result = {
        **run,
        "images_per_second": round(images / run["seconds"], 1),
        "gflop_per_image": round(peer.training_flops / 1e9, 4),
        "epochs": peer.epochs,
        "batch_size": peer.batch_size,
        "seed": options.seed,
        "data": peer.data.name,
        "train_images": len(peer.data.train),
        "precision": peer.precision,
        "threads": options.threads,
        **host.provenance(["python", "-m", "benchmarks.peers.airbench94_muon", *argv]),
    }
    print(strict_json.dumps(result))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and print one JSON line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _main(arguments), debug=False)


if __name__ == "__main__":
    sys.exit(main())
