"""State_dicts out of what people save, without running a pickle's code, and back into it."""

import argparse
import io
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fastres.conversion.sources import Source
from fastres.data.files import read_bytes
from fastres.engine.checkpoint import first_nonfinite, replace_file
from fastres.errors import FailureError
from fastres.inference.hub_files import read_plain_weights

__all__ = ["read_state_dict", "write_state_dict"]

# Where savers put the weights beside other things, and how deep: a stranger's dict may hold itself.
_WRAPPERS = ("state_dict", "net", "model", "model_state_dict")
_AVERAGES = ("state_dict_ema", "model_ema")
_DEEPEST = 4
# What DataParallel, torch.compile and Lightning put before every key.
_PREFIXES = ("module.", "_orig_mod.", "model.")
# `torch.save` writes a zip file; before torch 1.6 it wrote pickles.
_FIRST_BYTES = (b"PK\x03\x04", b"\x80")
_SHOWN_BYTES = 24


def read_state_dict(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Return the weights in a .safetensors file or in any file of `torch.save`.

    Wrappers around the state_dict are taken off, and so are the prefixes that all of its keys
    share. Floating-point tensors are returned in float32.

    Args:
        path: the file.
        ema: take the averaged weights that timm saves beside the others.

    Raises:
        FailureError: when the file cannot be read, holds what could only be loaded by running code
            of it, or no state_dict, or a number in that is not finite.
    """
    if path.suffix == ".safetensors":
        found: Any = read_plain_weights(path)
    else:
        found = _torch_load(path)
    state = _unwrapped(found, path, ema=ema)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    if name := first_nonfinite(state):
        raise FailureError(f"{path}: {name} is not finite")
    return state


def _torch_load(path: Path) -> Any:
    try:
        content = read_bytes(path)
    except OSError as error:
        raise FailureError(f"cannot read {path}: {error.strerror or error}") from None
    if not content.startswith(_FIRST_BYTES):
        start = f"it starts with {repr(content[:_SHOWN_BYTES])[1:]}" if content else "it is empty"
        raise FailureError(f"{path} is no file of torch.save: {start}")
    try:
        # timm's training checkpoints hold their options in a Namespace, which is only a record.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (wanted := re.search(r"GLOBAL (\S+)", str(error))) is None:
            raise FailureError(
                f"{path} is damaged, or a pickle that torch.save did not write"
            ) from None
        raise FailureError(
            f"{path} holds more than tensors, numbers and text: to load its {wanted[1]} could run "
            "code of its author"
        ) from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly everything
        reason = re.split(r"\. |\n", str(error), maxsplit=1)[0] or "it ends too early"
        raise FailureError(
            f"{path} is damaged, or no file of torch.save with weights: {reason}"
        ) from None


def _inner(found: Any, names: Sequence[str]) -> Any:
    """Return the first mapping that stands under one of `names`, or None."""
    if not isinstance(found, Mapping):
        return None
    return next((found[n] for n in names if isinstance(found.get(n), Mapping)), None)


def _unwrapped(found: Any, path: Path, *, ema: bool) -> dict[str, Tensor]:
    if ema and (found := _inner(found, _AVERAGES)) is None:
        raise FailureError(f"{path} holds no averaged weights ({', '.join(_AVERAGES)})")
    for _ in range(_DEEPEST):
        found = found if (inner := _inner(found, _WRAPPERS)) is None else inner
    if not isinstance(found, Mapping) or not found:
        raise FailureError(f"{path} holds no state_dict")
    if odd := [k for k, v in found.items() if not isinstance(k, str) or not _holds_numbers(v)]:
        raise FailureError(
            f"{path} holds no state_dict: {str(odd[0])[:60]!r} is no plain tensor; looked for one "
            f"under {', '.join(_WRAPPERS)}"
        )
    return {key: value.detach() for key, value in found.items()}


def _holds_numbers(value: Any) -> bool:
    """Tell a dense tensor from sparse, quantised and meta ones, which files may hold too."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not value.is_quantized
    )


def write_state_dict(path: Path, state: Mapping[str, Tensor], source: Source) -> None:
    """Write weights as the project's own scripts load them, in one step.

    Args:
        path: .safetensors for the bare state_dict in that format; else a file of `torch.save`.
        state: under the project's names, without its prefix.
        source: the project.

    Raises:
        FailureError: when the file cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        replace_file(path, save_safetensors(stored, metadata={"format": "pt"}))
        return
    named = {source.prefix + name: tensor for name, tensor in stored.items()}
    whole = named if source.wrapped_as is None else {source.wrapped_as: named, **source.extras}
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    replace_file(path, buffer.getvalue())
