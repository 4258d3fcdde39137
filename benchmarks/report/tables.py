"""Rows as Markdown tables, one a machine.

A `table` has a line a provider, with spread, number of measurements, and the ratio to a baseline; a
`cross_table` has a line a case and a column a provider, for suites of many cases, with the ratios
to the baseline or with those that it is told.
"""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.harness.records import RowProvenance
from benchmarks.harness.rows import Result, Row, machine_key, newest
from fastres.host import Provenance

__all__ = [
    "HIGHER_IS_BETTER",
    "LOWER_IS_BETTER",
    "Baselines",
    "Result",
    "baseline_among",
    "by_machine",
    "choose",
    "cross_table",
    "machine_label",
    "markdown",
    "number",
    "table",
]

LOWER_IS_BETTER = ("s", "ms", "us")
HIGHER_IS_BETTER = ("images/s", "GB/s", "GFLOP/s", "TFLOP/s")

# Who the others of a case are measured against: the first of these that was measured beside them.
_BASELINES = (
    "none", "torchvision", "peer_fp32", "eager", "torch", "threads_1", "eager fp32 nchw torch",
)  # fmt: skip


def machine_label(provenance: Provenance | RowProvenance) -> str:
    """Name the machine of a provenance for people."""
    machine = provenance["machine"]
    if machine["gpu"]:
        return machine["gpu"]
    extensions = (machine["cpu_vectors"], machine.get("cpu_bf16"))
    return ", ".join([f"{machine['cores']} cores {machine['cpu']}", *filter(None, extensions)])


def number(value: float) -> str:
    """Write a value with four digits, from a thousand on with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cell(row: Row) -> str:
    middle, low, high = (number(value) for value in (row.median, row.low, row.high))
    return middle if low == high else f"{middle} ({low} to {high})"


def _title(row: Row) -> str:
    """Head the column of a row's metric; some names say the unit themselves."""
    if row.metric.endswith("images_per_second"):
        return " ".join([*row.metric.split("_")[:-3], row.unit])
    words = row.metric.replace("_", " ")
    return words if "seconds" in words or words == row.unit else f"{words}, {row.unit}"


def baseline_among(providers: Iterable[str]) -> str | None:
    """Return whom the providers of a case are measured against, if it is among them."""
    known = [name for name in providers if name in _BASELINES]
    return min(known, key=_BASELINES.index, default=None)


class Baselines:
    """Answers how many times faster a row is than another provider of its case.

    That one must stand in the same file: only what was measured in one run compares.
    """

    def __init__(self, results: Iterable[Result]):
        self._rows: dict[tuple, dict[str, Row]] = {}
        for row, provenance in results:
            self._rows.setdefault(self._key(row, provenance), {})[row.provider] = row

    @staticmethod
    def _key(row: Row, provenance: RowProvenance) -> tuple:
        return (id(provenance), row.suite, row.case, row.metric, row.unit)

    def of(self, result: Result) -> str | None:
        """Return the provider that a row is compared with; None for itself and for nobody."""
        base = baseline_among(self._rows[self._key(*result)])
        return None if base == result[0].provider else base

    def speedup(self, result: Result, against: str | None = None) -> float | None:
        """Return how many times faster a row is; None for the baseline itself, and without one.

        Args:
            result: row and provenance.
            against: another provider than the baseline.
        """
        row, name = result[0], against or self.of(result)
        base = self._rows[self._key(*result)].get(name or "")
        if base is None or base.provider == row.provider or min(base.median, row.median) <= 0:
            return None
        if row.unit in LOWER_IS_BETTER:
            return base.median / row.median
        return row.median / base.median if row.unit in HIGHER_IS_BETTER else None


def by_machine(results: Iterable[Result]) -> list[list[Result]]:
    """Split results by machine, the machine that was measured last first."""
    groups: dict[tuple, list[Result]] = {}
    for row, provenance in results:
        groups.setdefault(machine_key(provenance), []).append((row, provenance))
    return sorted(groups.values(), key=lambda g: max(c["date"] for _, c in g), reverse=True)


def choose(
    results: Iterable[Result],
    suite: str,
    *,
    case: str = "",
    metrics: Sequence[str] = (),
    providers: Sequence[str] = (),
) -> list[Result]:
    """Return the newest rows of a suite.

    Args:
        results: of `read_results`, all of them.
        suite: what to show.
        case: only cases that hold this text.
        metrics: only these; default: all.
        providers: only these; default: all.
    """
    return [
        (row, provenance)
        for row, provenance in newest(results)
        if row.suite == suite
        and case in row.case
        and (not metrics or row.metric in metrics)
        and (not providers or row.provider in providers)
    ]


