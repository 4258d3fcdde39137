"""Pictures of the results, drawn from rows alone; a picture without rows is not drawn.

    ladder      images/s of every provider, with the roofline where it was measured
    accuracy    test accuracy against the seconds of training, on whole training sets
    loaders     images/s of every loader
    cost        time an image over batch size and over depth
    degradation errors, gradients and responses of plain and residual nets by depth

One picture a kind and machine, as SVG. A picture carries the hash of its rows, so that a stale one
is found without drawing it again: the bytes of a drawing differ between versions of matplotlib.
"""

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness.records import RowProvenance
from benchmarks.harness.rows import Result, Row, newest
from benchmarks.report.depth import lines_of_rows, newest_study
from benchmarks.report.tables import Baselines, by_machine, machine_label, number

__all__ = ["Picture", "pictures"]

_LADDERS = ("ladder", "step", "inference")
_RATE = "images_per_second"
_ACCURACY_METRICS = ("train_seconds", "test_accuracy")
# On a part of a set accuracy says nothing of a recipe, and behind a comma stands what was changed.
_WHOLE_RUN = re.compile(r"(?P<dataset>cifar\S+) 50000 (?P<what>[^,]+)")
# The pictures agree on who has which colour; everybody else gets a grey.
_COLOURS = {
    "peer_fp32": "#b0b0b0",
    "peer_amp": "#8c8c8c",
    "peer_compiled": "#6b6b6b",
    "peer_max_autotune": "#4d4d4d",
    "eager": "#9ecae1",
    "channels_last": "#6baed6",
    "amp": "#4292c6",
    "compile": "#8c6bb1",
    "max_autotune": "#6a3d9a",
    "fused": "#fd8d3c",
    "graph": "#e6550d",
    "fast": "#d7301f",
    "fast_uncompiled": "#99000d",
    "none": "#b0b0b0",
    "torchvision": "#8c8c8c",
    "torch": "#9ecae1",
    "resident": "#fd8d3c",
    "dali": "#76b900",
    "dali_gpu": "#4d7a00",
}


@dataclass(frozen=True)
class Picture:
    """One picture and the rows that it shows.

    Attributes:
        kind: see the head of the file.
        name: of its file, without the suffix.
        title: one line that says what is shown, for people who cannot see it too.
        rows: everything that is drawn.
        draw: makes the figure.
    """

    kind: str
    name: str
    title: str
    rows: tuple[Row, ...]
    draw: Callable[[], Any]

    @property
    def fingerprint(self) -> str:
        """Hash of title and rows."""
        text = self.title + repr([sorted(asdict(row).items()) for row in self.rows])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def svg(self) -> bytes:
        """Draw the picture; the same rows give the same bytes with one version of matplotlib."""
        import matplotlib

        figure = self.draw()
        buffer = io.BytesIO()
        metadata = {"Date": None, "Description": f"rows {self.fingerprint}"}
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            figure.savefig(buffer, format="svg", metadata=metadata)
        # matplotlib ends lines of path data in blanks.
        return re.sub(rb"[ ]+\n", b"\n", buffer.getvalue())


def pictures(results: Sequence[Result]) -> list[Picture]:
    """Return every picture that the rows give, machine by machine."""
    found = []
    for group in by_machine(newest(results)):
        for suite in _LADDERS:
            found += _bars("ladder", suite, group)
        found += _bars("loaders", "loaders", group)
        found += _accuracy("accuracy", group)
        found += _cost("cost", group)
        found += _degradation("degradation", group)
    return found


def _name(kind: str, provenance: RowProvenance) -> str:
    machine = provenance["machine"]
    where = machine["gpu"] or f"{machine['cores']} cores {machine['cpu']} {machine['cpu_vectors']}"
    return re.sub(r"[^a-z0-9]+", "-", f"{kind} {where}".lower()).strip("-")


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure


def _colour(provider: str) -> str:
    return next((c for name, c in _COLOURS.items() if provider.split(" ")[0] == name), "#bdbdbd")


