"""Recompute the accuracy of a run from its checkpoint: `python -m fastres.evaluate RUN`.

Exit codes: 0 done, 1 failure, 2 bad use.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastres import strict_json
from fastres.cli import guarded, parse
from fastres.config import (
    Config,
    DatasetKind,
    LoaderName,
    Switch,
    ViewsName,
    from_json,
    validate,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastres.data.dataset import Dataset
    from fastres.engine.console import RunConsole
    from fastres.engine.run_dir import RunDir

__all__ = ["EvaluateOptions", "main"]

_DESCRIPTION = "Recompute the accuracy of a trained network, every image counted once."
# A run may be a stranger's: its config.json names the network and where its data was; devices,
# numbers of processes and where anything is written are those of the command line.
_FROM_THE_RUN = ("model", "width", "shortcut", "data_dir", "tta")


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, and how."""

    run: Annotated[str, tyro.conf.Positional] = "."
    """Run folder that python -m fastres.train wrote."""
    data_dir: str | None = None
    """Folder with the data, as in training; default: $FASTRES_DATA, user cache."""
    dataset: Literal["auto", DatasetKind] | None = None
    """Kind of data; default: what the checkpoint was trained on."""
    checkpoint: Literal["auto", "model", "best", "last"] = "auto"
    """Weights at the end, best on the validation images, or last saved; auto: the run's result."""
    tta: ViewsName | None = None
    """Test-time augmentation: average each image and its mirror image (flip), or six views of the
    quarter of the images that is most in doubt (multi); default: as the run did."""
    fast: bool = False
    """Evaluate by the fastest route of this machine; without it, the eager fp32 reference."""
    batch_size: int = 1000
    """Images an evaluation step; no accuracy depends on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the GPU where there is one."""
    threads: int | None = None
    """CPU threads of torch; default: all cores."""
    loader: Literal["auto", LoaderName] = "auto"
    """Who prepares batches."""
    workers: int | None = None
    """Processes of the torch loader, threads of DALI; default: what suits the machine."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Precision of activations and filters."""
    channels_last: Switch = "auto"
    """Keep weights and activations in NHWC order."""
    json: bool = False
    """Print the result alone on stdout, as JSON."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _run(argv: list[str]) -> int:
    options = parse(
        EvaluateOptions, "python -m fastres.evaluate", _DESCRIPTION, argv, EvaluateOptions()
    )
    from fastres.engine.console import RunConsole
    from fastres.engine.machine import keep_freed_memory
    from fastres.engine.run_dir import RunDir

    if options.fast:
        keep_freed_memory()
    folder = RunDir(Path(options.run))
    source = folder.path / "config.json"
    trained = from_json(folder.read_bytes("config.json"), source, only=_FROM_THE_RUN)
    config = validate(
        _evaluation_config(trained, options), renamed={"eval_batch_size": "batch_size"}
    )
    console = RunConsole(quiet_stdout=options.json)
    result = _evaluate(folder, config, options, console, trained.data_dir)
    if options.json:
        print(strict_json.dumps(result, indent=2))
    console.line(
        f"{result['accuracy']:.2f} % of {result['images']:,} images right, loss "
        f"{result['loss']:.4f} ({result['checkpoint']}, test-time augmentation: {result['tta']})",
        style="bold",
    )
    return 0


def _evaluation_config(trained: Config, options: EvaluateOptions) -> Config:
    """Take the network from the run, and all that concerns this machine from the command line."""
    return Config(
        model=trained.model,
        width=trained.width,
        shortcut=trained.shortcut,
        tta=options.tta or trained.tta,
        fast=options.fast,
        dataset=options.dataset or "auto",
        data_dir=options.data_dir,
        eval_batch_size=options.batch_size,
        device=options.device,
        threads=options.threads,
        loader=options.loader,
        workers=options.workers,
        amp=options.amp,
        channels_last=options.channels_last,
        compile="off",
    )


def _load_data(kind: str, config: Config, trained_from: str | None) -> "Dataset":
    """Load the data from the folder of the command line, of the run, or where data is looked for.

    Args:
        kind: for `load_dataset`.
        config: of the evaluation.
        trained_from: the data folder in the run's config.json, from which is read alone: nothing is
            downloaded into a folder that a stranger may have named.
    """
    from fastres.data.source import load_dataset
    from fastres.errors import FastresError

    if config.data_dir is not None or trained_from is None:
        return load_dataset(kind, config.data_dir)
    try:
        return load_dataset(kind, trained_from, download=False)
    except FastresError as error:
        raise type(error)(
            f"{error}; the run was trained on {trained_from!r}: give where its data is now with "
            "--data-dir"
        ) from None


def _trained_network(
    path: Path, weights: Mapping[str, "Tensor"], config: Config, num_classes: int
) -> "nn.Module":
    """Build the network and put the weights of the checkpoint `path` into it."""
    import torch

    from fastres.engine import checkpoint
    from fastres.model.resnet import create_model

    def build() -> "nn.Module":
        return create_model(config.model, num_classes, width=config.width, shortcut=config.shortcut)

    # Before a network is allocated that is as large as config.json says.
    with torch.device("meta"):
        checkpoint.check_tensors(weights, build().state_dict(), path)
    model = build()
    checkpoint.load_weights(model, weights, path)
    return model


def _evaluate(
    folder: "RunDir",
    config: Config,
    options: EvaluateOptions,
    console: "RunConsole",
    trained_from: str | None,
) -> dict[str, Any]:
    from fastres.data.dataset import class_difference
    from fastres.data.source import dataset_kind
    from fastres.engine.checkpoint_schema import read_weights
    from fastres.engine.evaluation import evaluate, evaluation_loader
    from fastres.engine.runtime import resolve_runtime
    from fastres.errors import FailureError
    from fastres.fusion.fuse import fuse

    path = folder.result() if options.checkpoint == "auto" else folder.file(options.checkpoint)
    weights, meta = read_weights(path)
    data = _load_data(options.dataset or dataset_kind(meta["dataset"]), config, trained_from)
    if difference := class_difference(meta["classes"], data.classes):
        raise FailureError(
            f"{path}, trained on {meta['dataset']}, does not fit {data.source}: {difference}"
        )
    model = _trained_network(path, weights, config, len(data.classes))
    runtime = resolve_runtime(config, model)
    if runtime.route == "fused":
        model = fuse(model, verbose=False)
    runtime.configure_torch()
    runtime.place(model)
    console.data(data, num_train=0, num_val=0)
    if data.fingerprint != meta["dataset_fingerprint"]:
        console.line(
            f"           ! the run was trained on other data than this: {meta['dataset']}",
            style="bold yellow",
        )
    console.runtime(runtime, training=False)
    # The images are normalised as in training, even where this data has other statistics.
    loader = evaluation_loader(data.test, tuple(meta["mean"]), tuple(meta["std"]), config, runtime)
    score = evaluate(model, loader, runtime, tta=config.tta)
    loader.close()
    if not math.isfinite(score.loss):
        raise FailureError(
            f"the loss on the test images is {score.loss}: the weights in {path} are finite and "
            f"overflow in {runtime.precision}"
        )
    return {
        "accuracy": score.accuracy,
        "loss": score.loss,
        "images": score.images,
        "dataset": data.name,
        "model": config.model,
        "checkpoint": path.name,
        "tta": config.tta,
        "device": runtime.device.type,
        "precision": runtime.precision,
    }


if __name__ == "__main__":
    sys.exit(main())
