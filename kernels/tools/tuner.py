"""The tuner: forms and tiles of every convolution, checked, timed, chosen, kept in a launch table.

A layer has two passes: forward, its product with the statistics, and backward, both gradients. Each
is timed as training runs it, so that a dy stored for one gradient serves the other, and one launch
that computes both competes with two. Candidates meet in races: proved right, then timed in turns
with the entries that lead so far and with what this GPU would use if it were not measured.

    round 1, forms   every layer, those that move most bytes first: the start of each form, and
                     the routes `triton` and `cudnn`; few compilations
    round 2, tiles   the same layers: the knobs of the form that leads, nearest to it first

What is one switch for all kernels of a GPU is chosen after them, see tune_pdl.py.

How time is measured is a `Timer`, so everything else runs and is tested without a GPU.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch

from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.launch import Launch, recording
from fastres.kernels.gpu.launch_config import ConvConfig, Form, Route
from fastres.kernels.gpu.launch_table import assume_entries
from fastres.kernels.tools.candidates import (
    GpuLimits,
    Product,
    distance,
    heuristic_start,
    im2col_start,
    neighbourhood,
    product_of,
    start_configs,
)
from fastres.kernels.tools.compile_ahead import compile_ahead
from fastres.kernels.tools.graph_timer import Trial
from fastres.kernels.tools.networks import precision_set
from fastres.kernels.tools.tune_workloads import (
    ConvCase,
    ConvPass,
    ConvVariant,
    ConvWorkload,
    ParityCheck,
    make_case,
)

__all__ = [
    "Choice",
    "Entries",
    "GpuLostError",
    "Timer",
    "Tuned",
    "Tuner",
    "first_line",
    "raise_if_lost",
]

# Candidates of one race: compiled together, then timed in turns.
RACE_SIZE = 8

# How many times a kernel may gain from its knobs: where cuDNN leads by more, no tiles are tried.
TILE_GAIN = 1.5

# One configuration of each product of a pass, in order.
Entries = tuple[ConvConfig, ...]


class GpuLostError(RuntimeError):
    """The GPU fails in every call, not in the last one alone."""


class Timer(Protocol):
    """Measures trials in turns, so that a slow spell of the machine strikes all of them."""

    def __call__(self, trials: Sequence[Trial]) -> list[float]:
        """Median seconds of one run of each trial."""


class Choice(NamedTuple):
    """A decision for one product: its entry, its time and that of the baseline, in seconds.

    Times are of a whole pass, in all variants of the layer in a step together: both gradients carry
    the same. The baseline is what the GPU would use without being measured; where that computes the
    wrong thing, the next right candidate. by_route: the fastest pass with this product on a route.
    """

    key: str
    config: ConvConfig
    seconds: float
    baseline_seconds: float
    by_route: dict[Route, float]

    @property
    def speedup(self) -> float:
        """How many times faster than the baseline."""
        return self.baseline_seconds / self.seconds


class Tuned(NamedTuple):
    """What a round leaves of a layer."""

    round: Literal["forms", "tiles"]
    choices: list[Choice]


@dataclass
class _Contest:
    """One pass of a layer: what its candidates took so far.

    unmeasured: what the GPU would use without being measured. seconds: of a step, in all variants
    together, from the last race of each. leader: the fastest. baseline: the unmeasured entries, or
    the first right candidate. tried: all that were checked.
    """

    name: ConvPass
    workload: ConvWorkload
    products: tuple[Product, ...]
    check: ParityCheck
    unmeasured: Entries
    seconds: dict[Entries, float] = field(default_factory=dict)
    tried: set[Entries] = field(default_factory=set)
    leader: Entries | None = None
    baseline: Entries | None = None

    def table(self, entries: Entries) -> dict[str, ConvConfig]:
        """The entries by the names of the launch table."""
        return {p.key: config for p, config in zip(self.products, entries, strict=True)}

    def label(self, entries: Entries) -> str:
        """The entries for people."""
        table = self.table(entries).items()
        return " with ".join(f"{key} {config.route} {config.label}" for key, config in table)

    def all_cudnn(self) -> Entries:
        """Every product on cuDNN, which must be right."""
        return tuple(replace(im2col_start(p), route="cudnn") for p in self.products)

    def fastest(self, position: int, form: Form | None = None) -> ConvConfig | None:
        """The fastest configuration there on `triton`: of a form, or of all that compute it alone.

        The fused form decides both products, so its entries say nothing of one.
        """
        found = {
            entries: seconds
            for entries, seconds in self.seconds.items()
            if entries[position].route == "triton"
            and (not _is_fused(entries) if form is None else entries[position].form == form)
        }
        return min(found, key=found.__getitem__)[position] if found else None

    def with_config(self, position: int, config: ConvConfig) -> Entries:
        """The fastest entries of separate launches with another configuration there."""
        separate = {e: seconds for e, seconds in self.seconds.items() if not _is_fused(e)}
        base = min(separate, key=separate.__getitem__) if separate else self.unmeasured
        return (*base[:position], config, *base[position + 1 :])

    def fused(self, config: ConvConfig) -> Entries:
        """Both gradients in one launch; beside it the wgrad of operands that it cannot take."""
        return config, self.fastest(1) or im2col_start(self.products[1])

    def lead_over(self, position: int, config: ConvConfig) -> float:
        """How many times faster the leader is than the fastest entries with `config` there."""
        assert self.leader is not None
        with_it = min(s for entries, s in self.seconds.items() if entries[position] == config)
        return with_it / self.seconds[self.leader]

    def routes(self) -> list[Entries]:
        """Every combination of routes, with the fastest tiles of each product."""
        places = [
            [config for config in (self.fastest(position), cudnn) if config is not None]
            for position, cudnn in enumerate(self.all_cudnn())
        ]
        return list(itertools.product(*places))

    def choices(self) -> list[Choice]:
        """The leader's entries; none where nothing right was timed."""
        if self.leader is None or self.baseline is None:
            return []
        times = self.seconds[self.leader], self.seconds[self.baseline]
        return [
            Choice(key, config, *times, self._by_route(position))
            for position, (key, config) in enumerate(self.table(self.leader).items())
        ]

    def _by_route(self, position: int) -> dict[Route, float]:
        """The fastest pass with the product there on either route."""
        found: dict[Route, float] = {}
        for entries, seconds in self.seconds.items():
            route = entries[position].route
            found[route] = min(seconds, found.get(route, seconds))
        return found


