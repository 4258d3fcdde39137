"""Settings proposed by Optuna from what earlier runs reached, instead of all combinations.

Settings are judged by the validation accuracy, never by the test images, on which the best of many
would look better than it is. What has been tried is kept in the sweep's folder, and Optuna is told
of it again when an interrupted search goes on. https://optuna.org
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastres.config import Config
from fastres.errors import UsageError
from fastres.sweeps.plan import Setting, parse_value, split_word

__all__ = ["Search", "Space", "parse_spaces"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")


@dataclass(frozen=True)
class Space:
    """Where an option is looked for: a range of numbers, or a list of values."""

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    values: tuple[Any, ...] = ()

    @property
    def ends(self) -> tuple[Any, ...]:
        """Return the values of a list, the two ends of a range."""
        if self.values:
            return self.values
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def distribution(self) -> Any:
        """Return it as Optuna has it."""
        from optuna import distributions

        if self.values:
            return distributions.CategoricalDistribution(self.values)
        kind: Any = distributions.IntDistribution if self.whole else distributions.FloatDistribution
        return kind(*self.ends, log=self.log)

    def rounded(self, value: Any) -> Any:
        """Return a proposed value, a fraction with the digits that a label shows."""
        if self.values or self.whole:
            return value
        return min(max(float(f"{value:g}"), self.low), self.high)


def parse_spaces(words: Sequence[str]) -> dict[str, Space]:
    """Read `name=low..high`, `name=low..high:log` and `name=value,value,...` words.

    A range between whole numbers holds fractions too where the option's default has a point.

    Raises:
        UsageError: for anything else.
    """
    spaces: dict[str, Space] = {}
    for word in words:
        name, text = split_word(word, "--space")
        if name in spaces:
            raise UsageError(f"--space names {name} twice")
        if (found := _RANGE.fullmatch(text)) is None:
            values = [parse_value(part.strip()) for part in text.split(",")]
            spaces[name] = Space(values=tuple(dict.fromkeys(values)))
            continue
        low, high = (parse_value(number) for number in found.groups()[:2])
        whole = isinstance(low, int) and isinstance(high, int)
        whole = whole and not isinstance(getattr(Config, name, None), float)
        log = found[3] is not None
        space = Space(float(low), float(high), log, whole)
        if not space.low < space.high or (log and space.low <= 0):
            raise UsageError(f"--space {word!r} is empty, or has no logarithm")
        spaces[name] = space
    return spaces


class Search:
    """A study of Optuna: `ask` for a setting, `add` what one reached.

    Args:
        spaces: of `parse_spaces`.
        num_known: settings that were tried before; the proposals are drawn from this seed, or a
            search that goes on would begin with the proposals that it began with.
    """

    def __init__(self, spaces: Mapping[str, Space], num_known: int):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._spaces = spaces
        self._distributions = {name: space.distribution() for name, space in spaces.items()}
        self._make_trial = optuna.trial.create_trial
        sampler = optuna.samplers.TPESampler(seed=num_known)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)

    def ask(self) -> Setting:
        """Return a setting to try."""
        proposed = self._study.ask(self._distributions).params
        spaces = self._spaces.items()
        return Setting({name: space.rounded(proposed[name]) for name, space in spaces})

    def add(self, setting: Setting, accuracy: float) -> None:
        """Learn what a setting reached on the validation images, in percent."""
        # The trial that proposed it stays open, which the sampler passes over.
        trial = self._make_trial(
            params=dict(setting.options), distributions=self._distributions, value=accuracy
        )
        self._study.add_trial(trial)
