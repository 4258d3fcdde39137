"""Pictures of an evaluation: the confusion matrix, the calibration, the surest mistakes."""

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastres.inference.scores import CalibrationBin, Mistake

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_calibration", "draw_confusion", "draw_mistakes"]

# Beyond it numbers in cells are too small to read.
_NUMBERED_CLASSES = 20


def _png(figure: "Figure") -> bytes:
    from matplotlib.text import Text

    # A class or a folder may be called "$x$", which is no formula here.
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _folded(title: str, figure: "Figure") -> str:
    """Fold a title to the width of a figure, about ten of its letters an inch."""
    return textwrap.fill(title, int(10 * figure.get_figwidth()))


def draw_confusion(confusion: np.ndarray, classes: Sequence[str], title: str) -> bytes:
    """Draw the confusion matrix and return a PNG.

    Args:
        confusion: (C, C) counts, rows the labels, columns what was said.
        classes: C names.
        title: one line.
    """
    from matplotlib.figure import Figure

    count = len(classes)
    totals = confusion.sum(axis=1, keepdims=True)
    shares = 100 * confusion / np.maximum(totals, 1)
    side = min(16.0, max(4.5, 1.5 + 0.55 * count)) if count <= _NUMBERED_CLASSES else 12.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the class", shrink=0.8)
    axes.set(title=_folded(title, figure), xlabel="said", ylabel="label")
    if count <= _NUMBERED_CLASSES:
        ticks = list(range(count))
        axes.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, classes)
        for row in ticks:
            for column in ticks:
                if confusion[row, column]:
                    colour = "white" if shares[row, column] > 55 else "black"
                    text = str(confusion[row, column])
                    axes.text(column, row, text, ha="center", va="center", color=colour, size=8)
    return _png(figure)


def draw_calibration(bins: Sequence[CalibrationBin], title: str) -> bytes:
    """Draw how often predictions are right against how sure they are, and return a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color="grey", linestyle=":", label="as sure as right")
    sizes = np.array([part.images for part in bins], dtype=float)
    axes.scatter(
        [100 * part.confidence for part in bins],
        [100 * part.accuracy for part in bins],
        s=12 + 180 * sizes / max(sizes.max(), 1),
        alpha=0.75,
        label="predictions; the area counts them",
    )
    axes.set(title=_folded(title, figure), xlabel="confidence, %", ylabel="right, %")
    axes.set(xlim=(0, 102), ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return _png(figure)


def draw_mistakes(
    images: np.ndarray, mistakes: Sequence[Mistake], classes: Sequence[str], title: str
) -> bytes:
    """Draw a sheet of wrong predictions, the surest first, and return a PNG.

    Args:
        images: (N, 32, 32, 3) uint8, of the whole set.
        mistakes: those to show; none is a sheet that says so.
        classes: names of the labels.
        title: one line.
    """
    from matplotlib.figure import Figure

    columns = min(6, max(1, len(mistakes)))
    rows = max(1, -(-len(mistakes) // columns))
    figure = Figure(figsize=(max(5.0, 1.75 * columns), 0.6 + 2.05 * rows), layout="constrained")
    figure.suptitle(_folded(title if mistakes else f"{title}: none", figure))
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if place < len(mistakes):
            mistake = mistakes[place]
            axes.imshow(images[mistake.index], interpolation="nearest")
            said, label = (classes[k] for k in (mistake.predicted, mistake.label))
            axes.set_title(f"{said} {100 * mistake.confidence:.1f} %\nis {label}", size=8)
    return _png(figure)
