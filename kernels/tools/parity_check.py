"""One check of the parity command, and how it is run: against plain torch, twice, in a graph.

A `Check` says how its inputs are made, what the kernels compute of them and what plain torch does.
`ParityRun` runs one after the other and says of each whether it is right (error_check.py), whether
two runs are the same bits, or how it failed. A check since which the GPU fails in every call is the
last one that is run.
"""

import functools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from fastres.kernels.gpu.launch import Launch, recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_table import assume_entries, uses_pdl
from fastres.kernels.tools.compile_ahead import compile_ahead
from fastres.kernels.tools.error_check import (
    Deviation,
    Tensors,
    deviations,
    poisoned_memory,
    precision_roundoff,
    same_bits,
    to_double,
)
from fastres.kernels.tools.graph_timer import capture
from fastres.kernels.tools.networks import Precision, precision_set
from fastres.kernels.tools.tuner import GpuLostError, first_line, raise_if_lost

__all__ = ["Check", "ParityRun", "Result", "Status"]

# Draws of a check whose masks may differ at ties: as many as are needed, at most these.
MAX_DRAWS = 5

# Checks whose kernels are compiled together, for each thread.
CHECKS_A_THREAD = 2

Status = Literal["ok", "WRONG", "DIFFERS", "FAILED", "LOST", "left out", "not run"]


@dataclass(frozen=True)
class Check:
    """Something that kernels compute, and what it is compared with.

    Attributes:
        name: unique among checks but for tiles.
        label: form, route and tiles, for people; "" where there is no choice.
        precision: of the network.
        make: the inputs, from a device (meta too) and a seed.
        compute: results by name, by the kernels; it leaves the inputs as they are.
        plain: the same in plain torch, from inputs in any dtype; it may have more results.
        same_as: equal for checks that share `make` and `plain`, whose truth is found once.
        entries: of the launch table while the kernels run.
        has_relu: masks of ReLUs at the kernel's own pre-activations: at a tie, two right ones
            differ. Such a check counts by the median of its draws.
        pooled: errors of one kind, of all layers, count together by their root mean square. Every
            layer of a network has the errors of all others in it, kernels' and plain torch's, and
            those of 16 numbers differ by more than RATIO by chance.
        own_rounding: each result is measured by a rounding of its own dtype, not the network's.
        in_graph: two replays of a CUDA graph must give the bits of the eager run.
    """

    name: str
    label: str
    precision: Precision
    make: Callable[[torch.device, int], Any]
    compute: Callable[[Any], Tensors]
    plain: Callable[[Any], Tensors]
    same_as: Hashable
    entries: Mapping[str, ConvConfig] = field(default_factory=dict)
    has_relu: bool = False
    pooled: bool = False
    own_rounding: bool = False
    in_graph: bool = False

    def run(self, inputs: Any) -> Tensors:
        """Let the kernels compute."""
        with assume_entries(self.entries), precision_set(self.precision):
            return self.compute(inputs)


class Result(NamedTuple):
    """How a check ended.

    status: "LOST" where the GPU fails in every call since. detail: what is wrong, or why it did not
    run. share: the largest error in parts of what is allowed; None where nothing was compared.
    milliseconds: of one run on poisoned memory, for orientation.
    """

    name: str
    label: str
    status: Status
    detail: str = ""
    share: float | None = None
    milliseconds: float | None = None


class _Expected(NamedTuple):
    """Inputs, and what plain torch makes of them in their dtype and in fp64."""

    inputs: Any
    eager: Tensors
    truth: Tensors


