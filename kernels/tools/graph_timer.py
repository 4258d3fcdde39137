"""Times calls on a GPU by replaying CUDA graphs of them, in turns."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastres.kernels.tools.tuner import Trial

__all__ = ["GraphTimer"]

REPEATS = 8
ROUNDS = 15


class GraphTimer:
    """A `Timer`: the median over rounds of a graph that holds a call several times.

    A graph has no launch latency between its kernels, as the captured training step has none. Cold:
    before each call twice the L2 cache is overwritten inside the graph, and a graph that does only
    that is timed beside the others and taken off. Hot: each call finds what the one before left.

    Args:
        device: the GPU.
        cold: whether the L2 cache is emptied before each call.
    """

    def __init__(self, device: torch.device, *, cold: bool):
        self.device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._trash = torch.empty(2 * size, dtype=torch.uint8, device=device) if cold else None

    def __call__(self, trials: Sequence[Trial]) -> list[float]:
        """Median seconds of one run of each trial."""
        calls = [trial.run for trial in trials]
        if self._trash is not None:
            calls.append(lambda: None)
        pool = torch.cuda.graph_pool_handle()
        graphs = [self._capture(call, pool) for call in calls]
        times: list[list[float]] = [[] for _ in graphs]
        for _ in range(ROUNDS):
            for graph, spent in zip(graphs, times, strict=True):
                spent.append(self._replay(graph))
        medians = [statistics.median(spent) for spent in times]
        idle = medians.pop() if self._trash is not None else 0.0
        # A call of no measurable length still took longer than nothing.
        return [max(median - idle, 1e-9) / REPEATS for median in medians]

    def _capture(self, call: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            # Compiles, and lets cuDNN choose its algorithm, before the capture.
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                for _ in range(REPEATS):
                    if self._trash is not None:
                        self._trash.fill_(1)
                    call()
            return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
