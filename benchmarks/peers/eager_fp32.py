"""Peer: the classic CIFAR loop. Eager, float32, NCHW, torchvision transforms, DataLoader, SGD."""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastres
from benchmarks.peers import common


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and print one JSON line."""
    options = common.parse(argv, "benchmarks.peers.eager_fp32", __doc__)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    data = common.load_data(options.data_dir, options.limit)
    model = fastres.create_model(options.model, data.num_classes, seed=options.seed).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)

    def step(images: Tensor, labels: Tensor) -> float:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return model(images.to(device)).argmax(1).cpu()

    return common.run(options, data, model, step, predict)


if __name__ == "__main__":
    sys.exit(main())
