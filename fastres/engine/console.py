"""What a run shows: the first screen, a progress bar, one row an epoch."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastres.data.dataset import Dataset
from fastres.data.evaluation_set import EvaluationSet
from fastres.engine.runtime import Runtime
from fastres.model.summary import ModelSummary
from fastres.recipes import Origins

__all__ = ["RunConsole", "layer_table"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class _SizedIterable(Sized, Iterable[T_co], Protocol[T_co]):
    """What a progress bar needs: items and how many."""


def layer_table(summary: ModelSummary) -> Table:
    """Lay out the layers of a network with shapes, parameters and operations."""
    table = Table(box=None, header_style="bold")
    table.add_column("layer")
    table.add_column("kind")
    for name in ("output", "parameters", "MFLOP"):
        table.add_column(name, justify="right")
    for layer in summary.layers:
        shape = " x ".join(map(str, layer.output))
        flops = f"{2 * layer.macs / 1e6:.2f}" if layer.macs else ""
        table.add_row(layer.name, layer.kind, shape, f"{layer.params:,}", flops)
    total = f"{summary.forward_flops / 1e6:.2f}"
    table.add_section()
    table.add_row("total", "", "", f"{summary.params:,}", total, style="bold")
    return table


def _plain(value: object) -> str:
    """A value of an option as the command line would spell it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


class RunConsole:
    """Writes for people.

    Args:
        quiet_stdout: keep stdout for the summary and write everything else to stderr.
        silent: write nothing, because another process does.
    """

    def __init__(self, *, quiet_stdout: bool = False, silent: bool = False):
        self.rich = Console(stderr=quiet_stdout, quiet=silent, highlight=False, soft_wrap=True)
        self._columns: list[str] = []

    def line(self, text: str, style: str | None = None) -> None:
        """Print one line as it is."""
        self.rich.print(text, style=style, markup=False)

    def origins(self, origins: Origins) -> None:
        """Print where the values of a run were taken from, a line a source."""
        for number, (source, options) in enumerate(origins.items()):
            words = (f"{name.replace('_', '-')} {_plain(v)}" for name, v in options.items())
            self.line(f"{'' if number else 'options':<10} {source}: {', '.join(words)}")

    def data(self, data: Dataset, num_train: int, num_val: int) -> None:
        """Print what is trained on, with every notice of the reader."""
        counts = {"training": num_train, "validation": num_val, "test": len(data.test)}
        parts = [f"{count:,} {split}" for split, count in counts.items() if count]
        self.line(f"data       {data.name}: {', '.join(parts)} images, {len(data.classes)} classes")
        self.line(f"           {data.source}")
        for notice in data.notices:
            self.line(f"           ! {notice}", style="bold yellow")

    def evaluation_data(self, data: EvaluationSet) -> None:
        """Print what is evaluated on, with every notice of the reader."""
        self.line(f"data       {data.name}: {len(data.images):,} images")
        self.line(f"           {data.source}")
        for notice in data.notices:
            self.line(f"           ! {notice}", style="bold yellow")

    def model(self, name: str, summary: ModelSummary) -> None:
        """Print the size of the network."""
        self.line(
            f"model      {name}: {summary.params:,} parameters, "
            f"{summary.training_flops / 1e9:.3f} GFLOP an image and training step"
        )

    def runtime(self, runtime: Runtime, *, training: bool = True) -> None:
        """Print what really runs, and why; fallbacks stand out."""
        for setting in runtime.settings:
            if not training and setting.name in ("graph", "optimizer"):
                continue
            mark = "! " if setting.fallback else ""
            reason = f"  ({mark}{setting.reason})" if setting.reason else ""
            style = "yellow" if setting.fallback else None
            self.line(f"{setting.name:<10} {setting.value}{reason}", style=style)

    def row(self, values: Mapping[str, Any]) -> None:
        """Print one row of the epoch table, and the header before the first."""
        shown = [key for key in _COLUMNS if key in values]
        if shown != self._columns:
            self._columns = shown
            self.line("  ".join(f"{_COLUMNS[key][0]:>9}" for key in shown), style="bold")
        self.line("  ".join(f"{values[key]:{_COLUMNS[key][1]}}" for key in shown))

    def progress(self, items: _SizedIterable[T], what: str, images: int) -> Iterator[T]:
        """Walk `items` under a bar with images/s and time left; silent when not a terminal.

        Args:
            items: batches.
            what: shown before the bar.
            images: how many one item stands for.
        """
        if self.rich.quiet or not self.rich.is_terminal:
            yield from items
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.rich, transient=True) as bar:
            task = bar.add_task(what, total=len(items), rate="")
            for item in items:
                yield item
                bar.advance(task)
                speed = bar.tasks[0].speed
                if speed:
                    bar.update(task, rate=f"{speed * images:,.0f} images/s")


_COLUMNS = {
    "epoch": ("epoch", "9.2f"),
    "train_loss": ("loss", "9.4f"),
    "train_accuracy": ("train %", "9.2f"),
    "val_accuracy": ("val %", "9.2f"),
    "test_accuracy": ("test %", "9.2f"),
    "images_per_second": ("images/s", "9,.0f"),
    "train_seconds": ("seconds", "9.1f"),
}
