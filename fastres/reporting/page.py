"""The report as HTML: one file, no network, no script; readable on a phone, light and dark.

Everything in it may be a stranger's text and is escaped.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastres.inference.scores import Evaluation
from fastres.reporting.figures import grid_of, line_chart, png_image
from fastres.reporting.layers import FeatureMaps, LayerCost

__all__ = ["NetworkInside", "RunFacts", "render"]


@dataclass(frozen=True)
class RunFacts:
    """What is told of one run.

    Attributes:
        name: of its folder.
        rows: of metrics.jsonl.
        options: of config.json.
        summary: of summary.json; None of a run that has not finished.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    summary: Mapping[str, Any] | None


@dataclass(frozen=True, eq=False)
class NetworkInside:
    """What is told of one trained network.

    Attributes:
        name: of its run.
        evaluation: on a test set; None where there was none, and then `why_not` says so.
        why_not: a sentence, or empty.
        images: (N, 32, 32, 3) uint8 of that set.
        filters: of the first convolution, as pictures.
        image: (32, 32, 3) uint8, that the maps are of; None where there was none.
        image_title: what it is.
        maps: of that image.
        costs: by layer.
        costs_title: where and how they were measured.
        notices: of the reader of the set.
    """

    name: str
    evaluation: Evaluation | None
    why_not: str
    images: np.ndarray | None
    filters: np.ndarray
    image: np.ndarray | None
    image_title: str
    maps: Sequence[FeatureMaps] = ()
    costs: Sequence[LayerCost] = ()
    costs_title: str = ""
    notices: Sequence[str] = ()


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --line: #d8dade;
  --soft: #f3f4f6; --quiet: #5c6066; --hit: 0, 114, 178; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --paper: #16181b; --line: #3a3d42; --soft: #202327; --quiet: #a3a7ad;
    --hit: 86, 180, 233; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
