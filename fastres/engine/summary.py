"""What a run records of itself: one row an epoch, and a summary at its end."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from fastres.config import LoaderName, PrecisionName, RouteName, ViewsName
from fastres.host import Provenance

__all__ = ["ExecutionMode", "MetricsRow", "Summary", "chosen_row"]


class MetricsRow(TypedDict):
    """One epoch: losses in nats, accuracies in percent, seconds since the run began.

    first_layer_gradient: L2 norm of the loss's gradient by the first filters, where a study asked.
    """

    epoch: float
    train_loss: float
    train_accuracy: float
    val_loss: NotRequired[float]
    val_accuracy: NotRequired[float]
    test_loss: float
    test_accuracy: float
    images_per_second: float
    train_seconds: float
    first_layer_gradient: NotRequired[float]


class ExecutionMode(TypedDict):
    """How the steps of a run were computed; "mixed" where a resumed run went on in another way."""

    fast: bool
    route: RouteName
    loader: LoaderName
    device: str
    precision: PrecisionName
    channels_last: bool
    graph: bool
    processes: int


class Summary(ExecutionMode, Provenance):
    """A finished run: summary.json."""

    dataset: str
    dataset_fingerprint: str
    train_images: int
    test_images: int
    model: str
    width: float
    parameters: int
    recipe: str
    seed: int
    batch_size: int
    epochs: float
    tta: ViewsName
    test_accuracy: float
    test_loss: float
    val_accuracy: float | None
    checkpoint: str
    train_seconds: float
    compile_seconds: float
    first_step_seconds: float | None
    peak_memory_mib: float
    images_per_second: float
    evaluation_images_per_second: float


def chosen_row(rows: Sequence[MetricsRow]) -> MetricsRow:
    """The epoch that a run stands for: best on the validation images, or the last without them."""
    if "val_accuracy" in rows[-1]:
        return max(rows, key=lambda row: row["val_accuracy"])
    return rows[-1]
