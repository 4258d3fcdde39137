"""int8 by onnxruntime: filters and activations in 8 bits, scales from real images."""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastres.exporting.graphs import RunFile

__all__ = ["Compared", "compare", "quantize_onnx"]

_BATCH = 100
_ROUNDS = 5


def quantize_onnx(source: Path, target: Path, images: np.ndarray) -> None:
    """Write `target`, the ONNX file `source` in int8.

    Convolutions, the classifier and what stands between them compute between QuantizeLinear and
    DequantizeLinear, filters with a scale a channel, activations with one a tensor, from their
    range over `images`
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).

    Args:
        source: written by `write_onnx`.
        target: the file to write.
        images: (N, 3, 32, 32) float32 in 0..1, of the training set.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(_batches(images))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory() as folder:
        prepared = os.path.join(folder, "prepared.onnx")
        # Symbolic shapes are for transformers; those of ONNX know every rank of these networks.
        quant_pre_process(os.fspath(source), prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            os.fspath(target),
            Batches(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Filters of 7 bits: on a processor without VNNI, which may be that of whoever runs the
            # file, sums of two products of full bytes saturate.
            reduce_range=True,
        )


def _batches(images: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH]


@dataclass(frozen=True)
class Compared:
    """What one file did on labelled images: percent right, images a second (median)."""

    accuracy: float
    images_per_second: float


def compare(
    files: dict[str, RunFile], images: np.ndarray, labels: np.ndarray
) -> dict[str, Compared]:
    """Run files in turns over the same images, and return what each of them did.

    Args:
        files: by name.
        images: (N, 3, 32, 32) float32 in 0..1.
        labels: (N,) int64.
    """
    right = dict.fromkeys(files, 0)
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for round_number in range(_ROUNDS + 1):
        for name, run in files.items():
            started = time.perf_counter()
            said = [run(batch).argmax(axis=1) for batch in _batches(images)]
            if round_number:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
            else:
                right[name] = int((np.concatenate(said) == labels).sum())
    return {
        name: Compared(
            100 * right[name] / len(images), len(images) / float(np.median(seconds[name]))
        )
        for name in files
    }
