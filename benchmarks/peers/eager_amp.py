"""Peer: the classic CIFAR loop with AMP: float16 with loss scaling on a GPU, bfloat16 on a CPU."""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastres
from benchmarks.peers import common


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and print one JSON line."""
    options = common.parse(argv, "benchmarks.peers.eager_amp", __doc__)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    data = common.load_data(options.data_dir, options.limit)
    model = fastres.create_model(options.model, data.num_classes, seed=options.seed).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(images: Tensor, labels: Tensor) -> float:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype):
            return model(images.to(device)).argmax(1).cpu()

    precision = "fp16" if dtype == torch.float16 else "bf16"
    return common.run(options, data, model, step, predict, precision)


if __name__ == "__main__":
    sys.exit(main())
