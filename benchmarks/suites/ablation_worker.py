"""One configuration of the ladder in its own process, training on real batches of a loader.

`python -m benchmarks.suites.ablation_worker --configuration fast --rounds 4` answers a `Worker`.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import fastres
from benchmarks.harness import ablation
from benchmarks.harness.records import WorkerReady
from benchmarks.harness.worker_pool import serve, wait_for_start
from benchmarks.peers import common
from fastres.data.dataset import Dataset
from fastres.engine import machine

__all__ = ["main"]


def _batches(
    options: argparse.Namespace, data: Dataset, configuration: ablation.Configuration
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training batches for ever."""
    loader = configuration.runtime.loader if options.loader == "auto" else options.loader
    if loader == "none":
        yield from itertools.repeat(configuration.batch)
    if loader == "torchvision":
        yield from _torchvision_batches(options, configuration.runtime.device)
    served = fastres.make_loader(
        data,
        batch_size=options.batch_size,
        loader=loader,
        device=configuration.runtime.device,
    )
    while True:
        yield from served


def _torchvision_batches(
    options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of the peers: epochs of one round, so that none is prefetched for free."""
    num_samples = options.rounds * options.batch_size
    data = common.load_data(options.data_dir)
    served = common.make_train_loader(data.train, options.batch_size, options.workers, num_samples)
    while True:
        for images, labels in served:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _parse(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suites.ablation_worker", description=__doc__
    )
    parser.add_argument("--configuration", choices=ablation.CONFIGURATIONS, default="fast")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    loaders = ("auto", "none", "torchvision", "torch", "resident", "dali")
    parser.add_argument("--loader", choices=loaders, default="auto")
    parser.add_argument("--workers", type=int, default=2, help="of the loader torchvision")
    parser.add_argument("--data-dir", help="images; default: synthetic ones")
    parser.add_argument("--device", default=ablation.here().type)
    parser.add_argument("--rounds", type=int, default=1, help="serve rounds of so many steps")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Build the configuration and serve rounds."""
    options = _parse(argv)
    if options.configuration in ("fast", "fast_uncompiled"):
        machine.keep_freed_memory()
    device = torch.device(options.device)
    source = "auto" if options.data_dir else "synthetic"
    data = fastres.load_dataset(source, options.data_dir)
    classes = len(data.classes)
    wait_for_start()
    started = time.perf_counter()
    try:
        configuration = ablation.build(
            options.configuration, options.model, options.batch_size, device, classes
        )
    except ablation.Unavailable as error:
        print(error, file=sys.stderr)
        return 3
    build_seconds = time.perf_counter() - started
    batches = _batches(options, data, configuration)

    def train_round(steps: int) -> int:
        for images, labels in itertools.islice(batches, steps):
            configuration.train_on(images, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return steps * options.batch_size

    settings = {setting.name: setting.value for setting in configuration.runtime.settings}
    hello: WorkerReady = {
        "loss": configuration.loss,
        "data": data.name,
        "dtype": configuration.runtime.precision,
        "build_seconds": build_seconds,
        "choices": settings,
    }
    serve(train_round, hello)
    return 0


if __name__ == "__main__":
    sys.exit(main())