@dataclass
class ParityRun:
    """Runs checks on one device.

    Attributes:
        device: where the kernels run.
        threads: that compile kernels ahead; 0 leaves that to their runs.
        synchronize: waits for the device, and raises what went wrong there.
        is_late: whether to stop; asked before each check.
        has_graphs: whether the device captures CUDA graphs.
        say: receives a line before kernels are compiled together.
    """

    device: torch.device
    threads: int = 0
    synchronize: Callable[[], None] = lambda: None
    is_late: Callable[[], bool] = lambda: False
    has_graphs: bool = False
    say: Callable[[str], None] = lambda line: None
    _last: tuple[Hashable, _Expected] | None = field(default=None, init=False)

    def results(self, checks: Sequence[Check], before: Callable[[Check], None]) -> Iterator[Result]:
        """Yield the result of each check as it ends; "not run" once it is late or the GPU is lost.

        Args:
            checks: in order.
            before: called with each check when it begins.
        """
        why_not = ""
        size = max(1, CHECKS_A_THREAD * self.threads)
        for first in range(0, len(checks), size):
            group = checks[first : first + size]
            if self.threads and not why_not and not self.is_late():
                self.say(f"compiling the kernels of {len(group)} checks in {self.threads} threads")
                compile_ahead(self._launches(group), self.threads, self.is_late)
            for check in group:
                if not why_not and self.is_late():
                    why_not = "no time was left"
                if why_not:
                    yield Result(check.name, check.label, "not run", why_not)
                    continue
                before(check)
                result = self._result(check)
                if result.status == "LOST":
                    why_not = "the GPU was lost"
                yield result

    def _launches(self, checks: Sequence[Check]) -> Iterator[Launch]:
        """What checks will start, recorded without starting it."""
        pdl = uses_pdl(self.device)
        for check in checks:
            with recording() as launches:
                try:
                    check.run(check.make(torch.device("meta"), 0))
                except Exception:  # The check's own run meets it again and names it.
                    continue
            for launch in launches:
                yield replace(launch, args={**launch.args, "PDL": pdl})

    def _result(self, check: Check) -> Result:
        ended = functools.partial(Result, check.name, check.label)
        if check.in_graph and not self.has_graphs:
            return ended("left out", "CUDA graphs are captured on a GPU")
        try:
            return self._compare(check, ended)
        except Exception as error:  # Whatever a compiler or a driver raises.
            try:
                raise_if_lost(check.name, error, self.synchronize)
            except GpuLostError as lost:
                return ended("LOST", str(lost))
            return ended("FAILED", first_line(error))

    def _compare(self, check: Check, ended: Callable[..., Result]) -> Result:
        """Draw inputs until the median of the draws is right, or there have been enough."""
        draws: list[list[Deviation]] = []
        roundoff = None if check.own_rounding else precision_roundoff(check.precision)
        while True:
            expected = self._expect(check, len(draws))
            runs, milliseconds = self._run(check, expected.inputs)
            found = [*deviations(runs[0], expected.eager, expected.truth, roundoff)]
            draws.append(_pool(found) if check.pooled else found)
            share, worst = _worst(draws)
            differs = _differing(runs)
            if differs or share <= 1 or not check.has_relu or len(draws) == MAX_DRAWS:
                break
        status: Status = "WRONG" if share > 1 else "DIFFERS" if differs else "ok"
        detail = "; ".join(filter(None, [worst if share > 1 else "", differs]))
        return ended(status, detail, share, milliseconds)

    def _expect(self, check: Check, seed: int) -> _Expected:
        """What plain torch computes; the last is kept, for checks that share it."""
        key = check.same_as, seed
        if self._last is None or self._last[0] != key:
            self._last = None
            inputs = check.make(self.device, seed)
            with precision_set(check.precision):
                eager = check.plain(inputs)
            self._last = key, _Expected(inputs, eager, check.plain(to_double(inputs)))
        return self._last[1]

    def _run(self, check: Check, inputs: Any) -> tuple[list[Tensors], float]:
        """The results of two runs, and of two replays of a graph; milliseconds of the second."""
        with poisoned_memory():
            runs = [check.run(inputs)]
            self.synchronize()
            started = time.perf_counter()
            runs.append(check.run(inputs))
            self.synchronize()
            milliseconds = 1e3 * (time.perf_counter() - started)
            if check.in_graph:
                runs += self._replays(check, inputs)
        return runs, milliseconds

    def _replays(self, check: Check, inputs: Any) -> Iterator[Tensors]:
        """The results of two replays of a CUDA graph, which fills its memory anew in each."""
        made: deque[Tensors] = deque(maxlen=1)
        captured = capture(lambda: made.append(check.run(inputs)), self.device)
        for _ in range(2):
            captured.graph.replay()
            self.synchronize()
            yield {what: value.clone() for what, value in made[0].items()}


def _pool(found: Sequence[Deviation]) -> list[Deviation]:
    """The errors of each kind of result as one: "dw of ..." and "dw of ..." are of a kind."""
    kinds: dict[tuple[str, str], list[Deviation]] = {}
    for one in found:
        kinds.setdefault((one.what.partition(" of ")[0], one.norm), []).append(one)
    pooled = []
    for (kind, norm), several in kinds.items():
        share = math.sqrt(statistics.fmean(one.share**2 for one in several))
        worst = max(several, key=lambda one: one.share)
        text = f"{kind} of {len(several)} layers is off by {share:.3g} of what is allowed, together"
        pooled.append(Deviation(kind, norm, share, 1.0, f"{text}; {worst.text}"))
    return pooled


def _worst(draws: Sequence[Sequence[Deviation]]) -> tuple[float, str]:
    """The largest median share of a result's error over the draws, and what it is."""
    worst = 0.0, ""
    for of_result in zip(*draws, strict=True):
        shares = [found.share for found in of_result]
        share = statistics.median(shares) if all(map(math.isfinite, shares)) else math.inf
        if share >= worst[0]:
            worst = share, of_result[-1].text
    return worst


def _differing(runs: Sequence[Tensors]) -> str:
    """The results that are not the same bits in all runs, in words."""
    first, *others = runs
    names = [
        name
        for name, value in first.items()
        if not all(same_bits(value, other[name]) for other in others)
    ]
    return f"not the same bits in {len(runs)} runs: {', '.join(names)}" if names else ""
