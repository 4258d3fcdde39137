"""Use the weights of other projects' ResNets, and give yours to them: `fastres convert`.

    fastres convert ckpt.pth --from kuangliu --out net      then: fastres evaluate net
    fastres convert resnet20.th --from akamaster --out net
    fastres convert RUN --to chenyaofo --out resnet20.pt    the way back

No code in a file is executed. A state_dict does not tell the whole network: that is why the project
is named (fastres/conversion/sources.py has what its files do not say).

Exit codes: 0 done, 1 failure, 2 bad use.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fastres.cli import guarded, parse
from fastres.conversion.sources import SOURCES, Normalisation, SourceName
from fastres.errors import UsageError

if TYPE_CHECKING:
    from fastres.engine.console import RunConsole

__all__ = ["ConvertOptions", "main"]

_DESCRIPTION = (
    "Convert weights of kuangliu/pytorch-cifar, akamaster/pytorch_resnet_cifar10, "
    "chenyaofo/pytorch-cifar-models, huyvnphan/PyTorch_CIFAR10, weiaicunzai/pytorch-cifar100, "
    "torchvision and timm, or a run of fastres into theirs. "
    "Example: fastres convert ckpt.pth --from kuangliu --out net"
)


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Their file (.pth, .pt, .th, .ckpt, .tar, .safetensors); with --to: a run, a checkpoint, or a
    folder of fastres export --format hub."""
    from_project: Annotated[SourceName | None, tyro.conf.arg(name="from")] = None
    """Project whose weights they are."""
    to_project: Annotated[SourceName | None, tyro.conf.arg(name="to")] = None
    """Project whose scripts shall load them."""
    out: str = ""
    """Folder of the network for --from, which every command of fastres takes as a run; file for
    --to."""
    ema: bool = False
    """Take the averaged weights that a file of timm holds beside the others."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of the outputs; default: CIFAR's for 10 and 100,
    ImageNet's for 1000."""
    mean: tuple[float, float, float] | None = None
    """Mean of each channel, in 0..1, that images were normalised with; default: the project's."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of each channel, likewise."""
    overwrite: bool = False
    """Replace what is at --out."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments, result_is_printed=False)


def _run(argv: list[str]) -> int:
    options = parse(ConvertOptions, "fastres convert", _DESCRIPTION, argv)
    if (options.from_project is None) == (options.to_project is None):
        raise UsageError("give one of --from and --to, the project whose weights it is about")
    if not options.out:
        raise UsageError("name with --out where the result goes")
    if (options.mean is None) != (options.std is None):
        raise UsageError("--mean and --std belong together")
    from fastres.engine.console import RunConsole

    convert = _from if options.from_project is not None else _to
    convert(options, RunConsole())
    return 0


def _normalisation(options: ConvertOptions) -> Normalisation | None:
    if options.mean is None or options.std is None:
        return None
    if not all(0 <= m <= 1 for m in options.mean) or not all(1e-4 <= s <= 1 for s in options.std):
        raise UsageError("--mean must be between 0 and 1, and --std between 0.0001 and 1")
    return Normalisation(options.mean, options.std)


def _from(options: ConvertOptions, console: "RunConsole") -> None:
    from fastres.conversion.converter import from_state_dict
    from fastres.conversion.files import read_state_dict
    from fastres.data.files import kind_at
    from fastres.engine import checkpoint
    from fastres.engine.run_dir import RunDir

    assert options.from_project is not None
    path, folder = Path(options.file), RunDir(Path(options.out))
    normalisation = _normalisation(options)
    if kind_at(path) is None:
        raise UsageError(f"there is no file at {path}")
    folder.check_free(overwrite=options.overwrite)
    network = from_state_dict(
        read_state_dict(path, ema=options.ema),
        options.from_project,
        path,
        classes=options.classes or None,
        normalisation=normalisation,
    )
    with folder.claimed():
        folder.begin(network.config.to_json(), overwrite=options.overwrite)
        checkpoint.write(folder.file("model"), network.model.state_dict(), network.identity())
    config = network.config
    parameters = sum(p.numel() for p in network.model.parameters())
    console.line(
        f"{config.model} of width {config.width:g}, {parameters:,} parameters, "
        f"{len(network.classes):,} classes, shortcut {config.shortcut}, stem {config.stem}"
    )
    if not options.classes:
        some = ", ".join(network.classes[:3]) + (", ..." if len(network.classes) > 3 else "")
        console.line(f"classes taken to be {some}: --classes names them otherwise")
    console.line(
        f"normalised by mean {_shown(network.mean)} and std {_shown(network.std)}"
        + (", as given" if options.mean else f", as {options.from_project} does")
    )
    if config.stem == "imagenet":
        console.line(
            "! fastres serves images of 32x32 pixels: a network trained on larger ones says little "
            "of them",
            style="bold yellow",
        )
    console.line(f"{folder.path}: check it with fastres evaluate {folder.path}", style="bold")


def _shown(values: tuple[float, float, float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _to(options: ConvertOptions, console: "RunConsole") -> None:
    from fastres.conversion.converter import to_state_dict
    from fastres.conversion.files import write_state_dict
    from fastres.data.files import FILE, kind_at
    from fastres.inference.trained import load

    assert options.to_project is not None
    given = ("ema", options.ema), ("classes", options.classes), ("mean", options.mean)
    if unused := next((name for name, value in given if value), None):
        raise UsageError(f"--{unused} is for --from")
    out = Path(options.out)
    kind = kind_at(out)
    if kind is not None and not (kind == FILE and options.overwrite):
        raise UsageError(f"{out} is there already; --overwrite replaces a file")
    network = load(options.file)
    source = SOURCES[options.to_project]
    write_state_dict(out, to_state_dict(network, options.to_project), source)
    console.line(f"{out}: {network.config.model} as {source.url} has it", style="bold")
    if network.config.width != 1:
        console.line(
            f"! it is {network.config.width:g} times as wide as theirs, which must be made so, too",
            style="bold yellow",
        )
    if source.pads and network.config.shortcut == "B":
        console.line(
            "! its shortcuts project (option B); those of its scripts pad with zeros unless told",
            style="bold yellow",
        )
    ours = _shown(network.mean), _shown(network.std)
    theirs = source.normalisation.get(len(network.classes), source.otherwise)
    if ours != (_shown(theirs.mean), _shown(theirs.std)):
        console.line(
            f"! it wants images normalised by mean {ours[0]} and std {ours[1]}, and "
            f"{options.to_project} takes mean {_shown(theirs.mean)} and std {_shown(theirs.std)}",
            style="bold yellow",
        )


if __name__ == "__main__":
    sys.exit(main())
