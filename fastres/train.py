"""Train a ResNet on CIFAR: `python -m fastres.train [--fast]`, or `fastres train`.

Exit codes: 0 done, 1 failure, 2 bad use; 129, 130 and 143 stopped after saving, by a closed
terminal (SIGHUP), Ctrl-C (SIGINT) and SIGTERM.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fastres import strict_json
from fastres.callable_module import make_callable
from fastres.cli import guarded, parse, tell_launcher, value_of
from fastres.config import (
    Config,
    DataOptions,
    DatasetKind,
    MachineOptions,
    NetworkOptions,
    OptimisationOptions,
    RunOptions,
    TrackerName,
    changed_options,
    checked_options,
    validate,
)
from fastres.errors import UsageError
from fastres.option_files import read_table
from fastres.recipe_file import find_recipe
from fastres.recipes import Origins, origins, resolve

if TYPE_CHECKING:
    from fastres.engine.console import RunConsole
    from fastres.engine.distributed import Processes
    from fastres.engine.run_dir import RunDir
    from fastres.engine.summary import Summary

__all__ = ["TrainOptions", "main"]

T = TypeVar("T")

_DESCRIPTION = (
    "Train a ResNet on CIFAR-10. Without options: the plain eager PyTorch reference. With --fast: "
    "the same model, pixels and mathematics by the fastest route of this machine. For a "
    "larger network, trained for long, choose --recipe accurate (a ResNet-18)."
)


@dataclass(frozen=True)
class TrainRunOptions(RunOptions):
    """What is run, and what becomes of it."""

    out: str | None = None
    """Run folder; default: a new one under runs/."""
    config: str | None = None
    """File of options (.json, .toml), such as a run's config.json, in place of a recipe."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, as if it had never stopped."""
    overwrite: bool = False
    """Replace the run that is in --out."""
    track: tuple[TrackerName, ...] = ()
    """Also follow the run with TensorBoard (in its folder), Weights & Biases, MLflow."""
    dry_run: bool = False
    """Print the network's layers and what would run, and stop."""
    json: bool = False
    """Print the summary alone on stdout, as JSON."""
    debug: bool = False
    """Show the traceback of an error, and the details of what failed on the way."""


@dataclass(frozen=True)
class TrainOptions:
    """The groups of `--help`, in its order."""

    run: TrainRunOptions
    data: DataOptions
    network: NetworkOptions
    optimisation: OptimisationOptions
    machine: MachineOptions

    @classmethod
    def of(cls, config: Config) -> "TrainOptions":
        """Put the options of a run into their groups."""
        values = config.to_json()

        def group(kind: type[T]) -> T:
            names = {field.name for field in dataclasses.fields(cast(Any, kind))} & values.keys()
            return kind(**{name: values[name] for name in names})

        return cls(
            run=group(TrainRunOptions),
            data=group(DataOptions),
            network=group(NetworkOptions),
            optimisation=group(OptimisationOptions),
            machine=group(MachineOptions),
        )

    def to_config(self) -> Config:
        """Return the options that belong to the run itself."""
        given = {k: v for group in vars(self).values() for k, v in vars(group).items()}
        return Config(**{field.name: given[field.name] for field in dataclasses.fields(Config)})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(
        lambda: _run(arguments),
        debug="--debug" in arguments,
        # Otherwise the result is the run folder, and the rows are there too.
        result_is_printed="--json" in arguments,
    )


def _run(argv: list[str]) -> int:
    base, layers = _base(argv)
    groups = parse(
        TrainOptions, "python -m fastres.train", _DESCRIPTION, argv, TrainOptions.of(base)
    )
    # Of a recipe in a file, the command line has the path and the run its name.
    options, config = groups.run, validate(groups.to_config().replace(recipe=base.recipe))
    if options.out == "":
        raise UsageError("--out is empty; name a folder or leave the option out")
    if options.resume and (changed := changed_options(base.to_json(), config)):
        option = "--" + changed[0].replace("_", "-")
        raise UsageError(
            f"a resumed run keeps its {option} of {getattr(base, changed[0])}; start a new run to "
            "change it"
        )
    return _train(config, options, origins(config, base, layers))


