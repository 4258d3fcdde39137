"""The frame of all suites: options, the budget, and how measured times reach pytest-benchmark.

pytest benchmarks/                        everything that this machine can do
pytest benchmarks/ --quick                the same in a minute, on small cases
pytest benchmarks/ -k cpu                 the CPU ladder, in three minutes
pytest benchmarks/ -m slow                the ladders with torch.compile on a CPU, and with its
                                          max-autotune on a GPU; other people's networks on a CPU
pytest benchmarks/ --benchmark-json F     keep the times; `report.collect` makes rows of F
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.harness.ablation import Unavailable, here
from benchmarks.harness.rows import make_provenance
from benchmarks.harness.scheduler import Measured, Prepared, Scheduler, Started
from benchmarks.harness.timing import REPLAY
from benchmarks.report.tables import baseline_among
from benchmarks.suites.ablation_cases import load_data
from fastres.engine import machine

# Seconds from the start of pytest to the last measurement; winding up comes on top. Groups that are
# slow were asked for by that word, and have what they want.
_LIMIT_S = {"cpu": 335.0, "cuda": 565.0, "quick": 45.0}
# The most valuable first; the suite of many small groups loses little by lack of time, and the one
# that compiles ten networks would take it from all others.
_ORDER = ("bench_model", "bench_loaders", "bench_train", "bench_ops", "bench_networks")
# Prepared before the others of a group, in this order: the ratio that matters most is not what
# lacks the time. On a GPU that is the one to torch.compile, ours and that of people's scripts.
_FIRST = {
    "cpu": ("peer_fp32", "fast", "eager", "amp"),
    "cuda": (
        *("fast", "compile", "peer_compiled", "peer_amp", "amp", "fastres", "inductor", "eager"),
        *("peer_fp32", "fast_uncompiled"),
    ),
}
_RESULTS = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the suites."""
    group = parser.getgroup("fastres", "fastres benchmarks")
    group.addoption("--quick", action="store_true", help="small cases alone, within a minute")
    group.addoption("--budget", type=float, help="seconds for all that is selected")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the marks; show medians where pytest-benchmark has a dozen columns."""
    # Again, because prove.compare runs these suites in trees whose pyproject lacks the marks.
    config.addinivalue_line("markers", "share(seconds): what a group wants of the budget")
    config.addinivalue_line("markers", "full: left out by --quick")
    config.addinivalue_line("markers", "quick: in --quick alone")
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    config.option.benchmark_sort = "name"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order suites, choose the cases of --quick or the others, replay measured times in tests."""
    items.sort(key=lambda item: _ORDER.index(item.path.stem) if item.path.stem in _ORDER else -1)
    unwanted = "full" if config.getoption("--quick") else "quick"
    left_out = [item for item in items if item.get_closest_marker(unwanted)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker(unwanted)]
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY.now, group=_group(item)))


def _group(item: pytest.Item) -> str:
    """Name what an item's provider is measured beside: the test and its other parameters."""
    assert isinstance(item, pytest.Function)
    name, case = item.originalname.removeprefix("bench_"), item.callspec.id.rpartition("-")[0]
    return f"{name} {case}".rstrip()


def _provider(item: pytest.Item) -> str:
    assert isinstance(item, pytest.Function)
    return str(item.callspec.params["provider"])


def _in_order(providers: list[str], device: torch.device) -> list[str]:
    """Sort the providers of a group as they are to be prepared on `device`."""
    first = _FIRST[device.type]
    if "fast" not in providers:
        # It takes the place of `fast`, and compiles nothing that could leave it without time.
        first = ("fast_uncompiled", *first)
    return sorted(providers, key=lambda name: (*first, name).index(name))


@pytest.fixture(scope="session")
def scheduler(request: pytest.FixtureRequest, data_dir: str | None) -> Scheduler:
    """Share the budget out among the groups that were selected."""
    config = request.config
    # Whoever reads the data first decodes it, for minutes where there are many files: do it once,
    # and before any process is timed that starts from what is cached.
    load_data(data_dir)
    groups: dict[str, tuple[float, list[str]]] = {}
    wanted_by_slow: dict[str, float] = {}
    for item in request.session.items:
        marker = item.get_closest_marker("share")
        wanted = marker.args[0] if marker else 1.0
        groups.setdefault(_group(item), (wanted, []))[1].append(_provider(item))
        if item.get_closest_marker("slow"):
            wanted_by_slow[_group(item)] = wanted
    groups = {key: (wanted, _in_order(names, here())) for key, (wanted, names) in groups.items()}
    kind = "quick" if config.getoption("--quick") else here().type
    asked = config.getoption("--budget")
    # What starting has cost, and reading the data, is part of the budget.
    spent = machine.process_seconds() or 0.0
    budget = asked or max(_LIMIT_S[kind], sum(wanted_by_slow.values()))
    made = Scheduler(budget - spent, groups, fill_budget=asked is not None)
    config.stash[_RESULTS] = made.results
    return made


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, benchmark: Any, scheduler: Scheduler
) -> Callable[..., None]:
    """Have the test's group measured and hand its provider's times to pytest-benchmark.

    The fixture is called with `prepare`, which makes a provider ready or raises Unavailable, with
    the name of the baseline, and with what to start before, see `Scheduler.measure`.
    """

    def run(prepare: Callable[[str], Prepared], baseline: str, *started: Started) -> None:
        provider = _provider(request.node)
        group = scheduler.measure(_group(request.node), prepare, *started)
        result = group[provider]
        if isinstance(result, Unavailable):
            pytest.skip(str(result))
        if isinstance(result, Exception):
            benchmark.skipped = True
            raise result
        benchmark.extra_info |= result.info | {"provider": provider, "baseline": baseline}
        base = group.get(baseline)
        if isinstance(base, Measured):
            benchmark.extra_info["baseline_seconds"] = base.median
        REPLAY.load(result.seconds)
        benchmark.pedantic(REPLAY.advance, rounds=len(result.seconds))

    return run


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether --quick was given."""
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def data_dir() -> str | None:
    """The folder with images: $FASTRES_DATA, or None for the synthetic set."""
    return os.environ.get("FASTRES_DATA")


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Add the provenance provenance of the numbers."""
    provenance = make_provenance("mixed", ["pytest", *sys.argv[1:]])
    output_json["provenance"] = provenance | {"threads": torch.get_num_threads()}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print medians side by side, in images/s where images are what a call works on."""
    results = config.stash.get(_RESULTS, {})
    if results:
        terminalreporter.section("side by side")
        for line in _lines(results):
            terminalreporter.write_line(line)


def _lines(results: dict[str, dict[str, Measured | Exception]]) -> Iterator[str]:
    for group, members in results.items():
        measured = {name: m for name, m in members.items() if isinstance(m, Measured)}
        if not measured:
            continue
        baseline = baseline_among(measured)
        yield f"{group}, x: against {baseline}" if baseline else group
        for name, result in measured.items():
            images, flops = result.info.get("images"), result.info.get("flops")
            ratio = f"{measured[baseline].median / result.median:8.2f} x" if baseline else ""
            text = f"  {name:<16} {result.median * 1e3:12.3f} ms {ratio:<10}"
            if images:
                text += f" {images / result.median:12,.0f} images/s"
            if flops:
                text += f" {flops / result.median / 1e9:10,.1f} GFLOP/s"
            yield text
