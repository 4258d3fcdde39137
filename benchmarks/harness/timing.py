"""Clocks: rounds of several providers in turn, and how one round is timed on CPU and GPU.

A shared machine is faster in one minute than in the next. Providers that are to be compared take
turns therefore: a round of each, over and over, in an order that rotates. pytest-benchmark runs
one test to its end instead, so a group is measured first and its tests replay the recorded times:
`REPLAY` stands for the clock and the function that pytest-benchmark times.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastres.kernels.tools.graph_timer import GRAPH_REPLAYS, graph_sample

__all__ = [
    "GRAPH_REPLAYS",
    "REPLAY",
    "Replay",
    "Sample",
    "Stopwatch",
    "graph_sample",
    "interleave",
    "peak_bytes",
    "wall_sample",
]

Sample = Callable[[], float]
"""Runs one round and returns how many seconds one call in it took."""

# A GPU drained after every short step would show the latency of launches instead of their rate.
_SHORTEST_SAMPLE_S = {"cpu": 2e-3, "cuda": 5e-2}
_MOST_CALLS = 200


class Replay:
    """A clock that runs through recorded times, for `benchmark.pedantic`.

    Mark the test `benchmark(timer=REPLAY.now)`, `load` the seconds and pass `REPLAY.advance` with
    as many rounds: the durations that pytest-benchmark sees are the recorded ones.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._seconds: list[float] = []

    def load(self, seconds: Sequence[float]) -> None:
        """Put the durations of the coming rounds in."""
        self._now, self._seconds = 0.0, list(reversed(seconds))

    def now(self) -> float:
        """Return the time of this clock in seconds."""
        return self._now

    def advance(self) -> None:
        """Let the next recorded duration pass."""
        self._now += self._seconds.pop()


REPLAY = Replay()


def interleave(
    samples: Mapping[str, Sample],
    seconds: float,
    *,
    min_rounds: int = 3,
    max_rounds: int = 25,
    limit_s: float = math.inf,
    every: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Time warm providers in turns and return their times in seconds, one a round.

    Args:
        samples: the providers.
        seconds: for all turns; there are as many as fit, between the two limits.
        min_rounds: everybody gets these, even where they take longer than `seconds`.
        max_rounds: nobody gets more.
        limit_s: no turn begins after so many seconds, however few there were; one always does.
        every: {provider: n}: takes part in every n-th turn alone; default: in all of them.
    """
    names, period = list(samples), dict.fromkeys(samples, 1) | dict(every or {})
    least = (min_rounds - 1) * max(period.values()) + 1
    times: dict[str, list[float]] = {name: [] for name in names}
    started, longest = time.perf_counter(), 0.0
    for turn in range(max(max_rounds, least)):
        begun = time.perf_counter() - started
        enough = turn >= least and begun + longest > seconds
        if turn and (enough or begun > limit_s):
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn % period[name] == 0:
                times[name].append(samples[name]())
        longest = max(longest, time.perf_counter() - started - begun)
    return times


def wall_sample(call: Callable[[], object], device: torch.device) -> Sample:
    """Time calls by the wall clock, the device drained before and after.

    Calls shorter than 2 ms (on a GPU 50 ms) are repeated within a round, and their mean counts.
    """
    num_calls = 0

    def timed(count: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / count

    def sample() -> float:
        nonlocal num_calls
        if not num_calls:
            timed(1)
            shortest = _SHORTEST_SAMPLE_S[device.type]
            num_calls = min(_MOST_CALLS, math.ceil(shortest / max(timed(1), 1e-7)))
        return timed(num_calls)

    return sample


class Stopwatch:
    """The seconds between marks: by events on a GPU, which nobody waits for, else by the clock.

    Args:
        device: whose work is timed; a GPU has finished what came before when the first mark is set.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        """Note where the device's work, or the clock, is."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        if not self._marks:
            torch.cuda.synchronize(self._device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Wait for the device and return the seconds from every mark to the next."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [_seconds_between(*pair) for pair in itertools.pairwise(self._marks)]


def _seconds_between(first: Any, last: Any) -> float:
    """Return the seconds between two readings of the clock, or two events in milliseconds."""
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return by how much one call raises what torch's allocator has handed out.

    On a CPU the allocations are followed by the profiler: scratch memory inside oneDNN or OpenMP
    does not go through torch's allocator and is not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    held = peak = 0
    # `profile.events()` sums allocations up by operation; only the raw events are in order.
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
