"""Write a trained network for other programs: `fastres export RUN --format onnx --out F`.

    fastres export RUN --format onnx --out net.onnx [--int8]
    fastres export RUN --format torch-export --out net.pt2
    fastres export RUN --format safetensors --out net.safetensors
    fastres export RUN [RUN ...] --format hub --out folder --license mit

onnx and torch-export take images in 0..1, (N, 3, 32, 32) float32 with any N, and return logits: the
normalisation is inside, and batch norm is folded into the convolutions. Each is read back and run
on real images, and must say what the network says. safetensors and hub hold the weights as trained.

Exit codes: 0 done, 1 failure, 2 bad use.
"""

import dataclasses
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastres import strict_json
from fastres.cli import guarded, parse
from fastres.config import DatasetKind
from fastres.errors import FailureError, FastresError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from fastres.engine.console import RunConsole
    from fastres.exporting.graphs import RunFile
    from fastres.inference.trained import TrainedNetwork

__all__ = ["ExportOptions", "main"]

_DESCRIPTION = (
    "Write a trained network for other programs, and check the file by running it. "
    "Example: fastres export RUN --format onnx --out net.onnx"
)
# Float32 sums in another order; measured against the largest logit.
_TOLERANCE = 1e-4
_CHECK_BATCH = 250
_CALIBRATION_IMAGES = 500


