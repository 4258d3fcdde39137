"""Say what images show: `fastres predict RUN IMAGE|FOLDER ...`.

    fastres predict runs/resnet11 cat.jpg            a table
    fastres predict runs/resnet11 pictures/ --csv    a row an image, folders with all below them
    fastres predict model.safetensors cat.jpg --json a JSON array, one image a line

Images are decoded, turned upright and resized to 32x32 as in training, and results are printed
while others are still decoded. A file that is no readable image gets one sentence on stderr, the
others their result.

Exit codes: 0 done, 1 failure, or some image could not be read, 2 bad use.
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastres import strict_json
from fastres.callable_module import make_callable
from fastres.cli import guarded, parse
from fastres.config import Config, Switch, ViewsName, validate
from fastres.errors import UsageError

if TYPE_CHECKING:
    from fastres.engine.runtime import Runtime
    from fastres.inference.images import DecodedBatch
    from fastres.inference.prediction import Prediction

__all__ = ["PredictOptions", "main"]

_DESCRIPTION = (
    "Say what images show, most likely class first. Example: fastres predict RUN cat.jpg pictures/"
)


@dataclass(frozen=True)
class PredictOptions:
    """Which network, which images, how to print."""

    network: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, checkpoint (.safetensors), or a folder of fastres export --format hub."""
    images: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE|FOLDER...")
    ]
    """Image files, and folders with all images below them."""
    top: int = 5
    """Classes an image."""
    tta: ViewsName | None = None
    """Test-time augmentation: the image and its mirror image (flip), or six views (multi);
    default: as the run evaluated, which for multi means all images here, not those in doubt."""
    json: bool = False
    """Print a JSON array, one image a line."""
    csv: bool = False
    """Print CSV: image, class_1, probability_1, class_2, ..."""
    checkpoint: Literal["auto", "model", "best", "last"] = "auto"
    """Weights of a run at the end, best on the validation images, or last saved; auto: its
    result."""
    fast: bool = False
    """Compute by the fastest route of this machine; without it, eager fp32."""
    batch_size: int = 500
    """Images that are computed together; no result depends on it, but for rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the GPU where there is one."""
    threads: int | None = None
    """CPU threads of torch; default: all cores."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Precision of activations and filters."""
    channels_last: Switch = "auto"
    """Keep weights and activations in NHWC order."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _run(argv: list[str]) -> int:
    options = parse(PredictOptions, "fastres predict", _DESCRIPTION, argv)
    if options.json and options.csv:
        raise UsageError("--json and --csv are two formats of one output; give one of them")
    if not options.images:
        raise UsageError("name the images, or a folder of images, behind the run")
    from fastres.engine.machine import keep_freed_memory
    from fastres.inference.images import list_images
    from fastres.inference.prediction import Predictor
    from fastres.inference.tables import printable
    from fastres.inference.trained import load

    keep_freed_memory()
    paths = list_images(options.images)
    network = load(options.network, options.checkpoint)
    config = Config(
        fast=options.fast,
        device=options.device,
        threads=options.threads,
        amp=options.amp,
        channels_last=options.channels_last,
        eval_batch_size=options.batch_size,
        tta=options.tta or network.tta,
        compile="off",
    )
    config = validate(config, renamed={"eval_batch_size": "batch_size"})
    predictor = Predictor(network, config, top=options.top)
    _tell_fallbacks(predictor.runtime)
    num_failures = 0

    def predictions() -> Iterator["Prediction"]:
        nonlocal num_failures
        for batch in _decoded(paths, options.batch_size):
            num_failures += len(batch.failures)
            for sentence in batch.failures:
                print(f"error: {printable(sentence)}", file=sys.stderr)
            yield from predictor.predictions(batch.pixels, [str(path) for path in batch.paths])

    if options.json:
        _write_json(predictions())
    elif options.csv:
        _write_csv(predictions(), predictor.top)
    else:
        _write_table(predictions(), max(len(str(path)) for path in paths), network.classes)
    return 1 if num_failures else 0


def _tell_fallbacks(runtime: "Runtime") -> None:
    """Say on stderr what --fast cannot have here; graph and loader are none of prediction's."""
    for setting in runtime.settings:
        if setting.fallback and setting.name not in ("graph", "loader"):
            print(f"! {setting.name} {setting.value}: {setting.reason}", file=sys.stderr)


def _decoded(paths: Sequence[Path], batch_size: int) -> Iterator["DecodedBatch"]:
    """Walk the batches, under a bar where results go to a file and stderr to a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from fastres.inference.images import decoded_batches

    with Progress(
        console=Console(stderr=True),
        disable=sys.stdout.isatty() or not sys.stderr.isatty(),
        transient=True,
        # Or results would be printed on stderr, above the bar.
        redirect_stdout=False,
    ) as bar:
        task = bar.add_task("images", total=len(paths))
        for batch in decoded_batches(paths, batch_size):
            yield batch
            bar.advance(task, len(batch.paths) + len(batch.failures))


def _write_json(predictions: Iterator["Prediction"]) -> None:
    separator = "["
    for prediction in predictions:
        print(separator + strict_json.dumps(prediction.to_json()), end="")
        separator = ",\n"
    print("[]" if separator == "[" else "]")


def _write_csv(predictions: Iterator["Prediction"], top: int) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    numbered = [(f"class_{k}", f"probability_{k}") for k in range(1, top + 1)]
    writer.writerow(["image", *(name for pair in numbered for name in pair)])
    for prediction in predictions:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        writer.writerow([prediction.image, *(x for name, p in pairs for x in (name, f"{p:.6f}"))])


def _write_table(
    predictions: Iterator["Prediction"], path_width: int, classes: Sequence[str]
) -> None:
    from fastres.inference.tables import printable

    names = {name: printable(name) for name in classes}
    width = max(map(len, names.values()))
    for prediction in predictions:
        pairs = zip(prediction.classes, prediction.probabilities, strict=True)
        cells = (f"{names[name]:<{width}} {100 * p:5.1f} %" for name, p in pairs)
        print(f"{printable(prediction.image or ''):<{path_width}}  {'   '.join(cells)}")


make_callable(__name__)

if __name__ == "__main__":
    sys.exit(main())
