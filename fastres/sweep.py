"""Many runs with one command: `fastres sweep --seeds 5 --set lr=0.1,0.2`.

    fastres sweep --seeds 5 --set lr=0.1,0.2 --set model=resnet20,resnet32 --fast
    fastres sweep sweep.toml                            the same from a file
    fastres sweep --resume --out runs/sweep-...         go on with one that was interrupted
    fastres sweep --search 30 --space lr=0.01..1:log --fast
    fastres sweep --seeds 5 --set lr=0.1,0.2 --engine slurm --engine-option slurm_partition=gpu

As many runs at once as are measured to be the fastest on this machine (--jobs says otherwise). Each
is a run folder as of fastres train. In the end a row a setting: mean, sd, n, 95 % interval, and
whether its difference from the first setting is larger than the seeds' spread (Welch's t-test).

Exit codes: 0 done, 1 failure or some run failed, 2 bad use; 129, 130 and 143 stopped by a closed
terminal (SIGHUP), Ctrl-C (SIGINT) and SIGTERM, after all runs have saved.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastres.cli import guarded, parse, value_of
from fastres.errors import FailureError, UsageError

if TYPE_CHECKING:
    from fastres.sweeps.runner import Runner

__all__ = ["SweepOptions", "main"]

_DESCRIPTION = (
    "Make many runs, and say which settings differ by more than their seeds. "
    "Example: fastres sweep --seeds 5 --set lr=0.1,0.2 --fast"
)


@dataclass(frozen=True)
class SweepOptions:
    """Which runs, how many at once, and where they are kept."""

    config: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = None
    """File with options of the sweep (.toml, .json), before those of the command line: seeds = 5,
    and a table [set] with lr = [0.1, 0.2]."""
    seeds: int = 3
    """Runs of each setting, from the seeds 0, 1, 2, ..."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE for an option of all runs, NAME=A,B,C for settings that are compared; several make
    every combination. Names are those of fastres train."""
    recipe: str = "quick"
    """What the settings start from: a recipe of fastres, or your own file (.toml, .json). Recipes
    of fastres are compared with --set recipe=quick,standard."""
    fast: bool = False
    """Train by the fastest route of this machine; without it, the eager fp32 reference."""
    jobs: int | None = None
    """Runs at once; default: as many as are measured to be the fastest together, 64 on Slurm."""
    search: int | None = None
    """Make so many runs of settings from --space, each proposed by Optuna from what the earlier
    ones reached on held-out validation images (val=true)."""
    space: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """For --search: NAME=LOW..HIGH, NAME=LOW..HIGH:log, or NAME=A,B,C."""
    engine: Literal["local", "slurm", "submitit-local"] = "local"
    """Where runs are computed: on this machine; on a Slurm cluster, through submitit; or by
    submitit's own processes on this machine."""
    engine_option: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE for submitit: slurm_partition, timeout_min, gpus_per_node, cpus_per_task, ...; on
    nodes with GPUs gpus_per_node=1."""
    out: str | None = None
    """Folder of the sweep; default: a new one under runs/. For slurm, one that all nodes see."""
    resume: bool = False
    """Go on with the sweep in --out; with more --seeds, with those."""
    overwrite: bool = False
    """Replace the sweep that is in --out."""
    json: bool = False
    """Print the settings' rows as JSON."""
    debug: bool = False
    """Show the traceback of an error."""


# What a resumed sweep may change: how it is computed, and how many runs a setting has.
_FREE = {"seeds", "jobs", "search", "engine", "engine_option"}
_NOT_RECORDED = {"config", "out", "resume", "overwrite", "json", "debug"}
_REPEATED = ("set", "space", "engine_option")
# What decides how much memory a run takes.
_SIZES = ("model", "width", "batch_size")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(
        lambda: _run(arguments),
        debug="--debug" in arguments,
        result_is_printed="--json" in arguments,
    )


def _run(argv: list[str]) -> int:
    options = _parsed(argv)
    _check(options)
    _check_resumed(options)
    # Before anything is written, so that wrong options are told of at once.
    work = _planned(options)
    engine_options = _engine_options(options.engine_option)
    if options.search is not None:
        _require("optuna", "--search")
    if options.engine != "local":
        _require("submitit", f"--engine {options.engine}")
    from fastres.engine.console import RunConsole
    from fastres.engine.signals import Stopped
    from fastres.sweeps.folder import SweepDir, default_sweep_folder
    from fastres.sweeps.runner import Runner

    console = RunConsole(quiet_stdout=options.json)
    folder = SweepDir(Path(options.out)) if options.out else default_sweep_folder()
    if not options.resume:
        folder.check_free(overwrite=options.overwrite)
    runner = Runner(
        folder, console, options.jobs, options.engine, engine_options, as_json=options.json
    )
    recorded = {k: v for k, v in vars(options).items() if k not in _NOT_RECORDED}
    try:
        with folder.claimed():
            if options.resume:
                folder.change(recorded)
            else:
                folder.begin(recorded, overwrite=options.overwrite)
            return work(runner)
    except Stopped as stopped:
        console.line(f"{stopped}; go on with: fastres sweep --resume --out {folder.path}")
        return stopped.exit_code


