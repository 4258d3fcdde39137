"""The picture of a run: loss and accuracy over the epochs."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["draw_curves"]


def draw_curves(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    *,
    label_smoothing: float = 0.0,
    mixed: bool = False,
) -> bytes:
    """Draw the metrics of a run and return a PNG.

    Args:
        rows: at least one, as in metrics.jsonl: epoch, train_loss, train_accuracy, test_loss,
            test_accuracy and, under --val, val_loss and val_accuracy.
        title: one line over both panels.
        label_smoothing: of the training loss, which is then not comparable with the others.
        mixed: whether the training images were mixed; then their loss and accuracy are not.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for split, colour in (("train", "tab:blue"), ("val", "tab:green"), ("test", "tab:orange")):
        if f"{split}_loss" not in rows[0]:
            continue
        style = {"color": colour, "marker": "o", "markersize": 3}
        losses, accuracies = (
            [row[f"{split}_{what}"] for row in rows] for what in ("loss", "accuracy")
        )
        name = f"{split}, mixed images" if split == "train" and mixed else split
        smoothed = split == "train" and label_smoothing > 0
        loss.plot(epochs, losses, label=f"{name}, smoothed labels" if smoothed else name, **style)
        accuracy.plot(epochs, accuracies, label=f"{name}, {accuracies[-1]:.2f} %", **style)
    loss.set(xlabel="epoch", ylabel="mean loss")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.locator_params(axis="x", integer=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
