"""The picture of a run: loss and accuracy over the epochs."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["draw_curves"]


def draw_curves(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Draw the metrics of a run and return a PNG.

    Args:
        rows: as in metrics.jsonl: epoch, train_loss, train_accuracy, test_loss, test_accuracy and,
            under --val, val_loss and val_accuracy.
        title: one line over both panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for split, colour in (("train", "tab:blue"), ("val", "tab:green"), ("test", "tab:orange")):
        if rows and f"{split}_loss" not in rows[0]:
            continue
        style = {"color": colour, "label": split, "marker": "o", "markersize": 3}
        loss.plot(epochs, [row[f"{split}_loss"] for row in rows], **style)
        accuracy.plot(epochs, [row[f"{split}_accuracy"] for row in rows], **style)
    loss.set(xlabel="epoch", ylabel="mean loss")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    if rows:
        final = rows[-1]["test_accuracy"]
        accuracy.annotate(
            f"{final:.2f} %",
            (epochs[-1], final),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
        )
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.locator_params(axis="x", integer=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
