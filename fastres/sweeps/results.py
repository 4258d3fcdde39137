"""What a sweep says: a row a setting, and which differences are larger than the seeds' spread.

The mean, standard deviation and Student's 95 % interval of each setting's accuracies; each setting
is compared with the first one that was planned, by Welch's t-test, which does not ask for equal
spreads, two-sided, and the p-values are corrected for their number after Holm 1979. Both need
scipy; without it the interval and the comparison are left out, and the sweep says so.
"""

import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

__all__ = [
    "RunRow",
    "SettingRow",
    "as_dict",
    "datasets_of",
    "draw",
    "has_scipy",
    "setting_rows",
    "table_of",
]

Measured = Literal["test_accuracy", "val_accuracy"]
# What the last columns of the table mean.
VERDICTS = (
    "diff: from the first setting, larger than the seeds' spread or within it by Welch's t-test, "
    "two-sided, at p < 0.05 after Holm"
)
_LEVEL = 0.05


@dataclass(frozen=True)
class RunRow:
    """One run that has ended.

    Attributes:
        setting: its label.
        seed: of it.
        dataset: that it was trained on, as its summary names it.
        test_accuracy: in percent, after the last epoch, or of the best on the validation images.
        val_accuracy: in percent; None without --val.
        train_seconds: of it; beside other runs they are longer than alone.
        path: of its folder.
    """

    setting: str
    seed: int
    dataset: str
    test_accuracy: float
    val_accuracy: float | None
    train_seconds: float
    path: str


@dataclass(frozen=True)
class SettingRow:
    """One setting over its seeds.

    Attributes:
        setting: its label.
        dataset: of its runs; several names where they had several.
        n: runs that have ended.
        mean, sd: of the accuracy, in percent; sd is None of one run.
        low, high: 95 % interval of the mean; None of one run, and without scipy.
        difference: mean less that of the first setting; None of that one, in a search, and
            where no run of the first has ended.
        p: of Welch's t-test against the first setting, corrected; None where there is none: with
            one run, with two spreads of zero, in a search and without scipy.
        larger: whether the difference is larger than the seeds' spread: p below 0.05.
        seconds: mean of a run's training.
    """

    setting: str
    dataset: str
    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    difference: float | None
    p: float | None
    larger: bool | None
    seconds: float


def has_scipy() -> bool:
    """Tell whether intervals and tests can be computed."""
    try:
        import scipy.stats  # noqa: F401
    except ImportError:
        return False
    return True


def setting_rows(
    runs: Iterable[RunRow], measured: Measured, reference: str | None
) -> list[SettingRow]:
    """Return a row a setting, in the order in which the settings first appear.

    Args:
        runs: that have ended.
        measured: what settings are judged by; runs that lack it do not count.
        reference: the setting that the others are compared with; None compares none.
    """
    groups: dict[str, list[RunRow]] = {}
    for run in runs:
        if getattr(run, measured) is not None:
            groups.setdefault(run.setting, []).append(run)
    values = {setting: [getattr(run, measured) for run in g] for setting, g in groups.items()}
    base = values.get(reference or "", [])
    others = [setting for setting in values if base and setting != reference]
    tests = {setting: _welch(values[setting], base) for setting in others}
    corrected = _holm({setting: p for setting, p in tests.items() if p is not None})
    rows = []
    for setting, found in values.items():
        mean = statistics.mean(found)
        sd = statistics.stdev(found) if len(found) > 1 else None
        half = _half_interval(sd, len(found))
        p = corrected.get(setting)
        rows.append(
            SettingRow(
                setting=setting,
                dataset=datasets_of(groups[setting]),
                n=len(found),
                mean=mean,
                sd=sd,
                low=None if half is None else mean - half,
                high=None if half is None else mean + half,
                difference=mean - statistics.mean(base) if setting in others else None,
                p=p,
                larger=None if p is None else p < _LEVEL,
                seconds=statistics.mean(run.train_seconds for run in groups[setting]),
            )
        )
    return rows


def datasets_of(runs: Iterable[RunRow]) -> str:
    """Name what the runs were trained on: one dataset, unless `auto` found several."""
    return " and ".join(sorted({run.dataset for run in runs}))


def _half_interval(sd: float | None, n: int) -> float | None:
    if sd is None or not has_scipy():
        return None
    from scipy import stats

    return float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)


def _welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    if min(len(a), len(b)) < 2 or not has_scipy():
        return None
    spreads = statistics.stdev(a), statistics.stdev(b)
    if spreads == (0, 0):
        return None
    from scipy import stats

    # By numbers that are exact here: scipy's own warn where values are equal.
    found = stats.ttest_ind_from_stats(
        *(statistics.mean(a), spreads[0], len(a)),
        *(statistics.mean(b), spreads[1], len(b)),
        equal_var=False,
    )
    return float(found.pvalue)


def _holm(values: dict[str, float]) -> dict[str, float]:
    """Return p-values that hold for all comparisons together (Holm 1979)."""
    corrected: dict[str, float] = {}
    highest = 0.0
    for place, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(values) - place) * p))
        corrected[name] = highest
    return corrected


def table_of(rows: Sequence[SettingRow], measured: Measured) -> Table:
    """Lay the rows out for a terminal."""
    table = Table(box=None, header_style="bold")
    if any(row.larger is not None for row in rows):
        table.caption = VERDICTS
        table.caption_justify = "left"
    # Numbers stay whole in a narrow terminal; a setting is folded, since it must be read.
    table.add_column("setting", overflow="fold")
    what = "test" if measured == "test_accuracy" else "val"
    for name in ("n", f"{what} %", "sd", "95 % interval", "diff", "p", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("spread", no_wrap=True)
    verdict = {True: "larger", False: "within"}
    for row in rows:
        interval = "" if row.low is None else f"{row.low:.2f} to {row.high:.2f}"
        table.add_row(
            Text(row.setting),
            str(row.n),
            f"{row.mean:.2f}",
            "" if row.sd is None else f"{row.sd:.2f}",
            interval,
            "" if row.difference is None else f"{row.difference:+.2f}",
            "" if row.p is None else f"{row.p:.3g}",
            f"{row.seconds:,.0f}",
            "" if row.larger is None else verdict[row.larger],
        )
    return table


def draw(
    runs: Sequence[RunRow], rows: Sequence[SettingRow], measured: Measured, title: str
) -> bytes:
    """Draw every run as a point, mean and interval of each setting beside, and return a PNG."""
    from matplotlib.figure import Figure

    # A PNG of matplotlib's has 65,535 pixels at most.
    height = min(1.4 + 0.42 * len(rows), 500)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        y = len(rows) - 1 - place
        points = [getattr(run, measured) for run in runs if run.setting == row.setting]
        points = [point for point in points if point is not None]
        axes.plot(points, [y] * len(points), "o", color="tab:blue", alpha=0.55, markersize=5)
        half = None if row.low is None else row.mean - row.low
        axes.errorbar(row.mean, y, xerr=half, fmt="|", color="black", capsize=4, markersize=12)
    labels = [row.setting for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels, parse_math=False)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    what = "test" if measured == "test_accuracy" else "validation"
    bars = "; bars: 95 % interval of the mean" if any(row.low is not None for row in rows) else ""
    axes.set_title(f"{title}: {datasets_of(runs)}", parse_math=False)
    axes.set_xlabel(f"{what} accuracy, % (points: runs{bars})")
    axes.grid(axis="x", alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def as_dict(row: RunRow | SettingRow) -> dict[str, Any]:
    """Return a row as a mapping, for CSV."""
    return dict(vars(row))
