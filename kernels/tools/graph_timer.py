"""Times calls on a GPU by replaying CUDA graphs of them, in turns.

A graph has no launch latency between its kernels, as the captured training step has none.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from fastres.kernels.gpu.counters import own_counters

__all__ = [
    "GRAPH_REPLAYS",
    "L2",
    "Captured",
    "GraphSampler",
    "GraphTimer",
    "Trial",
    "capture",
    "graph_sample",
]

GRAPH_REPLAYS = 10
_HOT_CALLS = 8
# A race has this many rounds, or fewer once it has taken so many seconds for each of its trials:
# those of the longest kernels, whose times spread least.
_ROUNDS = 15
_LEAST_ROUNDS = 5
_SECONDS_A_TRIAL = 0.03

L2 = Literal["cold", "hot", "both"]


class Trial(NamedTuple):
    """Something to time: its name, and a call that can be repeated and captured in a graph."""

    label: str
    run: Callable[[], object]


class Captured(NamedTuple):
    """A graph of equal calls, and the counters of its launches, which must live as long as it."""

    graph: torch.cuda.CUDAGraph
    num_calls: int
    counters: torch.Tensor


def capture(
    call: Callable[[], object],
    device: torch.device,
    *,
    num_calls: int = 1,
    pool: Any = None,
    stream: torch.cuda.Stream | None = None,
    before: Callable[[], object] | None = None,
) -> Captured:
    """Capture calls in a CUDA graph as training captures its step, after three of them outside.

    Args:
        call: what is captured; it must not wait for the device.
        device: a CUDA device.
        num_calls: how often the graph has it.
        pool: memory to share with other graphs; None: it has its own.
        stream: to capture on; of captures on another one a pool reuses no memory. None: a new one.
        before: called once on the stream of the capture. The autograd engine runs a backward pass
            on the stream of its forward, which must be the one that captures.
    """
    with torch.cuda.device(device):
        stream = stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Compiles, and lets cuDNN choose its algorithm, before the capture.
        with torch.cuda.stream(stream):
            if before is not None:
                before()
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # With counters of its own the graph has no memset for them.
        with (
            own_counters(device) as counters,
            torch.cuda.graph(graph, pool=pool, stream=stream),
        ):
            for _ in range(num_calls):
                call()
    return Captured(graph, num_calls, counters)


class GraphSampler:
    """Captures calls; what it captured shares one memory pool and one buffer that empties the L2.

    Args:
        device: a CUDA device.
        cold: overwrite the L2 cache before every replay; otherwise operands may lie in it.
    """

    def __init__(self, device: torch.device, *, cold: bool):
        self.device = device
        self.cold = cold
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
        num_flushed = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(num_flushed if cold else 0, dtype=torch.int8, device=device)

    def sample(
        self, call: Callable[[], object], *, before: Callable[[], object] | None = None
    ) -> Callable[[], float]:
        """Capture `call` and return what replays it between two events.

        Args:
            call: what is captured; it must not wait for the device.
            before: see `capture`.

        Returns: a function that returns the seconds of one call, the mean of `GRAPH_REPLAYS`.
        """
        # Hot calls follow each other in the graph, or the gaps between launches would be timed too.
        num_calls = 1 if self.cold else _HOT_CALLS
        captured = capture(
            call,
            self.device,
            num_calls=num_calls,
            pool=self._pool,
            stream=self._stream,
            before=before,
        )
        return lambda: self._seconds(captured)

    def _seconds(self, captured: Captured) -> float:
        """Of one call."""
        with torch.cuda.device(self.device):
            marks = [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                for _ in range(GRAPH_REPLAYS)
            ]
            for start, end in marks:
                if self.cold:
                    self._flush.zero_()
                start.record()
                captured.graph.replay()
                end.record()
            torch.cuda.synchronize()
        milliseconds = sum(start.elapsed_time(end) for start, end in marks) / GRAPH_REPLAYS
        return milliseconds / 1e3 / captured.num_calls


def graph_sample(
    call: Callable[[], object],
    device: torch.device,
    *,
    cold: bool,
    before: Callable[[], object] | None = None,
) -> Callable[[], float]:
    """`GraphSampler(device, cold=cold).sample(call, before=before)`, for one call alone."""
    return GraphSampler(device, cold=cold).sample(call, before=before)


class GraphTimer:
    """A `Timer`: the median over rounds in which all trials take turns.

    Graphs of one race share memory, those of different races do not: torch takes a pool for new
    graphs only while one of its graphs lives, or once nothing of it is in use.

    Args:
        device: the GPU.
        l2: "cold": the L2 cache is emptied before each call. "hot": it holds what the last call of
            the same trial left. "both": the mean of the two medians, because in a training step the
            operand that the last launch wrote is there, as far as it fits, and older ones are not.
    """

    def __init__(self, device: torch.device, *, l2: L2):
        self._device = device
        self._states = {"cold": [True], "hot": [False], "both": [True, False]}[l2]

    def __call__(self, trials: Sequence[Trial]) -> list[float]:
        """Median seconds of one run of each trial."""
        samplers = [GraphSampler(self._device, cold=cold) for cold in self._states]
        samples = [[s.sample(trial.run) for s in samplers] for trial in trials]
        times: list[list[list[float]]] = [[[] for _ in of_trial] for of_trial in samples]
        started = time.perf_counter()
        for done in range(_ROUNDS):
            is_long = time.perf_counter() - started > _SECONDS_A_TRIAL * len(trials)
            if is_long and done >= _LEAST_ROUNDS:
                break
            for of_trial, spent in zip(samples, times, strict=True):
                for sample, seconds in zip(of_trial, spent, strict=True):
                    seconds.append(sample())
        return [statistics.fmean(map(statistics.median, spent)) for spent in times]