@dataclass
class Tuner:
    """Tunes layer by layer on one device.

    Attributes:
        device: where the kernels run.
        timer: how trials are timed.
        deadline: on `clock`, when to stop; looked at before each candidate. None never does.
        gpu: what bounds the candidates.
        limit: tiles of a product that the second round tries; 0 leaves the round out.
        unmeasured: what the GPU would use for a product without being measured.
        rank: of entries of a layer that take the same time the lowest leads, the first of equals.
        threads: that compile the candidates of a race before it; 0 leaves that to their runs.
        say: receives one line for each candidate that is left out, and why.
        synchronize: waits for the device, and raises what went wrong there.
        clock: seconds.
    """

    device: torch.device
    timer: Timer
    deadline: float | None = None
    gpu: GpuLimits = field(default_factory=GpuLimits)
    limit: int = 24
    unmeasured: Callable[[Product], ConvConfig] = heuristic_start
    rank: Callable[[ConvShape, Entries], int] = lambda shape, entries: 0
    threads: int = 0
    say: Callable[[str], None] = print
    synchronize: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    _cases: dict[ConvVariant, ConvCase] = field(default_factory=dict, init=False)

    def run(self, workloads: Sequence[ConvWorkload]) -> Iterator[Tuned]:
        """Yield each layer's choices as soon as a round has made them; stop at the deadline.

        Raises: GpuLostError: when the GPU fails in every call after that of a candidate.
        """
        layers = [(workload, self._contests(workload)) for workload in workloads]
        for workload, contests in layers:
            if self.is_late():
                return
            yield Tuned("forms", self._tune(workload, contests, self._try_forms))
        for workload, contests in layers if self.limit else ():
            if self.is_late():
                return
            yield Tuned("tiles", self._tune(workload, contests, self._try_tiles))

    def _contests(self, workload: ConvWorkload) -> list[_Contest]:
        """A layer's passes; one whose input needs no gradient has a filter gradient alone."""
        check = ParityCheck(workload, self.device)
        need_dx = any(variant.need_dx for variant in workload.variants)
        passes: dict[ConvPass, tuple[ConvOp, ...]] = {
            "forward": ("fprop",),
            "backward": ("dgrad", "wgrad") if need_dx else ("wgrad",),
        }
        contests = []
        for name, ops in passes.items():
            products = tuple(product_of(op, workload) for op in ops)
            unmeasured = tuple(map(self.unmeasured, products))
            contests.append(_Contest(name, workload, products, check, unmeasured))
        return contests

    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and self.clock() >= self.deadline

    def _tune(
        self,
        workload: ConvWorkload,
        contests: Sequence[_Contest],
        attempt: Callable[[_Contest], None],
    ) -> list[Choice]:
        check, dtype = contests[0].check, workload.precision.dtype
        self._cases = (
            check.cases
            if check.num_images == workload.shape.N
            else {v: make_case(workload.shape, v, dtype, self.device) for v in workload.variants}
        )
        with precision_set(workload.precision):
            for contest in contests:
                attempt(contest)
        return [choice for contest in contests for choice in contest.choices()]

    def _try_forms(self, contest: _Contest) -> None:
        """The start of each form, one product after the other; then routes, and both in one."""
        starts = [start_configs(product, self.gpu) for product in contest.products]
        self._compile(contest, _first_options(contest, starts))
        self._race(contest, [contest.unmeasured])
        if contest.leader is None:
            # Partners of what follows must be right, or nothing would be.
            self._race(contest, [contest.all_cudnn()])
        for position, configs in enumerate(starts):
            alone = [config for config in configs if config.form != "fused"]
            self._race(contest, [contest.with_config(position, config) for config in alone])
        self._race(contest, contest.routes())
        self._race(contest, [contest.fused(c) for c in starts[0] if c.form == "fused"])

    def launches_of_forms(self, workload: ConvWorkload) -> list[Launch]:
        """What the first round starts of a layer, recorded without starting it.

        For those who compile before they tune; combinations that follow from times are not there.
        """
        launches: list[Launch] = []

        def record(contest: _Contest) -> None:
            starts = [start_configs(product, self.gpu) for product in contest.products]
            launches.extend(self._launches(contest, _first_options(contest, starts)))

        self._tune(workload, self._contests(workload), record)
        return launches

    def _try_tiles(self, contest: _Contest) -> None:
        """The knobs of the leading form, then the routes again."""
        if contest.leader is None:
            return
        if _is_fused(contest.leader):
            self._turn_knobs(contest, 0, contest.leader[0])
            return
        for position in range(len(contest.products)):
            start = contest.fastest(position)
            if start is not None and contest.lead_over(position, start) <= TILE_GAIN:
                self._turn_knobs(contest, position, start)
        self._race(contest, contest.routes())

    def _turn_knobs(self, contest: _Contest, position: int, start: ConvConfig) -> None:
        """Race the neighbours of the start, those nearest to the fastest so far first."""
        pool = neighbourhood(contest.products[position], start, self.gpu)
        left = self.limit
        while left and pool and not self.is_late():
            centre = contest.fastest(position, start.form) or start
            pool.sort(key=lambda config: distance(config, centre))
            size = min(left, RACE_SIZE)
            group, pool, left = pool[:size], pool[size:], left - size
            is_fused = start.form == "fused"
            self._race(
                contest,
                [contest.fused(c) if is_fused else contest.with_config(position, c) for c in group],
            )

    def _race(self, contest: _Contest, challengers: Iterable[Entries]) -> None:
        """Time the right ones among new challengers, in turns with leader and baseline."""
        new = [entries for entries in dict.fromkeys(challengers) if entries not in contest.tried]
        if not new or self.is_late():
            return
        self._compile(contest, new)
        right = []
        for entries in new:
            if self.is_late():
                break
            contest.tried.add(entries)
            wrong = self._fault(contest, entries)
            if wrong is None:
                right.append(entries)
            else:
                self.say(f"left out: {contest.label(entries)}: {wrong}")
        if right:
            known = [e for e in (contest.baseline, contest.leader) if e is not None]
            self._time(contest, list(dict.fromkeys([*known, *right])))

    def _run(self, contest: _Contest, entries: Entries, case: ConvCase) -> object:
        with assume_entries(contest.table(entries)):
            return case.run(contest.name, gpu_backend)

    def _compile(self, contest: _Contest, options: Sequence[Entries]) -> None:
        """Have the kernels of these candidates ready, before anything is timed.

        Compiling beside a race would hold up the threads that start its kernels.
        """
        if self.threads and not self.is_late():
            compile_ahead(self._launches(contest, options), self.threads, self.is_late)

    def _launches(self, contest: _Contest, options: Sequence[Entries]) -> list[Launch]:
        """What check and race will start, recorded without starting it."""
        cases = {id(case): case for case in (*contest.check.cases.values(), *self._cases.values())}
        on_meta = [case.on_meta() for case in cases.values()]
        launches = []
        for entries, case in itertools.product(options, on_meta):
            with recording() as recorded:
                try:
                    self._run(contest, entries, case)
                except Exception:  # The candidate's own run meets it again and names it.
                    continue
            launches += recorded
        return launches

    def _fault(self, contest: _Contest, entries: Entries) -> str | None:
        """What is wrong with a candidate: its numbers, or its run on more images than a check's."""
        try:
            with assume_entries(contest.table(entries)):
                wrong = contest.check(contest.name, gpu_backend)
            if wrong is None:
                if self._cases is not contest.check.cases:
                    for case in self._cases.values():
                        self._run(contest, entries, case)
                self.synchronize()
        except Exception as error:  # Whatever a compiler or a driver raises.
            self.stop_if_lost(contest.label(entries), error)
            wrong = first_line(error)
        return wrong

    def stop_if_lost(self, candidate: str, error: Exception) -> None:
        """Raise GpuLostError if the GPU fails without the candidate too, as after a bad address."""
        raise_if_lost(candidate, error, self.synchronize)

    def _time(self, contest: _Contest, runners: Sequence[Entries]) -> None:
        """Time all runners in turns in all variants; the fastest leads."""
        variants = contest.workload.variants
        places = list(itertools.product(variants, runners))
        trials = [
            Trial(
                f"{contest.name} {entries} {variant}",
                functools.partial(self._run, contest, entries, self._cases[variant]),
            )
            for variant, entries in places
        ]
        try:
            times = self.timer(trials)
        except Exception as error:
            labels = ", ".join(map(contest.label, runners))
            self.stop_if_lost(f"one of {labels}", error)
            self.say(f"not timed: {labels}: {first_line(error)}")
            return
        totals = dict.fromkeys(runners, 0.0)
        for (variant, entries), seconds in zip(places, times, strict=True):
            totals[entries] += variants[variant] * seconds
        contest.seconds |= totals
        contest.baseline = contest.baseline or runners[0]
        shape = contest.workload.shape
        contest.leader = min(
            totals, key=lambda entries: (totals[entries], self.rank(shape, entries))
        )


def _first_options(contest: _Contest, starts: Sequence[Sequence[ConvConfig]]) -> list[Entries]:
    """What an unmeasured GPU uses, with it every start of each product; and all on cuDNN."""
    forms = (
        contest.with_config(position, config)
        for position, configs in enumerate(starts)
        for config in configs
    )
    return [contest.unmeasured, *forms, contest.all_cudnn()]


def _is_fused(entries: Entries) -> bool:
    return entries[0].form == "fused"


def raise_if_lost(what: str, error: Exception, synchronize: Callable[[], None]) -> None:
    """Raise GpuLostError if the GPU fails without what has just failed too."""
    try:
        synchronize()
    except Exception:
        raise GpuLostError(
            f"the GPU fails in every call since it ran {what}: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
