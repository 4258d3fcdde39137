"""One HTML file about runs, to look at and to send: `fastres report RUN [RUN ...] --out F.html`.

Curves of all runs, what differs in their options, and of the first (or of all, with --inside all)
the confusion matrix and surest mistakes on the test images, the first filters, the feature maps of
an image, time and bytes by layer. The file needs no network and runs no script. A run that goes on
is shown as far as it has come.

Exit codes: 0 done, 1 failure, 2 bad use.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fastres.cli import guarded, parse
from fastres.config import Config, DatasetKind, validate
from fastres.errors import FailureError, FastresError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fastres.data.evaluation_set import EvaluationSet
    from fastres.inference.trained import TrainedNetwork
    from fastres.reporting.page import NetworkInside, RunFacts

__all__ = ["ReportOptions", "main"]

_DESCRIPTION = (
    "Write one self-contained HTML file about runs. "
    "Example: fastres report runs/a runs/b --out report.html"
)

# Runs whose networks are shown: so many of the first.
_LOOKED_INTO = {"first": 1, "all": None, "none": 0}


@dataclass(frozen=True)
class ReportOptions:
    """Which runs, and what of them."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Run folders; of one that has not finished, what there is so far."""
    out: str = "report.html"
    """File to write."""
    inside: Literal["first", "all", "none"] = "first"
    """Of which runs the network itself is shown."""
    image: str | None = None
    """Image file whose feature maps are shown; default: the first test image."""
    data_dir: str | None = None
    """Folder with the test images; default: that of the run."""
    dataset: Literal["auto", DatasetKind] | None = None
    """Kind of data; default: what the run was trained on."""
    fast: bool = False
    """Evaluate by the fastest route of this machine; without it, the eager fp32 reference."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes the GPU where there is one."""
    threads: int | None = None
    """CPU threads of torch; default: all cores."""
    overwrite: bool = False
    """Replace the file that is at --out."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments, result_is_printed=False)


def _run(argv: list[str]) -> int:
    options = parse(ReportOptions, "fastres report", _DESCRIPTION, argv)
    if not options.runs:
        raise UsageError("name the run folders")
    if options.image == "":
        raise UsageError("--image is empty; name a file or leave the option out")
    if options.image is not None and options.inside == "none":
        raise UsageError("--image is shown inside a network: leave out --inside none")
    out = Path(options.out)
    _check_out(out, overwrite=options.overwrite)
    config = validate(
        Config(
            fast=options.fast,
            device=options.device,
            threads=options.threads,
            data_dir=options.data_dir,
            # No processes for one pass, and no compiler.
            loader="resident",
            compile="off",
        )
    )
    from fastres.engine.machine import keep_freed_memory

    keep_freed_memory()  # before torch is imported
    from fastres.engine.checkpoint import replace_file
    from fastres.engine.console import RunConsole
    from fastres.inference.hub_files import is_hub_folder
    from fastres.reporting.page import render

    for path in options.runs:
        if path and Path(path).exists() and (not Path(path).is_dir() or is_hub_folder(Path(path))):
            raise UsageError(f"{path} is no run folder, and has no curves to show")
    console = RunConsole()
    names = _names(options.runs)
    runs = [_facts(path, name) for path, name in zip(options.runs, names, strict=True)]
    image = None if options.image is None else _decoded(options.image)
    networks = []
    for path, name in list(zip(options.runs, names, strict=True))[: _LOOKED_INTO[options.inside]]:
        if not _has_weights(path):
            console.line(f"{name}: no checkpoint yet, its curves alone", style="yellow")
            continue
        with console.rich.status(f"{name}: test images, filters, feature maps, layers ..."):
            networks.append(_inside(path, name, options, config, image))
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = render(runs, networks, f"made with fastres report, {when}")
    replace_file(out, page.encode())
    console.line(f"{out}: {len(page) / 1e6:.1f} MB, opens in any browser", style="bold")
    return 0


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} is there already; --overwrite replaces it")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")


def _names(paths: Sequence[str]) -> list[str]:
    """Return the names of the folders, with as many of their parents as tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("the same run is named twice")


def _facts(path: str, name: str) -> "RunFacts":
    from fastres.config import from_json
    from fastres.engine.run_dir import RunDir
    from fastres.inference.runs import read_metrics, read_summary
    from fastres.reporting.page import RunFacts

    folder = RunDir(Path(path))
    source = folder.path / folder.options_file
    options = from_json(folder.read_bytes(folder.options_file), source).to_json()
    rows = read_metrics(path)
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(x, int | float) for x in row.values()):
            raise FailureError(f"{folder.path / 'metrics.jsonl'} holds a row that is no numbers")
    return RunFacts(name, rows, options, read_summary(path))


def _has_weights(path: str) -> bool:
    from fastres.engine.run_dir import RunDir

    return os.path.lexists(RunDir(Path(path)).result())


def _inside(
    path: str, name: str, options: ReportOptions, config: Config, image: "np.ndarray | None"
) -> "NetworkInside":
    from fastres.inference.evaluating import evaluate_network, placed
    from fastres.inference.trained import load
    from fastres.reporting.layers import feature_maps, first_filters, layer_costs
    from fastres.reporting.page import NetworkInside

    network = load(path)
    config = config.replace(tta=network.tta)
    model, runtime = placed(network, config)
    data, why_not = _test_images(network, options)
    evaluation, images = None, None
    if data is not None:
        evaluation = evaluate_network(network, data, config, model, runtime)
        images = data.images.images
    title = "the first test image" if image is None else Path(str(options.image)).name
    pixels = images[0] if image is None and images is not None else image
    # The plain modules, whose layers can be looked at one by one.
    plain = network.model.to(runtime.device)
    return NetworkInside(
        name=name,
        evaluation=evaluation,
        why_not=why_not,
        images=images,
        filters=first_filters(plain),
        image=pixels,
        image_title=title,
        maps=[] if pixels is None else feature_maps(plain, _normalised(network, pixels)),
        costs=layer_costs(plain),
        costs_title=_how_measured(runtime.device.type),
        notices=() if data is None else data.notices,
    )


def _test_images(
    network: "TrainedNetwork", options: ReportOptions
) -> "tuple[EvaluationSet | None, str]":
    """Return the images to evaluate on; where the run's are gone, None and a sentence."""
    from fastres.inference.test_data import evaluation_set_for

    try:
        return evaluation_set_for(network, options.data_dir, options.dataset), ""
    except FastresError as error:
        if options.data_dir is not None or options.dataset is not None:
            raise
        return None, f"Not evaluated: {error}."


def _decoded(path: str) -> "np.ndarray":
    from collections import Counter

    from fastres.data.readers.image import decode_image, pillow_for_decoding

    with pillow_for_decoding():
        return decode_image(path, Counter())


def _normalised(network: "TrainedNetwork", pixels: "np.ndarray") -> "Tensor":
    import torch

    device = next(network.model.parameters()).device
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (network.mean, network.std))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    return ((image - mean) / std).to(device)


def _how_measured(device: str) -> str:
    from fastres import host

    machine = host.describe_machine()
    where = machine["gpu"] if device == "cuda" else f"{machine['cores']} cores {machine['cpu']}"
    return (
        f"an image within a batch of 128, evaluated in eager float32 on {where}; KiB are the least "
        "that a layer reads and writes; what is called as a function is no layer: ReLUs, "
        "additions, most pools"
    )


if __name__ == "__main__":
    sys.exit(main())