def _bars(kind: str, suite: str, group: list[Result]) -> list[Picture]:
    """Bars of images/s, a panel a case; the roofline of a training step where there is one."""
    rates = [r for r in group if r[0].suite == suite and r[0].metric == _RATE]
    cases: dict[str, list[Result]] = {}
    for result in rates:
        cases.setdefault(result[0].case, []).append(result)
    if not cases:
        return []
    provenance = rates[0][1]
    roofs = {case: _roof(case, group) for case in cases} if suite in ("ladder", "step") else {}
    title = f"{suite}: images/s, whiskers from lowest to highest; {machine_label(provenance)}"
    shown = [row for row, _ in rates] + [roof for roof in roofs.values() if roof]

    def draw() -> Any:
        heights = [1.1 + 0.3 * len(bars) for bars in cases.values()]
        figure = _figure(8.5, 0.4 + sum(heights), title)
        panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
        baselines = Baselines(group)
        for axes, (case, bars) in zip(panels, cases.items(), strict=True):
            _draw_bars(axes, case, bars, baselines, roofs.get(case))
        return figure

    name = _name(kind if suite == kind else f"{kind} {suite}", provenance)
    return [Picture(kind, name, title, tuple(shown), draw)]


def _roof(case: str, group: list[Result]) -> Row | None:
    """Return the floor of the step that a case trains, if it was measured on this machine."""
    found = re.search(r"(\S+ batch \d+)", case)
    if not found:
        return None
    rows = (row for row, _ in group if (row.suite, row.metric) == ("roofline", "floor"))
    return next((row for row in rows if row.case.startswith(f"{found[1]},")), None)


