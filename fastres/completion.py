"""Completion of commands, options and their values in a shell: `fastres completion bash`.

    fastres completion bash > ~/.local/share/bash-completion/completions/fastres
    fastres completion zsh > ~/.fastres-completion     and in ~/.zshrc: source ~/.fastres-completion
    fastres completion fish > ~/.config/fish/completions/fastres.fish

Words are looked up in the script alone: no Python starts at a tab. Everything else, such as a run
folder, is completed as a file.

Exit codes: 0 done, 2 bad use.
"""

import dataclasses
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from fastres.__main__ import COMMANDS
from fastres.cli import guarded, parse
from fastres.recipes import RECIPES

__all__ = ["CompletionOptions", "main", "script", "words_of"]

_DESCRIPTION = (
    "Print a script that completes commands, options and their values. "
    "Example: fastres completion bash > ~/.local/share/bash-completion/completions/fastres"
)


@dataclass(frozen=True)
class CompletionOptions:
    """For which shell."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """bash, zsh or fish."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _run(argv: list[str]) -> int:
    options = parse(CompletionOptions, "fastres completion", _DESCRIPTION, argv)
    print(script(options.shell), end="")
    return 0


def script(shell: Literal["bash", "zsh", "fish"]) -> str:
    """Return what a shell reads to complete all commands."""
    if shell == "fish":
        return _fish_script()
    # zsh runs completions that are written for bash.
    return (_ZSH if shell == "zsh" else "") + _bash_script()


def words_of(command: str) -> dict[str, tuple[str, ...] | None]:
    """Return the words that may follow `fastres COMMAND`: options, and those of a fixed choice.

    Returns:
        {--option: its values}, no values for whatever has no fixed ones, None for a switch that
        takes none; under the command's own name, what may stand directly behind it.
    """
    from fastres.model.resnet import MODELS

    module_name = COMMANDS[command][0]
    words: dict[str, tuple[str, ...] | None] = {"--help": None}
    if command == "recipe":
        words[command] = tuple(RECIPES)
    # Those of the kernels' tools read their options themselves.
    elif not module_name.startswith("fastres.kernels."):
        module = importlib.import_module(module_name)
        words |= _words_of_options(getattr(module, f"{command.capitalize()}Options"), command)
    for option, values in (("--model", tuple(MODELS)), ("--recipe", tuple(RECIPES))):
        if option in words:
            words[option] = values
    return words


def _words_of_options(kind: Any, command: str) -> Iterator[tuple[str, tuple[str, ...] | None]]:
    hints = get_type_hints(kind, include_extras=True)
    argument: Any = type(tyro.conf.arg())  # tyro does not name the class
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        notes: tuple[Any, ...] = getattr(hint, "__metadata__", ())
        named = (note.name for note in notes if isinstance(note, argument))
        name = (next(named, None) or field.name).replace("_", "-")
        if dataclasses.is_dataclass(hint):  # a group of options
            yield from _words_of_options(hint, command)
        elif hint is bool:
            yield from ((f"--{name}", None), (f"--no-{name}", None))
        elif tyro.conf.Positional not in notes:
            yield f"--{name}", _choices(hint)
        elif choices := _choices(hint):
            yield command, choices


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the words of every Literal in a type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(word for part in get_args(hint) for word in _choices(part))


_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
_BASH = """\
_fastres() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  if [ "$COMP_CWORD" -eq 1 ]; then words="{commands}"; else
    case "${{COMP_WORDS[1]}} $before" in
{values}
      *) case "$current" in -*) case "${{COMP_WORDS[1]}}" in
{options}
      esac ;; esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _fastres fastres
"""


def _bash_script() -> str:
    values, options = [], []
    for command in COMMANDS:
        words = words_of(command)
        names = " ".join(name for name in words if name != command)
        options.append(f'        {command}) words="{names}" ;;')
        for name, choices in words.items():
            if choices:
                values.append(f'      "{command} {name}") words="{" ".join(choices)}" ;;')
    return _BASH.format(
        commands=" ".join(COMMANDS), values="\n".join(values), options="\n".join(options)
    )


def _fish_script() -> str:
    lines = []
    for command, (_, what) in COMMANDS.items():
        told = what.replace("'", "\\'")
        lines.append(f"complete -c fastres -f -n __fish_use_subcommand -a {command} -d '{told}'")
        for name, choices in words_of(command).items():
            start = f"complete -c fastres -n '__fish_seen_subcommand_from {command}'"
            option = "" if name == command else f" -l {name[2:]}"
            if choices:
                # Behind an option nothing else may stand; in the first place an option may.
                lines.append(f"{start}{option} {'-x' if option else '-f'} -a '{' '.join(choices)}'")
            else:
                lines.append(f"{start}{option}{'' if choices is None else ' -r'}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