h3 { margin-top: 1.75rem; font-size: 1.05rem; }
p.note { color: var(--quiet); margin: .25rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; }
figure { margin: 0; } figcaption { font-size: .85rem; line-height: 1.4; }
.charts span { margin-right: 1rem; }
.charts i { display: inline-block; width: 1.6rem; vertical-align: middle; }
.wide { overflow-x: auto; }
svg { width: 100%; height: auto; }
img { image-rendering: pixelated; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th { background: var(--soft); } td.n, th.n { text-align: right; }
.wide th:first-child, .wide td:first-child { position: sticky; left: 0; }
.wide td:first-child { background: var(--paper); }
td.hit { background: rgba(var(--hit), var(--share)); }
.mistakes { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); }
code { font-family: ui-monospace, monospace; font-size: .85em; }
"""


def render(runs: Sequence[RunFacts], networks: Sequence[NetworkInside], made: str) -> str:
    """Return the whole page.

    Args:
        runs: at least one.
        networks: of the runs whose insides are shown.
        made: by what it was made and when.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="note">{html.escape(made)}</p>',
        _results(runs),
        _curves(runs),
        _differences(runs),
        *(_inside(network, alone=len(networks) == 1) for network in networks),
        _origins(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)} - fastres</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _cell(value: object, *, number: bool) -> str:
    return f"<td{' class=n' if number else ''}>{html.escape(str(value))}</td>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """Return a table; all columns from `numbers` on hold numbers. Rows hold finished cells."""
    head = "".join(
        f"<th{' class=n' if place >= numbers else ''}>{html.escape(name)}</th>"
        for place, name in enumerate(columns)
    )
    lines = "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table>'
        "</div>"
    )


_SUMMARY_COLUMNS = {
    "model": ("network", "{}"),
    "dataset": ("data", "{}"),
    "route": ("route", "{}"),
    "precision": ("precision", "{}"),
    "test_accuracy": ("test accuracy, %", "{:.2f}"),
    "val_accuracy": ("validation, %", "{:.2f}"),
    "test_loss": ("test loss", "{:.4f}"),
    "epochs": ("epochs", "{:g}"),
    "train_seconds": ("seconds of training", "{:,.0f}"),
    "images_per_second": ("images/s", "{:,.0f}"),
    "parameters": ("parameters", "{:,}"),
    "peak_memory_mib": ("peak MiB", "{:,.0f}"),
}
_TEXT_COLUMNS = 5


def _results(runs: Sequence[RunFacts]) -> str:
    shown = {
        key: column
        for key, column in _SUMMARY_COLUMNS.items()
        if any(run.summary and run.summary.get(key) is not None for run in runs)
    }
    rows = []
    for run in runs:
        cells = [_cell(run.name, number=False)]
        for place, (key, (_, form)) in enumerate(shown.items(), 1):
            value = (run.summary or {}).get(key)
            text = form.format(value) if isinstance(value, int | float) else value or ""
            cells.append(_cell(text, number=place >= _TEXT_COLUMNS))
        rows.append(cells)
    names = ["run", *(name for name, _ in shown.values())]
    unfinished = [run.name for run in runs if run.summary is None]
    note = f'<p class="note">not finished: {html.escape(", ".join(unfinished))}</p>'
    table = _table(names, rows, _TEXT_COLUMNS) if shown else ""
    return f"<h2>Results</h2>\n{table}{note if unfinished else ''}"


def _column(run: RunFacts, name: str, x: str = "epoch") -> tuple[list[float], list[float]]:
    rows = [row for row in run.rows if name in row and x in row]
    return [row[x] for row in rows], [row[name] for row in rows]


def _curves(runs: Sequence[RunFacts]) -> str:
    if not any(run.rows for run in runs):
        return '<h2>Curves</h2>\n<p class="note">no epoch has ended yet</p>'
    charts = []
    for what, y in (("accuracy", "accuracy, %"), ("loss", "mean loss")):
        lines, dashed = {}, []
        for run in runs:
            prefix = "" if len(runs) == 1 else f"{run.name}: "
            for split in ("test", "val", "train"):
                xs, ys = _column(run, f"{split}_{what}")
                if xs and (split != "val" or len(runs) == 1):
                    label = f"{prefix}{split}"
                    lines[label] = xs, ys
                    if split == "train" and len(runs) > 1:
                        dashed.append(label)
        charts.append(line_chart(lines, title=what, x="epoch", y=y, dashed=dashed))
    found = {run.name: _column(run, "test_accuracy", "train_seconds") for run in runs}
    by_time = {name: points for name, points in found.items() if points[0]}
    if len(by_time) > 1:
        charts.append(
            line_chart(by_time, title="test accuracy by time", x="seconds of training", y="%")
        )
    return f'<h2>Curves</h2>\n<div class="charts">{"".join(charts)}</div>'


def _differences(runs: Sequence[RunFacts]) -> str:
    """Return the options in which runs differ, or for one run all that it has."""
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    values = {name: [run.options.get(name) for run in runs] for name in names}
    if len(runs) > 1:
        values = {k: v for k, v in values.items() if any(x != v[0] for x in v)}
    rows = [
        [_cell(name, number=False), *(_cell(_shown(value), number=False) for value in line)]
        for name, line in values.items()
    ]
    if not rows:
        return "<h2>Options</h2>\n<p>These runs have the same options.</p>"
    title = "Options" if len(runs) == 1 else "Options that differ"
    table = _table(["option", *(run.name for run in runs)], rows, len(runs) + 1)
    if len(runs) == 1:
        return f"<h2>{title}</h2>\n<details><summary>all {len(rows)}</summary>{table}</details>"
    return f"<h2>{title}</h2>\n{table}"


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _inside(network: NetworkInside, *, alone: bool) -> str:
    name = "" if alone else f" of {html.escape(network.name)}"
    parts = []
    if network.evaluation is None:
        parts.append(f"<h2>Test images{name}</h2>\n<p>{html.escape(network.why_not)}</p>")
    else:
        parts.append(_test_images(network, network.evaluation, name))
    filters = grid_of(network.filters, columns=16, zoom=8)
    parts.append(
        f"<h2>First filters{name}</h2>\n"
        f'<p class="note">{len(network.filters)} filters, each scaled by its largest value; grey '
        f"is zero</p>\n{png_image(filters, 'filters of the first convolution')}"
    )
    if network.image is not None:
        shown = "".join(
            f"<h3>{html.escape(part.name)}: {part.maps.shape[1]} x {part.maps.shape[2]}</h3>\n"
            + png_image(
                grid_of(part.maps, columns=8, zoom=max(1, 64 // part.maps.shape[1])),
                f"feature maps behind {part.name}",
            )
            for part in network.maps
        )
        image = png_image(grid_of(network.image[None], columns=1, zoom=4), network.image_title)
        parts.append(
            f"<h2>Feature maps{name}</h2>\n{image}\n"
            f'<p class="note">{html.escape(network.image_title)}; of each part the first maps, '
            f"each scaled by its largest value</p>\n{shown}"
        )
    parts.append(_layer_table(network, name))
    return "\n".join(parts)


def _test_images(network: NetworkInside, evaluation: Evaluation, name: str) -> str:
    low, high = evaluation.interval
    text = (
        f"<p>{evaluation.accuracy:.2f} % of {evaluation.images:,} images are right (95 % interval "
        f"{low:.2f} to {high:.2f}); loss {evaluation.loss:.4f}; expected calibration error "
        f"{evaluation.calibration_error:.2f} %.</p>"
    )
    notices = "".join(f'<p class="note">! {html.escape(line)}</p>' for line in network.notices)
    return (
        f"<h2>Test images{name}</h2>\n{notices}{text}\n<h3>Confusion</h3>\n"
        + _confusion(evaluation)
        + _classes(evaluation)
        + _mistakes(network, evaluation)
    )


def _confusion(evaluation: Evaluation) -> str:
    names = [score.name for score in evaluation.classes]
    counts = evaluation.confusion.numpy()
    if len(names) > 20:
        off = counts.copy()
        np.fill_diagonal(off, 0)
        order = np.argsort(-off, axis=None, kind="stable")[:20]
        pairs = [divmod(int(place), len(names)) for place in order]
        rows = [
            [
                *(_cell(names[k], number=False) for k in (a, b)),
                _cell(f"{off[a, b]:,}", number=True),
            ]
            for a, b in pairs
            if off[a, b]
        ]
        return _table(["label", "said", "images"], rows, 2)
    rows = []
    for row, name in enumerate(names):
        total = max(1, int(counts[row].sum()))
        cells = [_cell(name, number=False)]
        for count in counts[row].tolist():
            # The root shows rare mistakes, too; the text stays readable on the deepest shade.
            shade = 0.45 * (count / total) ** 0.5
            cells.append(f'<td class="n hit" style="--share: {shade:.3f}">{count or ""}</td>')
        rows.append(cells)
    return '<p class="note">rows: labels, columns: what was said</p>' + _table(
        ["", *names], rows, 1
    )


def _classes(evaluation: Evaluation) -> str:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    # Those without images are neither hard nor easy, and come last.
    found = sorted(evaluation.classes, key=lambda score: (score.images == 0, score.recall or 0.0))
    rows = [
        [_cell(score.name, number=False)]
        + [_cell(f"{score.images:,}", number=True)]
        + [_cell(text(x), number=True) for x in (score.recall, score.precision, score.f1)]
        for score in found[:20]
    ]
    title = "Classes, the hardest first" if len(found) <= 20 else "The hardest 20 classes"
    columns = ["class", "images", "recall, %", "precision, %", "F1, %"]
    return f"<h3>{title}</h3>\n" + _table(columns, rows, 1)


def _mistakes(network: NetworkInside, evaluation: Evaluation) -> str:
    if network.images is None or not evaluation.mistakes:
        return ""
    figures = []
    for mistake in evaluation.mistakes[:24]:
        said, label = (evaluation.classes[k].name for k in (mistake.predicted, mistake.label))
        picture = png_image(
            grid_of(network.images[mistake.index][None], columns=1, zoom=3), f"a mistake: {said}"
        )
        figures.append(
            f"<figure>{picture}<figcaption>{html.escape(said)} {100 * mistake.confidence:.1f} %<br>"
            f"is {html.escape(label)}</figcaption></figure>"
        )
    return f'<h3>The surest mistakes</h3>\n<div class="mistakes">{"".join(figures)}</div>'


def _layer_table(network: NetworkInside, name: str) -> str:
    rows = [
        [_cell(cost.name, number=False), _cell(cost.kind, number=False)]
        + [_cell(" x ".join(map(str, cost.output)), number=False)]
        + [
            _cell(text, number=True)
            for text in (
                f"{cost.params:,}",
                f"{cost.mflop:,.2f}",
                f"{cost.bytes / 1024:,.1f}",
                f"{cost.microseconds:,.2f}",
            )
        ]
        for cost in network.costs
    ]
    columns = ["layer", "kind", "output", "parameters", "MFLOP", "KiB", "microseconds"]
    return (
        f'<h2>Layers{name}</h2>\n<p class="note">{html.escape(network.costs_title)}</p>\n'
        + _table(columns, rows, 3)
    )


def _origins(runs: Sequence[RunFacts]) -> str:
    """Return where the numbers of the runs come from: commands, commits, versions, machines."""
    parts = []
    for run in runs:
        if run.summary is None:
            continue
        about = run.summary
        machine, versions = (_mapping(about.get(name)) for name in ("machine", "versions"))
        where = machine.get("gpu") or f"{machine.get('cores')} cores {machine.get('cpu')}"
        words = (f"commit {about.get('commit')}", f"torch {versions.get('torch')}", where)
        origin = ", ".join(map(str, (*words, about.get("date"))))
        parts.append(
            f"<p>{html.escape(run.name)}: <code>{html.escape(str(about.get('command')))}</code>"
            f'</p>\n<p class="note">{html.escape(origin)}</p>'
        )
    return "\n".join(["<h2>Origins</h2>", *parts]) if parts else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
