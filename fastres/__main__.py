"""All commands under one name: `fastres COMMAND ...`, or `python -m fastres COMMAND ...`.

Exit codes: those of the command; 0 after help, 2 for an unknown command.
"""

import importlib
import sys
from collections.abc import Sequence

from fastres import __version__
from fastres.output import reader_may_leave

__all__ = ["COMMANDS", "main"]

# Name: module, what it does.
COMMANDS = {
    "train": ("fastres.train", "train a ResNet on CIFAR"),
    "evaluate": ("fastres.evaluate", "say how good a trained network is, class by class"),
    "predict": ("fastres.predict", "say what images show"),
    "report": ("fastres.report", "write one HTML file about runs"),
    "sweep": ("fastres.sweep", "make many runs and say which settings differ"),
    "export": ("fastres.export", "write a network as ONNX, torch.export, safetensors, for the Hub"),
    "convert": ("fastres.convert", "use other projects' weights, and give them yours"),
    "doctor": ("fastres.doctor", "say what this machine has and whether it works"),
    "recipe": ("fastres.recipe_file", "print a recipe, to start one of your own"),
    "study": ("fastres.study", "see why shortcuts help: train plain and residual nets"),
    "completion": ("fastres.completion", "print what completes commands in a shell"),
    "parity": ("fastres.kernels.tools.parity", "say which kernels are right on this machine"),
    "tune": ("fastres.kernels.tools.tune", "measure this GPU and write its launch table"),
    "warm": ("fastres.kernels.tools.warm", "compile the Triton kernels before they are needed"),
    "codegen": ("fastres.kernels.tools.codegen", "what the Triton kernels compile to"),
}


@reader_may_leave()
def _print_help() -> None:
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    usage = ["usage: fastres COMMAND [OPTION ...]", ""]
    print("\n".join([*usage, *lines, "", "fastres COMMAND --help lists the options of one."]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return 0
    if arguments == ["--version"]:
        print(f"fastres {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: unknown command {name!r}; the commands are {known}", file=sys.stderr)
        return 2
    command = importlib.import_module(COMMANDS[name][0])
    # Records name the command line that repeats them, which is the command's own.
    before, sys.argv = sys.argv, [name, *rest]
    try:
        return command.main(rest)
    finally:
        sys.argv = before


if __name__ == "__main__":
    sys.exit(main())