def _draw_bars(
    axes: Any, case: str, bars: list[Result], baselines: Baselines, roof: Row | None
) -> None:
    names = [row.provider for row, _ in bars]
    for place, (row, provenance) in enumerate(bars):
        spread = [[row.median - row.low], [row.high - row.median]]
        error = {"ecolor": "0.25", "capsize": 2, "elinewidth": 1}
        axes.barh(place, row.median, xerr=spread, color=_colour(row.provider), error_kw=error)
        ratio = baselines.speedup((row, provenance))
        text = number(row.median) if ratio is None else f"{number(row.median)}   {ratio:.2f} x"
        style = {"va": "center", "fontsize": 8, "zorder": 3}
        # The text may stand on the line of the roofline.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        offset = {"xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(text, (row.high, place), **offset, **style, bbox=box)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    peak = _draw_roof(axes, roof) if roof is not None else 0.0
    axes.set_xlim(0, max(1.25 * max(row.high for row, _ in bars), 1.06 * peak))
    axes.xaxis.set_major_formatter(_plain)
    against = next(filter(None, map(baselines.of, bars)), None)
    ratios = f"; x: against {against}" if against else ""
    axes.set_title(f"{case}{ratios}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _draw_roof(axes: Any, roof: Row) -> float:
    """Draw the roofline and return it in images/s."""
    batch = int(re.search(r"batch (\d+)", roof.case)[1])  # type: ignore[index]
    peak = batch / (roof.median / 1e3)
    axes.axvline(peak, color="k", linestyle="--", linewidth=1)
    axes.annotate(
        f"roofline {number(peak)}",
        (peak, 1),
        (-4, -3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
    )
    return peak


def _plain(value: float, _position: Any) -> str:
    """Write a tick as people write numbers."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _plain_log(axis: Any) -> None:
    """Give a logarithmic axis ticks at 1, 2 and 5 times the powers of ten, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(_plain)
    axis.set_minor_locator(NullLocator())


def _accuracy(kind: str, group: list[Result]) -> list[Picture]:
    """Points of accuracy against seconds on whole training sets, a panel a set, peers in grey."""
    sets: dict[str, dict[tuple[str, str], dict[str, Row]]] = {}
    for row, _ in group:
        run = _WHOLE_RUN.fullmatch(row.case)
        if row.suite == "train" and row.metric in _ACCURACY_METRICS and run is not None:
            points = sets.setdefault(run["dataset"], {})
            points.setdefault((run["what"], row.provider), {})[row.metric] = row
    for dataset, points in sets.items():
        sets[dataset] = {key: rows for key, rows in points.items() if len(rows) == 2}
    sets = {dataset: points for dataset, points in sets.items() if points}
    if not sets:
        return []
    provenance = group[0][1]
    title = f"test accuracy against seconds of training; {machine_label(provenance)}"

    def draw() -> Any:
        heights = [2.6 + 0.22 * len(points) for points in sets.values()]
        figure = _figure(8.5, 0.4 + sum(heights), title)
        panels = figure.subplots(len(sets), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (dataset, points) in zip(panels, sets.items(), strict=True):
            _draw_points(axes, points)
            axes.set_title(dataset, fontsize=9, loc="left")
        panels[-1].set_xlabel("seconds of training")
        return figure

    shown = tuple(
        row for points in sets.values() for rows in points.values() for row in rows.values()
    )
    return [Picture(kind, _name(kind, provenance), title, shown, draw)]


def _draw_points(axes: Any, points: dict[tuple[str, str], dict[str, Row]]) -> None:
    """Draw a point with its spread for every way to train, and its name in a legend below."""
    colours = iter(f"C{n % 10}" for n in range(len(points)))
    for (what, provider), rows in points.items():
        seconds, accuracy = (rows[metric] for metric in _ACCURACY_METRICS)
        is_peer = provider.startswith("peer_")
        axes.errorbar(
            seconds.median,
            accuracy.median,
            xerr=[[seconds.median - seconds.low], [seconds.high - seconds.median]],
            yerr=[[accuracy.median - accuracy.low], [accuracy.high - accuracy.median]],
            marker="s" if is_peer else "o",
            color="0.5" if is_peer else next(colours),
            linestyle="none",
            capsize=2,
            label=f"{what}: {provider}, n = {accuracy.n}",
        )
    axes.set(ylabel="test accuracy (%)", xscale="log")
    axes.grid(alpha=0.3)
    axes.margins(0.15)
    _plain_log(axes.xaxis)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
    axes.legend(fontsize=7, frameon=False, **place)


def _cost(kind: str, group: list[Result]) -> list[Picture]:
    """Lines of microseconds an image, over batch size and over depth."""
    panels = {
        "batch curve": ("batch size", r"batch (\d+)"),
        "depth curve": ("layers", r"resnet(\d+)"),
    }
    rates = [r for r in group if r[0].suite in panels and r[0].metric == _RATE and r[0].low > 0]
    suites = [suite for suite in panels if any(row.suite == suite for row, _ in rates)]
    if not suites:
        return []
    provenance = rates[0][1]
    title = f"time an image, training step on a fixed batch; {machine_label(provenance)}"

    def draw() -> Any:
        figure = _figure(4.6 * len(suites) + 0.6, 3.8, title)
        for axes, suite in zip(
            figure.subplots(1, len(suites), squeeze=False)[0], suites, strict=True
        ):
            rows = [row for row, _ in rates if row.suite == suite]
            _draw_lines(axes, rows, panels[suite][1])
            what, varied = panels[suite]
            fixed = re.sub(varied, "", rows[0].case).strip()
            axes.set(xlabel=f"{what} ({fixed})", ylabel="microseconds an image")
        return figure

    shown = tuple(row for row, _ in rates)
    return [Picture(kind, _name(kind, provenance), title, shown, draw)]


def _degradation(kind: str, group: list[Result]) -> list[Picture]:
    """The newest study of depth, as `fastres study degradation` draws it."""
    from fastres.studies.picture import draw

    case, rows = newest_study(row for row, _ in group)
    if not rows:
        return []
    provenance = next(origin for row, origin in group if row is rows[-1])
    seeds = max(row.n for row in rows)
    title = f"plain and residual nets: {case}{f', medians of {seeds} seeds' * (seeds > 1)}"
    return [
        Picture(
            kind,
            _name(kind, provenance),
            title,
            tuple(rows),
            lambda: draw(lines_of_rows(rows), title),
        )
    ]


def _draw_lines(axes: Any, rows: list[Row], pattern: str) -> None:
    lines: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        found = re.search(pattern, row.case)
        if found:
            lines.setdefault(row.provider, []).append((int(found[1]), row))
    for provider, points in lines.items():
        points.sort(key=lambda point: point[0])
        places = [place for place, _ in points]
        middle = [1e6 / row.median for _, row in points]
        axes.plot(places, middle, marker="o", markersize=4, color=_colour(provider), label=provider)
        fastest, slowest = (
            [1e6 / getattr(row, end) for _, row in points] for end in ("high", "low")
        )
        axes.fill_between(places, fastest, slowest, color=_colour(provider), alpha=0.2, linewidth=0)
    every = sorted({place for points in lines.values() for place, _ in points})
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(every, [str(place) for place in every])
    axes.minorticks_off()
    _plain_log(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
