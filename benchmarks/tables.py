"""Rows as Markdown tables: one a machine, with spread, n, and the ratio to the baseline."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.rows import Row, machine_key, newest

__all__ = [
    "HIGHER_IS_BETTER",
    "LOWER_IS_BETTER",
    "Baselines",
    "Result",
    "by_machine",
    "machine_label",
    "number",
    "table",
]

Result = tuple[Row, dict[str, Any]]

LOWER_IS_BETTER = ("s", "ms", "us")
HIGHER_IS_BETTER = ("images/s", "GB/s", "GFLOP/s", "TFLOP/s")

# Who the others of a case are measured against: the first of these that was measured beside them.
_BASELINES = ("none", "torchvision", "peer_fp32", "eager", "torch", "eager fp32 nchw torch")


def machine_label(certificate: dict[str, Any]) -> str:
    """Name the machine of a certificate for people."""
    machine = certificate["machine"]
    if machine["gpu"]:
        return machine["gpu"]
    extensions = (machine["cpu_vectors"], machine.get("cpu_bf16"))
    return ", ".join([f"{machine['cores']} cores {machine['cpu']}", *filter(None, extensions)])


def number(value: float) -> str:
    """Write a value with four digits, from a thousand on with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cell(row: Row) -> str:
    text = f"{number(row.median)} {row.unit}"
    if row.n == 1:
        return text
    return f"{text} ({number(row.low)} to {number(row.high)}, n = {row.n})"


class Baselines:
    """Answers how many times faster a row is than the baseline of its case.

    The baseline must stand in the same file: only what was measured in one run compares.
    """

    def __init__(self, results: Iterable[Result]):
        self._rows: dict[tuple, Row] = {}
        for row, certificate in results:
            if row.provider in _BASELINES:
                key = self._key(row, certificate)
                best = min(row, self._rows.get(key, row), key=_rank)
                self._rows[key] = best

    @staticmethod
    def _key(row: Row, certificate: dict[str, Any]) -> tuple:
        return (id(certificate), row.suite, row.case, row.metric, row.unit)

    def of(self, result: Result) -> str | None:
        """Return the provider that a row is compared with; None for itself and for nobody."""
        base = self._rows.get(self._key(*result))
        return None if base is None or base.provider == result[0].provider else base.provider

    def speedup(self, result: Result) -> float | None:
        """Return the ratio of a row; None for the baseline itself, and where there is none."""
        row = result[0]
        if self.of(result) is None:
            return None
        base = self._rows[self._key(*result)]
        if min(base.median, row.median) <= 0:
            return None
        if row.unit in LOWER_IS_BETTER:
            return base.median / row.median
        return row.median / base.median if row.unit in HIGHER_IS_BETTER else None


def _rank(row: Row) -> int:
    return _BASELINES.index(row.provider)


def by_machine(results: Iterable[Result]) -> list[list[Result]]:
    """Split results by machine, the machine that was measured last first."""
    groups: dict[tuple, list[Result]] = {}
    for row, certificate in results:
        groups.setdefault(machine_key(certificate), []).append((row, certificate))
    return sorted(groups.values(), key=lambda g: max(c["date"] for _, c in g), reverse=True)


def table(
    results: Sequence[Result],
    suite: str,
    *,
    case: str = "",
    metrics: Sequence[str] = (),
    providers: Sequence[str] = (),
) -> str:
    """Lay the newest rows of a suite out, a table a machine and a line a case and provider.

    Args:
        results: of `read_results`, all of them.
        suite: what to show.
        case: show only cases that hold this text.
        metrics: show only these, in this order; default: all.
        providers: show only these; default: all.
    """
    chosen: list[Result] = [
        (row, certificate)
        for row, certificate in newest(results)
        if row.suite == suite
        and case in row.case
        and (not metrics or row.metric in metrics)
        and (not providers or row.provider in providers)
    ]
    if not chosen:
        return "Not measured yet.\n"
    baselines = Baselines(results)
    return "\n".join(
        f"**{machine_label(group[0][1])}**\n\n{_machine_table(group, metrics, baselines)}"
        for group in by_machine(chosen)
    )


def _machine_table(group: Sequence[Result], metrics: Sequence[str], baselines: Baselines) -> str:
    lines: dict[tuple[str, str, str], dict[str, Result]] = {}
    for row, certificate in group:
        measured = f"torch {certificate['versions']['torch']}, {certificate['date'][:10]}"
        lines.setdefault((row.case, row.provider, measured), {})[row.metric] = (row, certificate)
    shown = metrics or list(dict.fromkeys(row.metric for row, _ in group))
    names: list[str] = [name for name in shown if any(name in cells for cells in lines.values())]
    ratios = _ratios(lines, names, baselines)
    header = ["case", "how", *(name.replace("_", " ") for name in names)]
    if any(ratios.values()):
        header.append("speed")
    header.append("measured")
    text = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    above = None
    for key, cells in sorted(lines.items(), key=_order(lines)):
        case, provider, measured = key
        shown_case, above = "" if case == above else case, case
        values = [_cell(cells[name][0]) if name in cells else "" for name in names]
        ratio = [ratios[key]] if any(ratios.values()) else []
        text.append(f"| {' | '.join([shown_case, provider, *values, *ratio, measured])} |")
    return "\n".join(text) + "\n"


def _order(lines: dict[tuple[str, str, str], Any]) -> Callable[[Any], tuple[int, int]]:
    """Keep the lines of a case together, in the order in which cases and lines came up."""
    cases = list(dict.fromkeys(case for case, _, _ in lines))
    keys = list(lines)
    return lambda item: (cases.index(item[0][0]), keys.index(item[0]))


def _ratios(
    lines: dict[tuple[str, str, str], dict[str, Result]],
    names: Sequence[str],
    baselines: Baselines,
) -> dict[tuple[str, str, str], str]:
    """Return the ratio to the baseline of every line, by the first metric that is a speed."""
    ratios = {}
    for key, cells in lines.items():
        found = (
            f"{ratio:.2f} x {baselines.of(cells[name])}"
            for name in names
            if name in cells and (ratio := baselines.speedup(cells[name])) is not None
        )
        ratios[key] = next(found, "")
    return ratios
