"""Loaders alone: an epoch of augmented training batches, nobody training.

`pytest benchmarks/bench_loaders.py` measures on $FASTRES_DATA where that is set, otherwise on the
synthetic set (same image size, so the same work an image).
"""

import os

import pytest

import fastres
from fastres.data.loaders import LOADERS, dali_missing

BATCH_SIZE = 256


@pytest.fixture(scope="module")
def data():
    """The dataset to serve."""
    folder = os.environ.get("FASTRES_DATA")
    return fastres.load_dataset("auto" if folder else "synthetic", folder)


@pytest.mark.benchmark(group="loaders alone")
@pytest.mark.parametrize("provider", LOADERS)
def bench_epoch(benchmark, data, provider):
    """Serve one epoch; extra_info carries its images."""
    if provider == "dali" and dali_missing():
        pytest.skip(str(dali_missing()))
    loader = fastres.make_loader(data, batch_size=BATCH_SIZE, loader=provider)

    def epoch():
        images = 0
        for _, labels in loader:
            images += len(labels)
        return images

    images = benchmark.pedantic(epoch, rounds=7, warmup_rounds=1)
    loader.close()
    assert images == len(loader) * BATCH_SIZE
    benchmark.extra_info["images"] = images
