"""Checkpoints: one safetensors file, written atomically, verified when read, never a pickle.

A training checkpoint holds everything that a resumed run needs. Its tensors are named
`model.<key>`, `average.<key>` and `optimizer.<parameter>.<entry>`; all else is JSON in the header.
A weights file holds the plain `state_dict`, as anyone's safetensors reader expects it. Tensors are
stored in NCHW order, and no file tells which route trained it.

A SHA-256 over the JSON and all tensors is part of the header: a file that was cut off or changed in
a single byte is refused. Numbers are finite: a NaN or an infinity is neither written nor read.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from fastres import strict_json
from fastres.data.files import read_bytes
from fastres.errors import FailureError

__all__ = [
    "FORMAT",
    "Snapshot",
    "check_tensors",
    "first_nonfinite",
    "load_weights",
    "read",
    "replace_file",
    "snapshot",
    "take_section",
    "write",
]

FORMAT = "fastres 1"


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part.

    Raises:
        FailureError: when the disk is full or the folder cannot be written; the old file stays.
    """
    # Not by `tempfile`, whose files are their owner's alone: these are as the umask says.
    temporary = Path(f"{path}{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise FailureError(f"cannot write {path}: {error.strerror or error}") from None


def _digest(tensors: Mapping[str, Tensor], meta: str) -> str:
    digest = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the first tensor that holds a NaN or an infinity; a GPU is waited for once."""
    named = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not named:
        return None
    # Not every type of one byte has `isfinite`; fastres writes none, and others may.
    finite = [(t.float() if t.itemsize == 1 else t).isfinite().all() for t in named.values()]
    verdicts = torch.stack([verdict.to(finite[0].device) for verdict in finite]).tolist()
    return next((name for name, good in zip(named, verdicts, strict=True) if not good), None)


@dataclass(frozen=True)
class Snapshot:
    """Tensors on the host and JSON text as they were at one moment, whatever changes since."""

    tensors: dict[str, Tensor]
    meta: str

    def write(self, path: Path) -> None:
        """Write them to `path`, replacing what was there in one step.

        Raises:
            FailureError: when a number is not finite, or the file cannot be written; the old one
                stays.
        """
        if name := first_nonfinite(self.tensors):
            raise FailureError(f"{path} is not written: {name} is not finite")
        digest = _digest(self.tensors, self.meta)
        header = {"format": FORMAT, "meta": self.meta, "sha256": digest}
        replace_file(path, save(self.tensors, metadata=header))


def snapshot(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Snapshot:
    """Copy tensors, on any device and in any layout, and what `strict_json.dumps` takes."""
    stored = {k: tensor.detach().to("cpu", copy=True).contiguous() for k, tensor in tensors.items()}
    return Snapshot(stored, strict_json.dumps(meta, sort_keys=True))


def write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON values as they are now to `path`, whose folder exists.

    Raises:
        FailureError: as `Snapshot.write`.
    """
    snapshot(tensors, meta).write(path)


def read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read back what `write` wrote, after checking that not a byte of it has changed.

    The file is opened once, so a writer that replaces it meanwhile does no harm.

    Returns:
        The tensors, and the JSON value as it stands in the file.

    Raises:
        FailureError: when the file is missing, unreadable, cut off, changed or not of fastres, or
            when a number in it is not finite.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise FailureError(f"there is no checkpoint at {path}") from None
    except OSError as error:
        raise FailureError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        tensors, header = load(content), _header(content)
    except (safetensors.SafetensorError, LookupError, ValueError, RuntimeError) as error:
        raise FailureError(f"{path} is no readable checkpoint: {error}") from None
    if header.get("format") != FORMAT:
        raise FailureError(f"{path} was not written by fastres (its header names no {FORMAT!r})")
    text = header.get("meta", "")
    if _digest(tensors, text) != header.get("sha256"):
        raise FailureError(f"{path} is damaged: its content does not match its SHA-256")
    if name := first_nonfinite(tensors):
        raise FailureError(f"{path} is of a run that had diverged: {name} is not finite")
    try:
        return tensors, strict_json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FailureError(f"{path} is no readable checkpoint: its JSON: {error}") from None


def _header(content: bytes) -> dict[str, str]:
    """The strings that a safetensors file, found sound before, carries beside its tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]).get("__metadata__") or {}


def take_section(tensors: Mapping[str, Tensor], section: str) -> dict[str, Tensor]:
    """Return the tensors named `section.<key>` under their keys."""
    prefix = section + "."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path
) -> None:
    """Compare names, shapes and dtypes; those of `expected` may be on any device, meta included.

    Raises:
        FailureError: naming the first differences.
    """
    both = sorted(expected.keys() & found.keys())
    differences = {
        "lacks": sorted(expected.keys() - found.keys()),
        "has besides": sorted(found.keys() - expected.keys()),
        "has in another shape": [k for k in both if expected[k].shape != found[k].shape],
        "has in another dtype": [k for k in both if expected[k].dtype != found[k].dtype],
    }
    parts = [
        f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in differences.items()
        if names
    ]
    if parts:
        raise FailureError(f"{source} is a checkpoint of another model: it {'; it '.join(parts)}")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `weights` into `model`; names, shapes and dtypes must agree exactly.

    Raises:
        FailureError: naming the first differences, when they are of another model.
    """
    check_tensors(weights, model.state_dict(), source)
    model.load_state_dict(dict(weights))
