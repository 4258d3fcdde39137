"""Peer: the one-file torch.compile trainer: channels_last, bfloat16 autocast, compiled network."""

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastres
from benchmarks.peers import common


def _add_mode(parser: argparse.ArgumentParser) -> None:
    modes = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    parser.add_argument("--mode", choices=modes, default="default", help="of torch.compile")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and print one JSON line."""
    options = common.parse(argv, "benchmarks.peers.compiled", __doc__, _add_mode)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    data = common.load_data(options.data_dir, options.limit)
    model = fastres.create_model(options.model, data.num_classes, seed=options.seed)
    model = model.to(device).to(memory_format=torch.channels_last)
    network = torch.compile(model, mode=options.mode)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4, fused=True
    )

    def move(images: Tensor) -> Tensor:
        return images.to(device, non_blocking=True, memory_format=torch.channels_last)

    def step(images: Tensor, labels: Tensor) -> float:
        labels = labels.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(network(move(images)), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return model(move(images)).argmax(1).cpu()

    return common.run(options, data, model, step, predict, "bf16")


if __name__ == "__main__":
    sys.exit(main())
