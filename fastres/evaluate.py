"""Recompute the accuracy of a run from its checkpoint: `python -m fastres.evaluate RUN`.

Exit codes: 0 done, 1 failure, 2 bad use.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastres.cli import guarded, parse
from fastres.config import Config, LoaderName, Switch, from_json, validate

if TYPE_CHECKING:
    from fastres.engine.console import RunConsole
    from fastres.engine.run_dir import RunDir

__all__ = ["EvaluateOptions", "main"]

_DESCRIPTION = "Recompute the accuracy of a trained network, every image counted once."


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, and how."""

    run: Annotated[str, tyro.conf.Positional] = "."
    """Run folder that python -m fastres.train wrote."""
    data_dir: str | None = None
    """Folder with the data; default: the one of the run."""
    dataset: Literal["auto", "cifar10", "cifar100", "folder", "synthetic"] | None = None
    """Kind of data; default: that of the run."""
    checkpoint: Literal["auto", "model", "best", "last"] = "auto"
    """Weights at the end, best on the validation images, or last saved; auto: the run's result."""
    tta: Literal["none", "flip"] = "none"
    """Test-time augmentation: average the predictions for each image and its mirror image."""
    fast: bool = False
    """Evaluate by the fastest route of this machine; without it, the eager fp32 reference."""
    batch_size: int = 1000
    """Images an evaluation step; the accuracy does not depend on it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the GPU where there is one."""
    loader: Literal["auto", LoaderName] = "auto"
    """Who prepares batches."""
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
    trained = from_json(folder.read_bytes("config.json"), folder.path / "config.json")
    config = validate(
        _evaluation_config(trained, options), renamed={"eval_batch_size": "batch_size"}
    )
    console = RunConsole(quiet_stdout=options.json)
    result = _evaluate(folder, config, options, console)
    if options.json:
        print(json.dumps(result, indent=2))
    console.line(
        f"{result['accuracy']:.2f} % of {result['images']:,} images right, loss "
        f"{result['loss']:.4f} ({result['checkpoint']}, test-time augmentation: {result['tta']})",
        style="bold",
    )
    return 0


def _evaluation_config(trained: Config, options: EvaluateOptions) -> Config:
    return trained.replace(
        fast=options.fast,
        dataset=options.dataset or trained.dataset,
        data_dir=trained.data_dir if options.data_dir is None else options.data_dir,
        eval_batch_size=options.batch_size,
        device=options.device,
        loader=options.loader,
        amp=options.amp,
        channels_last=options.channels_last,
        route="auto",
        compile="off",
        graph="auto",
    )


def _evaluate(
    folder: "RunDir", config: Config, options: EvaluateOptions, console: "RunConsole"
) -> dict[str, Any]:
    from fastres.data.source import load_dataset
    from fastres.engine import checkpoint
    from fastres.engine.checkpoint_schema import read_weights
    from fastres.engine.evaluation import evaluate, evaluation_loader
    from fastres.engine.runtime import resolve_runtime
    from fastres.errors import FailureError
    from fastres.model.fuse import fuse
    from fastres.model.resnet import create_model

    path = folder.result() if options.checkpoint == "auto" else folder.file(options.checkpoint)
    weights, meta = read_weights(path)
    data = load_dataset(config.dataset, config.data_dir)
    if list(data.classes) != meta["classes"]:
        raise FailureError(
            f"{path} was trained on {len(meta['classes'])} classes of {meta['dataset']}, and "
            f"{data.source} holds {len(data.classes)} classes of {data.name}"
        )
    model = create_model(
        config.model, len(data.classes), width=config.width, shortcut=config.shortcut
    )
    runtime = resolve_runtime(config, model)
    checkpoint.load_weights(model, weights, path)
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
    score = evaluate(model, loader, runtime, flip_tta=options.tta == "flip")
    loader.close()
    return {
        "accuracy": score.accuracy,
        "loss": score.loss,
        "images": score.images,
        "dataset": data.name,
        "model": config.model,
        "checkpoint": path.name,
        "tta": options.tta,
        "device": runtime.device.type,
        "precision": runtime.precision,
    }


if __name__ == "__main__":
    sys.exit(main())