def table(
    chosen: Sequence[Result], metrics: Sequence[str] = (), against: Sequence[str] = ()
) -> str:
    """Lay rows out with a line a case and provider.

    Args:
        chosen: of `choose`.
        metrics: the order of the columns; default: that of the rows.
        against: providers to give ratios to, a column each; default: the baseline of every case.
    """

    def body(group: Sequence[Result]) -> list[str]:
        order = metrics or list(dict.fromkeys(row.metric for row, _ in group))
        return _lines(group, order, against)

    return _by_machine(chosen, body)


def cross_table(
    chosen: Sequence[Result], metric: str, ratios: Sequence[tuple[str, str]] = ()
) -> str:
    """Lay the medians of one metric out, a line a case, a column a provider.

    Args:
        chosen: of `choose`.
        metric: to show.
        ratios: pairs of providers: how many times faster the first is than the second, a column
            each; default: every provider's ratio to the baseline, in brackets.
    """
    return _by_machine(
        [result for result in chosen if result[0].metric == metric],
        lambda group: _cross_lines(group, ratios),
    )


def _by_machine(chosen: Sequence[Result], body: Callable[[Sequence[Result]], list[str]]) -> str:
    if not chosen:
        return "Not measured yet.\n"
    texts = []
    for group in by_machine(chosen):
        births = list(dict.fromkeys(_origin(provenance) for _, provenance in group))
        heading = f"**{machine_label(group[0][1])}**; {'; '.join(births)}"
        texts.append("\n".join([heading, "", *body(group), ""]))
    return "\n".join(texts)


def _origin(provenance: RowProvenance) -> str:
    return f"torch {provenance['versions']['torch']}, {provenance['date'][:10]}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    rule = "|" + " --- |" * len(header)
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]


def _without_repeats(cases: Iterable[str]) -> list[str]:
    """Leave a case out where it stands in the line above."""
    above, shown = None, []
    for case in cases:
        shown.append("" if case == above else case)
        above = case
    return shown


def _lines(group: Sequence[Result], metrics: Sequence[str], against: Sequence[str]) -> list[str]:
    found: dict[tuple[str, str], dict[str, Result]] = {}
    # All providers of a case together, in the order in which both came up.
    cases = list(dict.fromkeys(row.case for row, _ in group))
    for result in sorted(group, key=lambda result: cases.index(result[0].case)):
        found.setdefault((result[0].case, result[0].provider), {})[result[0].metric] = result
    titles = {name: _title(r[name][0]) for name in metrics for r in found.values() if name in r}
    columns = {
        "case": _without_repeats(case for case, _ in found),
        "how": [provider for _, provider in found],
    }
    for name, title in titles.items():
        columns[title] = [_cell(r[name][0]) if name in r else "" for r in found.values()]
    baselines = Baselines(group)
    ratios = [[_ratio(r, titles, baselines, base) for r in found.values()] for base in against]
    titles_of_ratios = [f"against {base}" for base in against]
    if not against:
        ratios = [[_ratio(r, titles, baselines, None) for r in found.values()]]
        titles_of_ratios = ["speed"]
    columns |= {t: texts for t, texts in zip(titles_of_ratios, ratios, strict=True) if any(texts)}
    counts = [max(row.n for row, _ in r.values()) for r in found.values()]
    if max(counts) > 1:
        columns["n"] = [str(count) for count in counts]
    return markdown(list(columns), zip(*columns.values(), strict=True))


def _ratio(
    cells: dict[str, Result], metrics: Iterable[str], baselines: Baselines, against: str | None
) -> str:
    """Return the ratio of a line by its first metric that is a speed."""
    for name in metrics:
        ratio = baselines.speedup(cells[name], against) if name in cells else None
        if ratio is not None:
            return f"{ratio:.2f} x" if against else f"{ratio:.2f} x {baselines.of(cells[name])}"
    return ""


def _cross_lines(group: Sequence[Result], ratios: Sequence[tuple[str, str]]) -> list[str]:
    baselines = Baselines(group)
    columns = list(dict.fromkeys(row.provider for row, _ in group))
    lines: dict[str, dict[str, str]] = {}
    for result in group:
        cells = lines.setdefault(result[0].case, {})
        text = number(result[0].median)
        if not ratios and (ratio := baselines.speedup(result)):
            text += f" ({ratio:.2f} x)"
        cells[result[0].provider] = text
        for faster, slower in ratios:
            if result[0].provider == faster and (ratio := baselines.speedup(result, slower)):
                cells[f"{faster} / {slower}"] = f"{ratio:.2f} x"
    columns += [f"{faster} / {slower}" for faster, slower in ratios]
    header = [f"case; {_title(group[0][0])}", *columns]
    return markdown(
        header, ([case, *(cells.get(c, "") for c in columns)] for case, cells in lines.items())
    )
