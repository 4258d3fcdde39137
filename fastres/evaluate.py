"""Say how good a trained network is: `fastres evaluate RUN`.

    fastres evaluate RUN                         accuracy with its interval, classes, confusion
    fastres evaluate RUN --out D                 the same as JSON, CSV and pictures in the folder D
    fastres evaluate RUN --data-dir cifar10.1    on another test set

Exit codes: 0 done, 1 failure, 2 bad use.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastres import strict_json
from fastres.callable_module import make_callable
from fastres.cli import guarded, parse
from fastres.config import Config, DatasetKind, LoaderName, Switch, ViewsName, validate
from fastres.errors import FailureError, UsageError

if TYPE_CHECKING:
    from fastres.data.evaluation_set import EvaluationSet
    from fastres.engine.console import RunConsole
    from fastres.engine.runtime import Runtime
    from fastres.inference.scores import Evaluation
    from fastres.inference.trained import TrainedNetwork

__all__ = ["EvaluateOptions", "main"]

_DESCRIPTION = (
    "Say how good a trained network is, every image counted once: accuracy with a 95 % interval, "
    "every class, calibration, confusion. Example: fastres evaluate RUN --out evaluation"
)

_MISTAKES_SHOWN = 30


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate, and how."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = "."
    """Run folder, checkpoint (.safetensors), or a folder of fastres export --format hub."""
    data_dir: str | None = None
    """Folder with the data, as in training; or another test set: <class>/* folders, or a pair of
    *_data.npy and *_labels.npy; default: $FASTRES_DATA, user cache."""
    dataset: Literal["auto", DatasetKind] | None = None
    """Kind of data; default: what the checkpoint was trained on."""
    checkpoint: Literal["auto", "model", "best", "last"] = "auto"
    """Weights at the end, best on the validation images, or last saved; auto: the run's result."""
    out: str | None = None
    """Folder for evaluation.json, classes.csv, confusion.csv and pictures: confusion.png,
    calibration.png, mistakes.png."""
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
    options = parse(EvaluateOptions, "fastres evaluate", _DESCRIPTION, argv, EvaluateOptions())
    from fastres.engine.console import RunConsole
    from fastres.engine.machine import keep_freed_memory
    from fastres.inference.test_data import evaluation_set_for
    from fastres.inference.trained import load

    if options.out == "":
        raise UsageError("--out is empty; name a folder or leave the option out")
    keep_freed_memory()
    network = load(options.run, options.checkpoint)
    config = validate(
        _evaluation_config(network.config, options), renamed={"eval_batch_size": "batch_size"}
    )
    console = RunConsole(quiet_stdout=options.json)
    data = evaluation_set_for(network, config.data_dir, options.dataset)
    out = None if options.out is None else _made(Path(options.out))
    evaluation, runtime = _evaluate(network, data, config, console)
    about = {
        "dataset": data.name,
        "model": config.model,
        "checkpoint": network.source.name,
        "tta": config.tta,
        "device": runtime.device.type,
        "precision": runtime.precision,
    }
    result = evaluation.to_json() | about
    if out is not None:
        _write(out, evaluation, data, network, result)
    if options.json:
        print(strict_json.dumps(result, indent=2))
    else:
        _print(evaluation, console)
    low, high = evaluation.interval
    console.line(
        f"{evaluation.accuracy:.2f} % of {evaluation.images:,} images right "
        f"(95 % interval {low:.2f} to {high:.2f}), loss {evaluation.loss:.4f}, calibration error "
        f"{evaluation.calibration_error:.2f} % ({network.source.name}, test-time augmentation: "
        f"{config.tta})",
        style="bold",
    )
    if out is not None:
        console.line(f"{out}: evaluation.json, CSV and pictures")
    return 0


def _evaluation_config(trained: Config, options: EvaluateOptions) -> Config:
    """Take the network from the run, and all that concerns this machine from the command line."""
    return Config(
        model=trained.model,
        width=trained.width,
        shortcut=trained.shortcut,
        stem=trained.stem,
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


def _evaluate(
    network: "TrainedNetwork", data: "EvaluationSet", config: Config, console: "RunConsole"
) -> tuple["Evaluation", "Runtime"]:
    from fastres.inference.evaluating import evaluate_network, placed

    model, runtime = placed(network, config)
    console.evaluation_data(data)
    if data.fingerprint is not None and data.fingerprint != network.dataset_fingerprint:
        notice = (
            f"the network was trained on other data than this: {network.dataset}"
            if network.dataset_fingerprint
            else f"the network says {network.dataset}, not which copy of it it was trained on"
        )
        console.line(f"           ! {notice}", style="bold yellow")
    console.runtime(runtime, training=False)
    return evaluate_network(network, data, config, model, runtime), runtime


def _print(evaluation: "Evaluation", console: "RunConsole") -> None:
    from fastres.inference.tables import class_table, confused_pairs, confusion_text

    console.line("")
    console.rich.print(class_table(evaluation), markup=False)
    console.line("")
    if (matrix := confusion_text(evaluation)) is not None:
        console.line(matrix)
    else:
        console.rich.print(confused_pairs(evaluation), markup=False)
    console.line("")


def _made(out: Path) -> Path:
    """Return the folder of --out, before anything slow happens.

    Raises:
        FailureError: when it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FailureError(f"cannot make {out}: {error.strerror or error}") from None
    return out


def _write(
    out: Path,
    evaluation: "Evaluation",
    data: "EvaluationSet",
    network: "TrainedNetwork",
    result: dict[str, Any],
) -> None:
    """Write the files of --out; whatever else is in the folder stays."""
    from fastres.engine.checkpoint import replace_file
    from fastres.inference.pictures import draw_calibration, draw_confusion, draw_mistakes
    from fastres.inference.tables import classes_csv, confusion_csv, printable

    names = [printable(name) for name in network.classes]
    about = printable(f"{result['model']} on {data.name}")
    title = f"{about}: {evaluation.accuracy:.2f} %"
    pictures = {
        "confusion.png": draw_confusion(evaluation.confusion.numpy(), names, title),
        "calibration.png": draw_calibration(
            evaluation.bins, f"{title}, calibration error {evaluation.calibration_error:.2f} %"
        ),
        "mistakes.png": draw_mistakes(
            data.images.images,
            evaluation.mistakes[:_MISTAKES_SHOWN],
            names,
            f"The surest mistakes of {about}",
        ),
    }
    texts = {
        "classes.csv": classes_csv(evaluation),
        "confusion.csv": confusion_csv(evaluation),
        "evaluation.json": strict_json.dumps(result, indent=2) + "\n",
    }
    # A class may be called what is no UTF-8.
    files = {name: text.encode(errors="backslashreplace") for name, text in texts.items()}
    for name, content in (files | pictures).items():
        replace_file(out / name, content)


make_callable(__name__)

if __name__ == "__main__":
    sys.exit(main())