def _base(argv: Sequence[str]) -> tuple[Config, Origins]:
    """Return what the command line starts from: a run's, a file's or a recipe's options.

    And where those came from.
    """
    recipe, file, out, model, epochs, steps = (
        value_of(f"--{name}", argv)
        for name in ("recipe", "config", "out", "model", "epochs", "steps")
    )
    if epochs is not None and steps is not None:
        raise UsageError("--epochs and --steps are two lengths of one run; give one of them")
    if "--resume" in argv:
        if file is not None:
            raise UsageError("--config does not go with --resume: a run keeps its own options")
        if out is None:
            raise UsageError("--resume needs --out, the folder of the run to continue")
        file = str(Path(out) / "config.json")
    if file is None:
        base, layers = resolve(*find_recipe(Config.recipe if recipe is None else recipe), model)
    elif recipe is not None:
        raise UsageError("--recipe does not go with --config or --resume, which name their own")
    else:
        base = Config(**checked_options(read_table(file), file))
        plain = Config().to_json()
        layers = {file: {k: v for k, v in base.to_json().items() if v != plain[k]}}
        if model is not None and model != base.model:
            # A width belongs to the network that it was chosen for.
            base = base.replace(width=Config.width)
    if epochs is not None and "--resume" not in argv:
        base = base.replace(steps=None)
    return base, layers


def _train(config: Config, options: TrainRunOptions, chosen: Origins) -> int:
    from fastres.engine.launch import prepare_process

    prepare_process(config)
    from fastres.engine.distributed import join_processes

    with join_processes(config.device) as processes:
        return _train_with(processes, config, options, chosen)


def _train_with(
    processes: "Processes", config: Config, options: TrainRunOptions, chosen: Origins
) -> int:
    from fastres.engine.console import RunConsole, layer_table
    from fastres.engine.launch import run_in_folder
    from fastres.engine.run_dir import RunDir, default_folder
    from fastres.engine.signals import Stopped
    from fastres.engine.trackers import Trackers
    from fastres.engine.trainer import Trainer

    console = RunConsole(quiet_stdout=options.json, silent=not processes.is_main)
    trackers = Trackers(options.track, console)
    folder = RunDir(Path(options.out)) if options.out else default_folder(config)
    if processes.is_main and not (options.dry_run or options.resume):
        folder.check_free(overwrite=options.overwrite)
    if options.resume and config.dataset == "auto":
        config = config.replace(dataset=_dataset_of(folder, console))
    trainer = Trainer(config, folder, console, processes)
    if options.dry_run:
        console.rich.print(layer_table(trainer.model_summary))
    console.origins(chosen)
    trainer.show_header()
    if options.dry_run:
        return 0
    try:
        summary = run_in_folder(
            trainer,
            folder,
            processes,
            resume=options.resume,
            overwrite=options.overwrite,
            trackers=trackers,
        )
    except Stopped as stopped:
        advice = f"{stopped}; go on with: python -m fastres.train --resume --out {folder.path}"
        console.line(advice)
        tell_launcher(advice)
        return stopped.exit_code
    _report(summary, folder, console, as_json=options.json and processes.is_main)
    return 0


def _dataset_of(folder: "RunDir", console: "RunConsole") -> DatasetKind:
    """Return the kind of data that the checkpoint names, for a config.json that only says auto."""
    from fastres.data.source import dataset_kind
    from fastres.engine import checkpoint

    kind = dataset_kind(checkpoint.read(folder.file("last"))[1]["dataset"])
    console.line(
        f"resume     the dataset is {kind}, as the checkpoint names it: config.json says auto, as "
        "earlier versions wrote it"
    )
    return kind


def _report(summary: "Summary", folder: "RunDir", console: "RunConsole", *, as_json: bool) -> None:
    if as_json:
        print(strict_json.dumps(summary, indent=2))
    console.line("")
    console.line(
        f"{summary['test_accuracy']:.2f} % test accuracy on {summary['dataset']} after "
        f"{summary['train_seconds']:.1f} s of training "
        f"({summary['images_per_second']:,.0f} images/s)",
        style="bold",
    )
    console.line(f"{folder.path}: weights, metrics.csv, curves.png, summary.json")


make_callable(__name__)

if __name__ == "__main__":
    sys.exit(main())
