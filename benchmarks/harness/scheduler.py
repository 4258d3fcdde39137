"""Groups of providers measured in turns, inside a budget of seconds.

A suite's test asks for its provider's times; the first to ask has its whole group measured, with
all providers of it that were selected. A group's share of the budget is its weight's: what early
groups leave over, or overdraw, goes to the later ones.
"""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.ablation import Unavailable
from benchmarks.harness.records import BenchmarkInfo, FinalStats
from benchmarks.harness.timing import Sample, interleave

__all__ = ["Measured", "Prepared", "Scheduler", "Started"]

# Nothing of a group begins after it has spent this much of its share, and something for what is
# paid once: the first import, the first compilation.
_OVERDRAFT = 2.0
_ONCE_S = 5.0
# Whoever interrupts waits no longer than some seconds for the report.
_MOMENT_S = 1.0
# A group that would get less than this part of what it wants is left out.
_WORTHWHILE = 0.1


@dataclass
class Prepared:
    """A provider that is ready, and checked, to be timed.

    Attributes:
        sample: runs one round, returns seconds a call.
        info: facts about a call: images, bytes, flops, dtype, clock ...
        finish: called after the last round; returns further facts.
        warm: whether a first round, which does not count, shall warm it up.
        rounds: at most so many.
        every: takes part in every so many turns alone, where others shall have more rounds.
    """

    sample: Sample
    info: BenchmarkInfo = field(default_factory=lambda: BenchmarkInfo())
    finish: Callable[[], BenchmarkInfo | FinalStats] = lambda: BenchmarkInfo()
    warm: bool = True
    rounds: int = 25
    every: int = 1


@dataclass
class Measured:
    """The times of a provider in seconds, one a round, and its facts."""

    seconds: list[float]
    info: BenchmarkInfo

    @property
    def median(self) -> float:
        """Seconds of the middle round."""
        return statistics.median(self.seconds)


Prepare = Callable[[str], Prepared]
# Called with the providers of a group before any of them is prepared.
Started = Callable[[Sequence[str]], AbstractContextManager[None]]


def _nothing_to_start(_providers: Sequence[str]) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


class Scheduler:
    """Measures groups.

    Args:
        budget: seconds for all groups together, from now on.
        groups: key of every group that was selected, with the seconds that it wants and its
            providers. Where they want more than the budget, all get less in proportion.
        fill_budget: give more than wanted where the budget has it.

    Attributes:
        results: {key: {provider: times, or why there are none}}.
    """

    def __init__(
        self,
        budget: float,
        groups: Mapping[Any, tuple[float, Sequence[str]]],
        *,
        fill_budget: bool = False,
    ):
        self._deadline = time.perf_counter() + budget
        self._waiting = dict(groups)
        self._fill_budget = fill_budget
        self.results: dict[Any, dict[str, Measured | Exception]] = {}

    def measure(
        self, key: Any, prepare: Prepare, started: Started = _nothing_to_start
    ) -> dict[str, Measured | Exception]:
        """Return the results of a group; measure it, inside `started`, if nobody has."""
        if key not in self.results:
            wanted_by_all = sum(wanted for wanted, _ in self._waiting.values())
            wanted, providers = self._waiting.pop(key)
            left = max(0.0, self._deadline - time.perf_counter())
            share = left * wanted / wanted_by_all
            share = share if self._fill_budget else min(wanted, share)
            share = share if share >= _WORTHWHILE * wanted else 0.0
            with started(providers if share else []):
                self.results[key], was_stopped = _measure_group(providers, prepare, share)
            if was_stopped:
                self._deadline = -math.inf
        return self.results[key]


def _measure_group(
    providers: Sequence[str], prepare: Prepare, share: float
) -> tuple[dict[str, Measured | Exception], bool]:
    """Make providers ready, warm them up and time them in turns within `share` seconds.

    A provider that fails fails its own test and leaves the others theirs. Once interrupted while
    one gets ready, those that are ready are timed for a moment and nothing further is begun.

    Returns: the results, and whether it was interrupted.
    """
    started = time.perf_counter()
    limit = _OVERDRAFT * share + _ONCE_S
    ready: dict[str, Prepared] = {}
    results: dict[str, Measured | Exception] = {}
    was_stopped = False
    for name in providers:
        spent = time.perf_counter() - started
        # One provider alone compares with nothing: two are prepared whatever they take.
        if share == 0 or (spent > limit and len(ready) >= 2):
            reason = f"no time left: the group has spent {spent:.0f} s, its share was {share:.0f} s"
            results[name] = Unavailable(reason)
            continue
        try:
            ready[name] = prepare(name)
            if ready[name].warm:
                ready[name].sample()
        except Exception as error:
            results[name] = error
            if name in ready:
                _finish(ready.pop(name))
        except KeyboardInterrupt:
            ready.pop(name, None)
            results[name] = Unavailable("interrupted while it got ready")
            was_stopped, share = True, 0.0
    if not ready:
        return results, was_stopped
    spent = time.perf_counter() - started
    most = min(p.rounds for p in ready.values())
    try:
        times = interleave(
            {name: provider.sample for name, provider in ready.items()},
            share - spent,
            min_rounds=min(3, most),
            max_rounds=most,
            # Short rounds are worth their number even where preparing has taken all.
            limit_s=_MOMENT_S if was_stopped else max(limit - spent, _ONCE_S),
            every={name: provider.every for name, provider in ready.items()},
        )
    except Exception as error:
        return results | dict.fromkeys(ready, error), was_stopped
    finally:
        for provider in ready.values():
            _finish(provider)
        gc.collect()
    measured = {name: Measured(times[name], p.info) for name, p in ready.items()}
    return results | measured, was_stopped


def _finish(provider: Prepared) -> None:
    """Wind a provider up; one that dies while doing so has its times already."""
    with contextlib.suppress(RuntimeError, OSError):
        provider.info |= provider.finish()
