"""An evaluation as text: tables for a terminal, and CSV.

Names of classes may be a stranger's: print the tables without markup.
"""

import csv
import io
from collections.abc import Iterable, Sequence

from rich.table import Table

from fastres.inference.scores import ClassScore, Evaluation

__all__ = [
    "class_table",
    "classes_csv",
    "confused_pairs",
    "confusion_csv",
    "confusion_text",
    "printable",
]

# A table of more classes has the worst of them, and no matrix.
_SHOWN_CLASSES = 20
_ABBREVIATED = 4


def printable(text: str) -> str:
    """Return `text` with all that would write lines or colours of its own escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def class_table(evaluation: Evaluation) -> Table:
    """Lay out the classes; of many, those with the lowest recall."""
    found: Sequence[ClassScore] = evaluation.classes
    title = None
    if len(found) > _SHOWN_CLASSES:
        title = f"the {_SHOWN_CLASSES} of {len(found):,} classes with the lowest recall"
        with_images = (score for score in found if score.recall is not None)
        found = sorted(with_images, key=lambda score: score.recall or 0.0)[:_SHOWN_CLASSES]
    table = Table(box=None, header_style="bold", title=title, title_justify="left")
    table.add_column("class")
    for name in ("images", "recall %", "precision %", "F1 %"):
        table.add_column(name, justify="right")
    for score in found:
        shares = (_percent(value) for value in (score.recall, score.precision, score.f1))
        table.add_row(printable(score.name), f"{score.images:,}", *shares)
    return table


def confusion_text(evaluation: Evaluation) -> str | None:
    """Lay out the confusion matrix, labels down and what was said across; None of many classes.

    Lines of text, since a table would break the numbers to fit a narrow terminal.
    """
    names = [printable(score.name) for score in evaluation.classes]
    if len(names) > _SHOWN_CLASSES:
        return None
    counts = evaluation.confusion.tolist()
    cells = [[str(count) if count else "." for count in row] for row in counts]
    width = max(_ABBREVIATED, *(len(cell) for row in cells for cell in row))
    labels = ["label, said:", *names]
    first = max(map(len, labels))
    rows = zip(labels, [[name[:width] for name in names], *cells], strict=True)
    return "\n".join(
        f"{label:<{first}} " + " ".join(f"{cell:>{width}}" for cell in row) for label, row in rows
    )


def confused_pairs(evaluation: Evaluation) -> Table:
    """Lay out which classes are taken for which others most often."""
    names = [printable(score.name) for score in evaluation.classes]
    counts = evaluation.confusion.clone()
    counts.fill_diagonal_(0)
    order = counts.flatten().argsort(descending=True, stable=True)[:_SHOWN_CLASSES]
    table = Table(box=None, header_style="bold")
    for name in ("label", "said"):
        table.add_column(name)
    table.add_column("images", justify="right")
    for place in order.tolist():
        label, said = divmod(place, len(names))
        if counts[label, said]:
            table.add_row(names[label], names[said], f"{int(counts[label, said]):,}")
    return table


def _csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def classes_csv(evaluation: Evaluation) -> str:
    """Return a row a class."""
    columns = ("class", "images", "predicted", "recall", "precision", "f1")
    rows = [tuple(vars(score).values()) for score in evaluation.classes]
    return _csv([columns, *rows])


def confusion_csv(evaluation: Evaluation) -> str:
    """Return the confusion matrix, labels down and what was said across."""
    names = [score.name for score in evaluation.classes]
    rows = zip(names, evaluation.confusion.tolist(), strict=True)
    return _csv([("label", *names), *((name, *counts) for name, counts in rows)])