def _parsed(argv: list[str]) -> SweepOptions:
    """Read the command line, behind what its config file says."""
    options = parse(SweepOptions, "fastres sweep", _DESCRIPTION, argv, _base(argv))
    if options.config is None:
        return options
    if options.resume:
        raise UsageError("a resumed sweep keeps its options; leave out the config file")
    from fastres.sweeps.config_file import words_of_file

    names = {field.name for field in dataclasses.fields(options)} - {"config", "resume", "debug"}
    given = {name: getattr(options, name) for name in _REPEATED}
    words = words_of_file(options.config, names, given)
    return parse(SweepOptions, "fastres sweep", _DESCRIPTION, [*words, *argv], SweepOptions())


def _planned(options: SweepOptions) -> "Callable[[Runner], int]":
    """Return what the runner is to do.

    Raises:
        UsageError: for an option of a run that there is not, or a value that it may not have.
    """
    from fastres.sweeps.plan import PlannedRun, Setting, parse_lists, planned_runs, settings_of
    from fastres.sweeps.search import parse_spaces

    lists = parse_lists(options.set, "--set")
    common: dict[str, Any] = {"fast": options.fast}
    common |= {name: values[0] for name, values in lists.items() if len(values) == 1}
    compared = {name: values for name, values in lists.items() if len(values) > 1}
    recipe, count = options.recipe, options.search
    if count is None:
        settings, seeds = settings_of(compared), range(options.seeds)
        runs = planned_runs(settings, seeds, recipe=recipe, common=common)
        return lambda runner: runner.grid(runs)

    spaces = parse_spaces(options.space)
    if twice := [name for name in lists if name in spaces]:
        raise UsageError(f"{twice[0]} is in --set and in --space; give it in one of them")
    if compared:
        raise UsageError("with --search, values to choose from belong into --space")
    if not common.setdefault("val", True):
        raise UsageError("--search judges by validation images: leave out --set val=false")

    def planned(setting: Setting, seed: int) -> PlannedRun:
        option = "--set or --space"
        [run] = planned_runs([setting], [seed], recipe=recipe, common=common, option=option)
        return run

    for name, space in spaces.items():
        for end in space.ends:
            planned(Setting({name: end}), 0)
    sizes = {name: spaces[name].ends for name in _SIZES if name in spaces}
    largest = [planned(setting, 0) for setting in settings_of(sizes)]
    return lambda runner: runner.search(spaces, count, planned, largest)


def _engine_options(words: Sequence[str]) -> dict[str, Any]:
    """Return what NAME=VALUE words say, the later one where a name comes twice."""
    from fastres.sweeps.plan import parse_value, split_word

    pairs = (split_word(word, "--engine-option") for word in words)
    return {name: parse_value(text) for name, text in pairs}


def _base(argv: Sequence[str]) -> SweepOptions:
    """Return what the command line starts from: the sweep to go on with, or the defaults."""
    if "--resume" not in argv:
        return SweepOptions()
    out = value_of("--out", argv)
    if out is None:
        raise UsageError("--resume needs --out, the folder of the sweep to go on with")
    from fastres.sweeps.folder import SweepDir

    values = SweepDir(Path(out)).options()
    names = {field.name for field in dataclasses.fields(SweepOptions)} - _NOT_RECORDED
    if values.keys() != names:
        raise FailureError(f"{out} holds a sweep of another version of fastres")
    for name in names - _FREE:
        option = "--" + name.replace("_", "-")
        if value_of(option, argv) is not None or {option, f"--no-{name}"} & set(argv):
            raise UsageError(f"a resumed sweep keeps its {option}; start a new sweep to change it")
    recorded: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return SweepOptions(**recorded)


def _check(options: SweepOptions) -> None:
    if options.out == "":
        raise UsageError("--out is empty; name a folder or leave the option out")
    for name in ("seeds", "jobs", "search"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if (options.search is None) != (not options.space):
        raise UsageError("--search and --space belong together: how many settings, and from where")
    if options.search is not None and options.engine != "local":
        raise UsageError("--search runs on this machine: leave out --engine")
    if options.engine_option and options.engine == "local" and not options.resume:
        raise UsageError("--engine-option is for --engine slurm and submitit-local")


def _check_resumed(options: SweepOptions) -> None:
    """Refuse what would leave runs of the sweep out of its tables."""
    if not options.resume:
        return
    if options.overwrite:
        raise UsageError("--resume goes on with a sweep and --overwrite replaces it; give one")
    from fastres.sweeps.folder import SweepDir

    before = SweepDir(Path(options.out or "")).options()
    for name in ("seeds", "search"):
        now, then = getattr(options, name), before[name]
        if now is not None and then is not None and now < then:
            raise UsageError(f"the sweep has --{name} {then} already; a resumed one only adds")


def _require(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{option} needs {package}: pip install {package}")


if __name__ == "__main__":
    sys.exit(main())
