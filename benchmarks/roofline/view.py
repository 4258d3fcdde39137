"""What `benchmarks.roofline` shows: tables for the terminal and a plot."""

import io
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.roofline.peak_rates import CONV_OPS
from benchmarks.roofline.profile_step import OUTSIDE
from benchmarks.roofline.step_traffic import CATEGORIES

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.roofline.measure import Roofline

__all__ = ["draw", "show"]

_SCHEMES = {"eager": "every operator alone", "fused": "launches of fastres.kernels"}
_OP_STYLES: dict[str, dict[str, Any]] = {
    op: {"marker": marker, "color": f"C{number}", "alpha": 0.8}
    for number, (op, marker) in enumerate(zip(CONV_OPS, "os^", strict=True))
}


def show(result: "Roofline") -> None:
    """Print the tables and the verdict."""
    from rich.console import Console

    console = Console()
    for table in (_peak_rates(result), _convolutions(result), _floors(result), _profile(result)):
        console.print(table)
    for line in verdict(result):
        console.print(line, highlight=False)


def verdict(result: "Roofline") -> list[str]:
    """Return the numbers that count, a line each."""
    step, over = median(result.step), result.over_convolutions
    memory_bound = result.memory_seconds > result.arithmetic_seconds
    return [
        f"step ({result.route}): {_ms(step)} ms, {result.batch_size / step:,.0f} images/s, "
        f"n = {len(result.step)}, {_ms(min(result.step))} to {_ms(max(result.step))} ms",
        f"floor: {_ms(result.floor)} ms, bound by {'memory' if memory_bound else 'arithmetic'}; "
        f"the step reaches {100 * result.floor / step:.0f} % of it",
        f"step / convolutions alone: {median(over):.3f} ({min(over):.3f} to {max(over):.3f})",
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _peak_rates(result: "Roofline") -> "Table":
    table = _table("Peak rates of this machine", "what", "median", "lowest", "highest", "n", "unit")
    rates = {f"copy, {name}": ("GB/s", values) for name, values in result.copies.items()}
    for name, values in result.products.items():
        rates[f"matrix product, {name}"] = ("GFLOP/s", values)
    for name, (unit, values) in rates.items():
        cells = (f"{v / 1e9:,.1f}" for v in (median(values), min(values), max(values)))
        table.add_row(name, *cells, str(len(values)), unit)
    return table


def _convolutions(result: "Roofline") -> "Table":
    columns = ("shape", "layers", *(f"{op} GFLOP/s" for op in CONV_OPS), "all ms", "share of peak")
    table = _table(f"Convolutions alone: {result.case}", *columns)
    for conv in result.convs:
        work = conv.layer.shape.flops * result.batch_size
        cells = []
        for op in CONV_OPS:
            times = conv.times.get(op)
            cells.append(f"{work / median(times) / 1e9:,.0f}" if times else "none")
        seconds = conv.seconds()
        share = conv.count * len(conv.times) * work / seconds / result.arithmetic
        row = (conv.layer.label, str(conv.count), *cells, _ms(seconds), f"{100 * share:.0f} %")
        table.add_row(*row)
    return table


def _floors(result: "Roofline") -> "Table":
    table = _table("Floors of the step", "what", "work", "rate", "ms", "share of the step")
    step, work = median(result.step), result.work
    bandwidth = f"{result.bandwidth / 1e9:,.1f} GB/s"
    for scheme, num_bytes in work.bytes.items():
        seconds = num_bytes / result.bandwidth
        megabytes = f"{num_bytes / result.batch_size / 1e6:.2f} MB/image"
        share = f"{100 * seconds / step:.0f} %"
        table.add_row(f"memory: {_SCHEMES[scheme]}", megabytes, bandwidth, _ms(seconds), share)
    seconds = result.arithmetic_seconds
    operations = f"{work.flops / result.batch_size / 1e9:.3g} GFLOP/image"
    rate = f"{result.arithmetic / 1e9:,.0f} GFLOP/s"
    share = f"{100 * seconds / step:.0f} %"
    table.add_row("arithmetic, as a matrix product", operations, rate, _ms(seconds), share)
    alone = result.convolutions
    rate = f"{work.flops / alone / 1e9:,.0f} GFLOP/s"
    share = f"{100 * alone / step:.0f} %"
    table.add_row("convolutions alone", operations, rate, _ms(alone), share)
    return table


def _profile(result: "Roofline") -> "Table":
    table = _table("Where the step goes", "category", "share", "ms", "eager bytes at full speed")
    step = median(result.step)
    for category, share in result.profile.items():
        moved = result.work.eager_bytes.get(category)
        floor = f"{_ms(moved / result.bandwidth)} ms" if moved else ""
        table.add_row(category, f"{100 * share:.1f} %", _ms(share * step), floor)
    return table


def draw(result: "Roofline") -> bytes:
    """Draw the roofline with the convolutions under it, and the step beside its floors; a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    figure.suptitle(f"{result.case}, route {result.route}")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_roof(left, result)
    _draw_bars(right, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_roof(axes: Any, result: "Roofline") -> None:
    itemsize = 4 if result.dtype == "fp32" else 2
    points: list[float] = []
    for conv in result.convs:
        shape = replace(conv.layer.shape, N=result.batch_size)
        work = shape.flops
        intensity = work / shape.num_bytes(itemsize)
        points.append(intensity)
        for op, times in conv.times.items():
            axes.plot(intensity, work / median(times) / 1e9, linestyle="none", **_OP_STYLES[op])
    whole = result.work.flops / result.work.fewest_bytes
    rate = result.work.flops / median(result.step) / 1e9
    axes.plot(whole, rate, "k*", markersize=14)
    axes.annotate("whole step", (whole, rate), (8, -12), textcoords="offset points")
    points.append(whole)
    ridge = result.arithmetic / result.bandwidth
    span = (min(*points, ridge) / 2, max(*points, ridge) * 2)
    roof = [(x, min(x * result.bandwidth, result.arithmetic) / 1e9) for x in (*span, ridge)]
    axes.plot(*zip(*sorted(roof), strict=True), color="k", linewidth=1.2)
    for op, style in _OP_STYLES.items():
        axes.plot([], [], linestyle="none", label=op, **style)
    # Nothing can stand above the roof.
    axes.legend(loc="lower right", title="convolutions alone")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", xlim=span)
    axes.set_title(
        f"roof: {result.bandwidth / 1e9:,.0f} GB/s, {result.arithmetic / 1e9:,.0f} GFLOP/s",
        fontsize="medium",
    )
    axes.grid(alpha=0.3, which="both")


def _draw_bars(axes: Any, result: "Roofline") -> None:
    step_ms = 1e3 * median(result.step)
    floors = {f"memory, {name}": num / result.bandwidth for name, num in result.work.bytes.items()}
    floors["arithmetic"] = result.arithmetic_seconds
    floors["convolutions alone"] = result.convolutions
    for name, seconds in reversed(floors.items()):
        bar = axes.barh(name, 1e3 * seconds, color="0.65")
        axes.bar_label(bar, fmt=lambda value: f" {value:.3g}", padding=2)
    start = 0.0
    order = [*CATEGORIES, OUTSIDE]
    shares = {name: result.profile[name] for name in order if result.profile.get(name, 0) > 0.002}
    for name, share in shares.items():
        colour = f"C{order.index(name)}"
        axes.barh("step", share * step_ms, left=start, color=colour, label=name)
        start += share * step_ms
    axes.annotate(f" {step_ms:.3g}", (step_ms, "step"), va="center")
    axes.axvline(1e3 * result.floor, color="k", linestyle="--", linewidth=1)
    axes.set(xlabel="ms a step; dashed: the floor")
    axes.set_xlim(0, 1.12 * max(step_ms, *(1e3 * seconds for seconds in floors.values())))
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.58), fontsize="small")
