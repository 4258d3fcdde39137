"""Train networks to see why: `python -m fastres.study degradation`, or `fastres study`.

Exit codes: 0 done, 1 failure, 2 bad use; 129, 130 and 143 stopped after saving, by a closed
terminal (SIGHUP), Ctrl-C (SIGINT) and SIGTERM.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastres.cli import guarded, parse, value_of
from fastres.config import Config, DatasetKind, validate
from fastres.errors import UsageError

__all__ = ["StudyOptions", "main"]

_DESCRIPTION = (
    "degradation: train plain and residual nets of growing depth by one recipe, and draw their "
    "training errors, the gradient that reaches the first layer, and F(x) beside x. See "
    "docs/why-residual.md."
)


@dataclass(frozen=True)
class StudyOptions:
    """What is trained, on what, and where it is kept."""

    study: Annotated[Literal["degradation"], tyro.conf.Positional] = "degradation"
    """What is studied."""
    depths: tuple[int, ...] = (8, 20, 56)
    """Layers of the nets, each trained with and without shortcuts: 8, 14, 20, 32, 44, 56, 110."""
    seeds: tuple[int, ...] = (0,)
    """Each net is trained once from every one of them."""
    epochs: float = 20.0
    """Passes over the training set."""
    limit_train: int | None = 5_000
    """Use only this many training images, the same share of every class; None: all."""
    batch_size: int = 64
    """Images a training step."""
    lr: float = 0.05
    """Peak learning rate."""
    schedule: Literal["one-cycle", "cosine", "steps", "constant"] = "steps"
    """Fall of the learning rate: linear, half a cosine, or divided by 10 at 1/2 and 3/4."""
    warmup: float = 0.1
    """Share of the run in which the learning rate rises linearly from zero; the paper's is 0."""
    width: float = 1.0
    """Multiplies the number of filters of every layer."""
    dataset: Literal["auto", DatasetKind] = "auto"
    """auto: what is in the data folder, else download CIFAR-10, else synthetic pictures."""
    data_dir: str | None = None
    """Folder of CIFAR archives or of train/<class>/*; default: $FASTRES_DATA, user cache."""
    fast: bool = False
    """Train by the fastest route of this machine; without it, the eager fp32 reference."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU where there is one."""
    threads: int | None = None
    """CPU threads of torch; default: all cores."""
    out: str | None = None
    """Folder of the study; default: a new one under runs/."""
    resume: bool = False
    """Go on with the study in --out; with other --depths or --seeds, with those."""
    overwrite: bool = False
    """Replace the study that is in --out."""
    debug: bool = False
    """Show the traceback of an error."""

    def recipe(self) -> Config:
        """Return the options that all nets share.

        What has no option here is the paper's: weight decay 1e-4, crops and flips, and shortcuts
        without parameters; but momentum is Nesterov's, and batch norm and biases do not decay. The
        paper's rate begins at its peak, which a short run does not make up for: deep residual nets
        start with large logits.

        Raises:
            UsageError: for a value that an option may not have.
        """
        names = {field.name for field in dataclasses.fields(Config)}
        given = {name: value for name, value in vars(self).items() if name in names}
        fixed = {"recipe": "degradation", "shortcut": "A", "weight_decay": 1e-4}
        return validate(Config(**(given | fixed)))


# Where and how it computes, and what becomes of it: these may differ in a resumed study. So may
# the nets: those that have ended stay.
_FREE = {"depths", "seeds", "data_dir", "fast", "device", "threads", "out", "resume", "overwrite"}
_FREE |= {"debug"}
_NOT_RECORDED = {"out", "resume", "overwrite", "debug"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments, result_is_printed=False)


def _run(argv: list[str]) -> int:
    base = _base(argv)
    options = parse(StudyOptions, "python -m fastres.study", _DESCRIPTION, argv, base)
    if options.out == "":
        raise UsageError("--out is empty; name a folder or leave the option out")
    recipe = options.recipe()
    if options.resume:
        _check_unchanged(vars(base), options)
    if options.fast:
        from fastres.engine.machine import keep_freed_memory

        keep_freed_memory()
    return _study(options, recipe)


def _base(argv: Sequence[str]) -> StudyOptions:
    """Find what the command line starts from: the options of the study to resume, or defaults."""
    if "--resume" not in argv:
        # Without a default the name must be given, so that no other word starts hours of work.
        return dataclasses.replace(StudyOptions(), study=tyro.MISSING)
    out = value_of("--out", argv)
    if out is None:
        raise UsageError("--resume needs --out, the folder of the study to go on with")
    from fastres.studies.folder import StudyDir

    return _from_json(StudyDir(Path(out)).options(), out)


def _from_json(values: Mapping[str, Any], out: str) -> StudyOptions:
    """Read the options that a study has written.

    Raises:
        UsageError: for an option that no study has, and for lists that are none; what else an
            option may be is asked later.
    """
    names = {field.name for field in dataclasses.fields(StudyOptions)} - _NOT_RECORDED
    if unknown := sorted(values.keys() - names):
        raise UsageError(f"{out} holds a study with unknown options: {', '.join(unknown)}")
    lists = {name: values.get(name) for name in ("depths", "seeds")}
    for name, numbers in lists.items():
        if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
            raise UsageError(f"{out} holds a study whose {name} are no list of whole numbers")
    return StudyOptions(**{**values, **{name: tuple(lists[name] or ()) for name in lists}})


def _check_unchanged(before: Mapping[str, Any], after: StudyOptions) -> None:
    """Refuse to go on with nets of another recipe than those that have ended."""
    for name, value in before.items():
        if name not in _FREE and getattr(after, name) != value:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"a resumed study keeps its {option} of {value}; start a new study to change it"
            )


def _study(options: StudyOptions, recipe: Config) -> int:
    from fastres.engine.console import RunConsole
    from fastres.engine.signals import Stopped
    from fastres.studies.degradation import DegradationStudy, studied_nets
    from fastres.studies.folder import StudyDir, default_study_folder

    folder = StudyDir(Path(options.out)) if options.out else default_study_folder()
    nets = studied_nets(options.depths, options.seeds)
    if not options.resume:
        folder.check_free(overwrite=options.overwrite)
    study = DegradationStudy(nets, recipe, folder, RunConsole(), _command(options))
    recorded = {k: v for k, v in vars(options).items() if k not in _NOT_RECORDED}
    recorded |= {name: getattr(study.recipe, name) for name in ("dataset", "data_dir")}
    try:
        with folder.claimed():
            if options.resume:
                folder.change(recorded)
            else:
                folder.begin(recorded, overwrite=options.overwrite)
            study.run(recorded)
    except Stopped as stopped:
        again = f"python -m fastres.study degradation --resume --out {folder.path}"
        study.console.line(f"{stopped}; go on with: {again}")
        return stopped.exit_code
    study.console.line("")
    study.console.line(
        f"{folder.path}: degradation.png, results.json, epochs.csv, layers.csv, blocks.csv",
        style="bold",
    )
    return 0


def _command(options: StudyOptions) -> list[str]:
    """Return the words that repeat a study, however it was begun and resumed."""
    words = ["python", "-m", "fastres.study", "degradation"]
    for field in dataclasses.fields(StudyOptions):
        value = getattr(options, field.name)
        if field.name in ("study", *_NOT_RECORDED) or value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else [value])
    return words


if __name__ == "__main__":
    sys.exit(main())
