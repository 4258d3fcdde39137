"""Train a ResNet on CIFAR: `python -m fastres.train [--fast]`.

Exit codes: 0 done, 1 failure, 2 bad use, 130 and 143 stopped by Ctrl-C and SIGTERM after saving.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastres.cli import guarded, parse, value_of
from fastres.config import Config, changed_options, from_json, validate
from fastres.errors import UsageError
from fastres.recipes import from_recipe

if TYPE_CHECKING:
    from fastres.engine.console import Screen
    from fastres.engine.distributed import Processes
    from fastres.engine.run_dir import RunFolder

__all__ = ["TrainOptions", "main"]

_DESCRIPTION = (
    "Train a ResNet on CIFAR-10. Without options: the plain eager PyTorch reference. With --fast: "
    "the same model, pixels and mathematics by the fastest route of this machine. For more "
    "accuracy choose --recipe standard (ResNet-20) or --recipe accurate (ResNet-18)."
)


@dataclass(frozen=True)
class TrainOptions(Config):
    """The options of a run and what to do with it."""

    out: str | None = None
    """Run folder; default: a new one under runs/."""
    config: str | None = None
    """JSON file of options, such as the config.json of a run; the command line overrides it."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, as if it had never stopped."""
    overwrite: bool = False
    """Replace the run that is in --out."""
    dry_run: bool = False
    """Print the network's layers and what would run, and stop."""
    json: bool = False
    """Print the summary alone on stdout, as JSON."""
    debug: bool = False
    """Show the traceback of an error."""

    def training(self) -> Config:
        """Return the options that belong to the run itself."""
        names = [field.name for field in dataclasses.fields(Config)]
        return Config(**{name: getattr(self, name) for name in names})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    return guarded(lambda: _run(arguments), debug=debug)


def _run(argv: list[str]) -> int:
    base = _base(argv)
    options = parse(
        TrainOptions,
        "python -m fastres.train",
        _DESCRIPTION,
        argv,
        TrainOptions(**base.to_json()),
    )
    config = validate(options.training())
    if options.out == "":
        raise UsageError("--out is empty; name a folder or leave the option out")
    if options.resume and (changed := changed_options(base.to_json(), config)):
        option = "--" + changed[0].replace("_", "-")
        raise UsageError(
            f"a resumed run keeps its {option} of {getattr(base, changed[0])}; start a new run to "
            "change it"
        )
    return _train(config, options)


def _base(argv: Sequence[str]) -> Config:
    """Find the options that the command line starts from: a run's, a file's or a recipe's."""
    recipe, file, out = (value_of(name, argv) for name in ("--recipe", "--config", "--out"))
    if "--resume" in argv:
        if out is None:
            raise UsageError("--resume needs --out, the folder of the run to continue")
        file = str(Path(out) / "config.json")
    if file is None:
        return from_recipe(Config.recipe if recipe is None else recipe)
    if recipe is not None:
        raise UsageError("--recipe does not go with --config or --resume, which name their own")
    try:
        text = Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the options in {file}: {error.strerror}") from None
    return from_json(text, file)


def _train(config: Config, options: TrainOptions) -> int:
    from fastres.engine.machine import keep_freed_memory

    if config.fast:
        keep_freed_memory()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from fastres.engine.distributed import join_processes

    with join_processes(config.device) as processes:
        return _train_with(processes, config, options)


def _train_with(processes: "Processes", config: Config, options: TrainOptions) -> int:
    from fastres.engine.console import Screen, layer_table
    from fastres.engine.run_dir import RunFolder, default_folder
    from fastres.engine.trainer import Stopped, Trainer

    screen = Screen(quiet_stdout=options.json, silent=not processes.is_main)
    folder = RunFolder(Path(options.out) if options.out else default_folder(config))
    if processes.is_main and not (options.dry_run or options.resume):
        folder.check_free(overwrite=options.overwrite)
    trainer = Trainer(config, folder, screen, processes)
    if options.dry_run:
        screen.console.print(layer_table(trainer.summary))
    trainer.show_header()
    if options.dry_run:
        return 0
    trainer.prepare()
    try:
        with folder.claimed() if processes.is_main else nullcontext():
            if processes.is_main and not options.resume:
                # Again, now that nobody else can start a run in it.
                folder.check_free(overwrite=options.overwrite)
                folder.clear()
                folder.write_json("config.json", config.to_json())
            summary = trainer.run(resume=options.resume)
    except Stopped as stopped:
        screen.line(f"{stopped}; go on with: python -m fastres.train --resume --out {folder.path}")
        return stopped.exit_code
    _report(summary, folder, screen, as_json=options.json and processes.is_main)
    return 0


def _report(summary: dict, folder: "RunFolder", screen: "Screen", *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=2))
    screen.line("")
    screen.line(
        f"{summary['test_accuracy']:.2f} % test accuracy on {summary['dataset']} after "
        f"{summary['train_seconds']:.1f} s of training "
        f"({summary['images_per_second']:,.0f} images/s)",
        style="bold",
    )
    screen.line(f"{folder.path}: weights, metrics.csv, curves.png, summary.json")


if __name__ == "__main__":
    sys.exit(main())