@dataclass(frozen=True)
class ExportOptions:
    """What to write."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Run folder, checkpoint (.safetensors), or a folder of --format hub; for the model card of
    hub, further runs that differ in their seed."""
    format: Literal["onnx", "torch-export", "safetensors", "hub"]
    """onnx: for onnxruntime and others. torch-export: a program of torch.export (.pt2).
    safetensors: the plain state_dict. hub: a folder for the Hugging Face Hub."""
    out: str
    """File to write; for hub, a folder."""
    int8: bool = False
    """For onnx: also NAME.int8.onnx, filters and activations in 8 bits, with its accuracy and speed
    beside those of float32."""
    license: str | None = None
    """For hub: licence of the weights as the Hub names it, such as mit or cc-by-4.0."""
    check_images: int = 1000
    """Test images on which the file and the network are compared."""
    data_dir: str | None = None
    """Folder with the images of the check; default: that of the run."""
    dataset: Literal["auto", DatasetKind] | None = None
    """Kind of data; default: what the run was trained on."""
    checkpoint: Literal["auto", "model", "best", "last"] = "auto"
    """Weights of a run at the end, best on the validation images, or last saved; auto: its
    result."""
    overwrite: bool = False
    """Replace what is at --out."""
    json: bool = False
    """Print what was written and measured as JSON."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(
        lambda: _run(arguments),
        debug="--debug" in arguments,
        result_is_printed="--json" in arguments,
    )


def _run(argv: list[str]) -> int:
    options = parse(ExportOptions, "fastres export", _DESCRIPTION, argv)
    _check_options(options)
    from fastres.engine.console import RunConsole
    from fastres.inference.trained import load

    out = Path(options.out)
    _check_free(out, options)
    network = load(options.runs[0], options.checkpoint)
    console = RunConsole(quiet_stdout=options.json)
    result: dict[str, Any] = {"file": options.out, "format": options.format}
    if options.format == "hub":
        result |= _write_hub(out, network, options)
    elif options.format == "safetensors":
        result |= _write_safetensors(out, network)
    else:
        result |= _write_graph(out, network, options, console)
    if options.json:
        print(strict_json.dumps(result, indent=2))
    for line in _lines(result):
        console.line(line)
    return 0


def _check_options(options: ExportOptions) -> None:
    if not options.runs:
        raise UsageError("name the run to export")
    if options.format != "hub" and len(options.runs) > 1:
        raise UsageError("several runs are for the model card of --format hub")
    if options.format == "hub" and options.checkpoint != "auto":
        raise UsageError(
            "the model card of --format hub is about a run's result, --checkpoint auto"
        )
    if options.format in ("hub", "safetensors") and (options.data_dir or options.dataset):
        raise UsageError("--data-dir and --dataset are for the check of onnx and torch-export")
    if options.int8 and options.format != "onnx":
        raise UsageError("--int8 is for --format onnx")
    if (options.license is not None) != (options.format == "hub"):
        raise UsageError(
            "--format hub needs --license, such as --license mit: what others may do with the "
            "weights"
            if options.format == "hub"
            else "--license is for --format hub"
        )
    if options.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", options.license):
        raise UsageError(
            f"--license must be a licence as the Hub names it, got {options.license!r}"
        )
    if options.check_images < 1:
        raise UsageError(f"--check-images must be at least 1, got {options.check_images}")


def _int8_path(out: Path) -> Path:
    return out.parent / f"{out.stem}.int8.onnx"


def _check_free(out: Path, options: ExportOptions) -> None:
    from fastres.data.files import FILE, FOLDER, kind_at
    from fastres.inference.hub_files import is_hub_folder

    wanted = FOLDER if options.format == "hub" else FILE
    if wanted == FILE and not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")
    for path in (out, *([_int8_path(out)] if options.int8 else [])):
        kind = kind_at(path)
        if kind is None or (kind == FOLDER == wanted and not any(path.iterdir())):
            continue
        if kind != wanted:
            raise UsageError(f"--out {path} is {kind}; --format {options.format} writes {wanted}")
        # A run's folder has files of the same names, and any project a README.md.
        if wanted == FOLDER and not is_hub_folder(path):
            raise UsageError(f"--out {path} holds files of something else; choose another")
        if not options.overwrite:
            raise UsageError(f"{path} is there already; --overwrite replaces it")


def _about(network: "TrainedNetwork") -> dict[str, Any]:
    """Return what a file says of its network."""
    return {
        "model": network.config.model,
        "classes": list(network.classes),
        "dataset": network.dataset,
        "input": "images: (N, 3, 32, 32) float32 in 0..1, RGB; normalised inside",
        "output": "logits: (N, classes) float32",
    }


def _write_graph(
    out: Path, network: "TrainedNetwork", options: ExportOptions, console: "RunConsole"
) -> dict[str, Any]:
    from fastres.engine.checkpoint import replace_file
    from fastres.exporting.folded import deployed
    from fastres.exporting.graphs import (
        check_onnx_packages,
        open_onnx,
        open_torch_export,
        write_onnx,
        write_torch_export,
    )
    from fastres.inference.test_data import evaluation_set_for

    is_onnx = options.format == "onnx"
    if is_onnx:
        check_onnx_packages()
    data = evaluation_set_for(network, options.data_dir, options.dataset)
    for notice in data.notices:
        console.line(f"! {notice}", style="bold yellow")
    images, labels = _some(data.images.images, data.images.labels, options.check_images)
    # Nothing that was not checked takes a name that was asked for.
    with tempfile.TemporaryDirectory() as folder:
        draft, small = Path(folder, "net.onnx" if is_onnx else "net.pt2"), Path(folder, "int8.onnx")
        (write_onnx if is_onnx else write_torch_export)(draft, deployed(network), _about(network))
        run = open_onnx(draft) if is_onnx else open_torch_export(draft)
        result: dict[str, Any] = {"bytes": draft.stat().st_size, "checked_on": data.name}
        result |= _check(run, network, images, out)
        if options.int8:
            result |= _write_int8(draft, small, network, options, images, labels)
            replace_file(_int8_path(out), small.read_bytes())
            result["int8_file"] = str(_int8_path(out))
        replace_file(out, draft.read_bytes())
    return result


def _some(
    images: "np.ndarray", labels: "np.ndarray", count: int
) -> tuple["np.ndarray", "np.ndarray"]:
    """Return some images as (N, 3, 32, 32) float32 in 0..1, and their labels."""
    import numpy as np

    # Evenly over a set that may be sorted by class.
    index = np.linspace(0, len(images) - 1, min(count, len(images))).astype(np.int64)
    pixels = images[index].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(pixels), labels[index]


def _check(
    run: "RunFile", network: "TrainedNetwork", images: "np.ndarray", out: Path
) -> dict[str, Any]:
    """Compare a file with the network, in batches of two sizes.

    Raises:
        FailureError: where they differ by more than rounding.
    """
    import numpy as np
    import torch

    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (network.mean, network.std))
    wanted, found = [], []
    for start in range(0, len(images), _CHECK_BATCH):
        batch = images[start : start + _CHECK_BATCH]
        with torch.inference_mode():
            wanted.append(network.model((torch.from_numpy(batch) - mean) / std).numpy())
        # One image alone, too: a batch that is not dynamic would show.
        found += [run(part) for part in (batch[:1], batch[1:]) if len(part)]
    expected, logits = np.concatenate(wanted), np.concatenate(found)
    largest = float(np.abs(expected).max())
    difference = float(np.abs(logits - expected).max())
    # A difference that is NaN is no small one.
    if not difference <= _TOLERANCE * max(largest, 1.0):
        raise FailureError(
            f"the file for {out} does not compute what the network does, and is not written: "
            f"logits up to {largest:.4g} differ by up to {difference:.4g}"
        )
    return {
        "checked_images": len(images),
        "largest_logit": largest,
        "largest_difference": difference,
        "same_class": int((logits.argmax(axis=1) == expected.argmax(axis=1)).sum()),
    }


def _write_int8(
    source: Path,
    target: Path,
    network: "TrainedNetwork",
    options: ExportOptions,
    images: "np.ndarray",
    labels: "np.ndarray",
) -> dict[str, Any]:
    from fastres import host
    from fastres.exporting.graphs import open_onnx
    from fastres.exporting.quantize import compare, quantize_onnx

    calibration = _training_images(network, options)
    quantize_onnx(source, target, calibration)
    threads = host.usable_cores()
    files = {"float32": open_onnx(source, threads), "int8": open_onnx(target, threads)}
    compared = compare(files, images, labels)
    return {
        "int8_bytes": target.stat().st_size,
        "calibrated_on": f"{len(calibration)} training images",
        "machine": host.describe_machine(),
        "threads": threads,
        **{name: dataclasses.asdict(found) for name, found in compared.items()},
    }


def _training_images(network: "TrainedNetwork", options: ExportOptions) -> "np.ndarray":
    """Return images to calibrate with: of --data-dir, or of what the network was trained on.

    Raises:
        FailureError: where neither is at hand; test images would judge what they have shaped.
    """
    from fastres.data.source import dataset_kind, load_dataset

    kind = dataset_kind(network.dataset)
    sources = [(options.dataset or kind, options.data_dir)] if options.data_dir else []
    for kind_there, folder in [*sources, (kind, network.config.data_dir)]:
        try:
            train = load_dataset(kind_there, folder, download=False).train
        except FastresError as error:
            reason = error
        else:
            return _some(train.images, train.labels, _CALIBRATION_IMAGES)[0]
    raise FailureError(
        f"--int8 needs training images to find the range of each activation: {reason}"
    )


def _write_safetensors(out: Path, network: "TrainedNetwork") -> dict[str, Any]:
    import torch
    from safetensors.torch import save

    from fastres.engine.checkpoint import replace_file
    from fastres.inference.hub_files import read_plain_weights

    state = {name: tensor.contiguous() for name, tensor in network.model.state_dict().items()}
    about = {name: strict_json.dumps(value) for name, value in _about(network).items()}
    about |= {"mean": strict_json.dumps(network.mean), "std": strict_json.dumps(network.std)}
    about["input"] = "normalised images: (N, 3, 32, 32) float32, (x - mean) / std of x in 0..1, RGB"
    replace_file(out, save(state, metadata={"format": "pt", **about}))
    found = read_plain_weights(out)
    if found.keys() != state.keys() or not all(torch.equal(found[k], state[k]) for k in state):
        raise FailureError(f"{out} does not read back as it was written")
    return {"bytes": out.stat().st_size, "tensors": len(state)}


def _write_hub(out: Path, network: "TrainedNetwork", options: ExportOptions) -> dict[str, Any]:
    from fastres.exporting.hub_folder import write_hub_folder
    from fastres.inference.runs import read_summary, seed_results
    from fastres.inference.trained import load

    assert options.license is not None
    results = seed_results(options.runs)
    write_hub_folder(
        out,
        network,
        licence=options.license,
        results=results,
        summary=read_summary(options.runs[0]),
    )
    load(out)
    return {"runs": len(results), "accuracies": [found.accuracy for found in results]}


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['file']}: {result['format']}"]
    if "checked_images" in result:
        lines.append(
            f"checked on {result['checked_images']:,} images of {result['checked_on']}: logits up "
            f"to {result['largest_logit']:.3g} differ by up to {result['largest_difference']:.1e}, "
            f"{result['same_class']:,} times the same class"
        )
    if "int8" in result:
        plain, small = result["float32"], result["int8"]
        lines.append(
            f"{result['int8_file']}: {result['int8_bytes'] / result['bytes']:.0%} of the bytes, "
            f"{small['accuracy']:.2f} % right (float32: {plain['accuracy']:.2f} %), "
            f"{small['images_per_second']:,.0f} images/s (float32: "
            f"{plain['images_per_second']:,.0f}), {result['threads']} threads, calibrated on "
            f"{result['calibrated_on']}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
