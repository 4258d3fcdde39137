"""Which runs a sweep makes: the product of the options that are given as lists, times seeds."""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastres.config import Config, NetworkOptions, checked_options, replaced, validate
from fastres.errors import UsageError
from fastres.recipe_file import find_recipe
from fastres.recipes import resolve

__all__ = [
    "PlannedRun",
    "Setting",
    "parse_lists",
    "parse_value",
    "planned_runs",
    "settings_of",
    "split_word",
]

_NAME_LENGTH = 60


@dataclass(frozen=True)
class Setting:
    """What one setting changes; `label` names it in tables, `name` in file names."""

    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Return the options as words, `base` where there are none."""
        return ", ".join(f"{k}={_word(v)}" for k, v in self.options.items()) or "base"

    @property
    def name(self) -> str:
        """Return the label as a file name; one that is long or odd is told apart by a hash."""
        words = self.label.replace(", ", "_").replace("=", "_")
        plain = re.sub(r"[^\w.+-]+", "_", words)
        if plain == words and len(plain) <= _NAME_LENGTH:
            return plain
        digest = hashlib.sha256(self.label.encode()).hexdigest()[:8]
        return f"{plain[: _NAME_LENGTH - 9]}-{digest}"


@dataclass(frozen=True)
class PlannedRun:
    """One run: a setting from a seed, with all its options."""

    setting: Setting
    config: Config

    @property
    def name(self) -> str:
        """Return what its folder is called."""
        return f"{self.setting.name}-seed{self.config.seed}"

    @property
    def work(self) -> int:
        """Return the floating-point operations of a training step, about."""
        return self.config.batch_size * _image_flops(_network_of(self.config))


def _network_of(config: Config) -> NetworkOptions:
    names = (field.name for field in dataclasses.fields(NetworkOptions))
    return NetworkOptions(**{name: getattr(config, name) for name in names})


@functools.cache
def _image_flops(options: NetworkOptions) -> int:
    """Return the operations of one image's training step.

    Raises:
        UsageError: for a network that there is not.
    """
    from fastres.model.resnet import network_of
    from fastres.model.summary import summarize

    return summarize(network_of(options, num_classes=10)).training_flops


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, float):
        return str(value)
    # Two settings never share a label.
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def parse_value(text: str) -> Any:
    """Return a number, a truth value, null or a string as JSON has it, all else as text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, list | dict) else value


def split_word(word: str, option: str) -> tuple[str, str]:
    """Return the name, as in `Config`, and the text behind it of a `name=text` word.

    Raises:
        UsageError: naming `option`, for a word of another form.
    """
    name, equals, text = word.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name:
        raise UsageError(f"{option} {word!r} must be NAME=VALUE")
    return name, text.strip()


def parse_lists(words: Sequence[str], option: str) -> dict[str, list[Any]]:
    """Read `name=value,value,...` words.

    Raises:
        UsageError: for a word without `=`, an option given twice, and no value.
    """
    found: dict[str, list[Any]] = {}
    for word in words:
        name, text = split_word(word, option)
        if name in found:
            raise UsageError(f"{option} names {name} twice; its values belong in one list")
        found[name] = [parse_value(part.strip()) for part in text.split(",")]
        if "" in found[name]:
            raise UsageError(f"{option} {word!r} has an empty value")
    return found


def settings_of(lists: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Return every combination of values, the last option varying fastest."""
    return [
        Setting(dict(zip(lists, values, strict=True)))
        for values in itertools.product(*lists.values())
    ]


def planned_runs(
    settings: Sequence[Setting],
    seeds: Sequence[int],
    *,
    recipe: str,
    common: Mapping[str, Any],
    option: str = "--set",
) -> list[PlannedRun]:
    """Return the runs, seed by seed, so that a sweep that is cut off has all settings.

    Each setting starts from the recipe as it is for the network of that setting.

    Args:
        settings: of `settings_of`.
        seeds: numbers.
        recipe: of fastres or a file; a setting may name another one.
        common: options of all runs, which a setting may change.
        option: of the command line that they come from, for errors.

    Raises:
        UsageError: naming an option that there is not, or a value that it may not have.
    """
    configs = [_config(setting, recipe, common, option) for setting in settings]
    runs = [
        PlannedRun(setting, config.replace(seed=seed))
        for seed in seeds
        for setting, config in zip(settings, configs, strict=True)
    ]
    if len({run.name for run in runs}) < len(runs):
        raise UsageError("two settings of the sweep are the same")
    return runs


def _config(setting: Setting, recipe: str, common: Mapping[str, Any], option: str) -> Config:
    """Return all options of a setting, but for the seed."""
    changes = checked_options(replaced(common, setting.options), option)
    if "seed" in changes:
        raise UsageError(f"{option} seed: seeds are given with --seeds")
    if "epochs" in changes and changes.get("steps") is not None:
        raise UsageError(f"{option} epochs and steps are two lengths of one run; give one of them")
    name, found = find_recipe(changes.pop("recipe", recipe))
    base, _ = resolve(name, found, changes.get("model"))
    config = validate(Config(**replaced(base.to_json(), changes)))
    # A network that there is not is told of here, once.
    _image_flops(_network_of(config))
    return config
