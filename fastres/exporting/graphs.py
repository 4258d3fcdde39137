"""ONNX and torch.export: the deployed network written to a file, read back and run.

Both files take batches of any size, named `images`, and return `logits`.
"""

import contextlib
import importlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastres import strict_json
from fastres.errors import FailureError, UsageError

__all__ = [
    "RunFile",
    "check_onnx_packages",
    "open_onnx",
    "open_torch_export",
    "write_onnx",
    "write_torch_export",
]

# Maps images in 0..1, (N, 3, 32, 32) float32, to logits (N, classes).
RunFile = Callable[[np.ndarray], np.ndarray]
_OPSET = 18
# Exporters take sizes 0 and 1 of an example for constants.
_EXAMPLE_IMAGES = 2


def check_onnx_packages() -> None:
    """Look for what writing and running an ONNX file takes.

    Raises:
        UsageError: naming the first that is missing.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UsageError(f'--format onnx needs {name}: pip install "fastres[export]"') from None


def _example() -> tuple[torch.Tensor]:
    return (torch.rand(_EXAMPLE_IMAGES, 3, 32, 32),)


def _any_batch() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("batch", min=1)}}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the exporters tell of their progress and of their own deprecations."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def write_onnx(path: Path, model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Write `model` as ONNX with a dynamic batch.

    Args:
        path: of the file, weights inside.
        model: maps images in 0..1 to logits.
        meta: what the file says of itself, as JSON texts in `metadata_props`.
    """
    import onnx

    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            _example(),
            dynamo=True,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=_any_batch(),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {k: strict_json.dumps(v) for k, v in meta.items()})
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())


def open_onnx(path: Path, threads: int | None = None) -> RunFile:
    """Return what runs an ONNX file by onnxruntime, on the CPU.

    Args:
        path: of the file, which is not needed any more once this returns.
        threads: default: onnxruntime's choice.

    Raises:
        FailureError: where onnxruntime does not take the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime raises errors of its own
        raise FailureError(f"onnxruntime does not take {path}: {error}") from None
    return lambda images: session.run(["logits"], {"images": images})[0]


def write_torch_export(path: Path, model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Write `model` as a program of torch.export (.pt2) with a dynamic batch.

    Args: as of `write_onnx`; `meta` is in the file's extra files, under `fastres.json`.
    """
    with _quiet(), torch.no_grad():
        program = torch.export.export(model, _example(), dynamic_shapes=_any_batch())
        buffer = io.BytesIO()
        extra = {"fastres.json": strict_json.dumps(meta)}
        torch.export.save(program, buffer, extra_files=extra)
    path.write_bytes(buffer.getvalue())


def open_torch_export(path: Path) -> RunFile:
    """Return what runs a program of torch.export, on the CPU."""
    with _quiet():
        module = torch.export.load(path).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return run
