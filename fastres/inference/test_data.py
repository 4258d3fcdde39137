"""Which images a network is tried on: those of its run, or others that fit it."""

from fastres.data.dataset import class_difference
from fastres.data.evaluation_set import EvaluationSet, load_evaluation_set
from fastres.data.source import dataset_kind
from fastres.errors import FailureError, FastresError
from fastres.inference.trained import TrainedNetwork

__all__ = ["check_classes", "evaluation_set_for"]


def evaluation_set_for(
    network: TrainedNetwork, data_dir: str | None = None, dataset: str | None = None
) -> EvaluationSet:
    """Load labelled images that `network` can be tried on.

    Args:
        network: trained.
        data_dir: where they are; None looks in the folder that the run of the network names. From
            either is read alone: CIFAR downloaded into it would pass for what was meant.
        dataset: the kind of data; None takes that of the run, or a test set alone. CIFAR is
            downloaded into `data_dir` where this asks for it.

    Raises:
        UsageError, FailureError: where there are none, or none of the network's classes.
    """
    kind = dataset or dataset_kind(network.dataset)
    trained_from = network.config.data_dir
    if data_dir is not None or trained_from is None:
        may_be_alone = dataset in (None, "auto", "folder")
        download = data_dir is None or dataset in ("cifar10", "cifar100")
        data = load_evaluation_set(kind, data_dir, download=download, may_be_alone=may_be_alone)
    else:
        try:
            data = load_evaluation_set(kind, trained_from, download=False, may_be_alone=False)
        except FastresError as error:
            if dataset is not None:
                raise
            raise type(error)(
                f"{error}; the run was trained on {trained_from!r}: give where its data is now "
                "with --data-dir"
            ) from None
    check_classes(network, data)
    return data


def check_classes(network: TrainedNetwork, data: EvaluationSet) -> None:
    """Compare the classes of images with those of a network.

    Raises:
        FailureError: naming the first difference, or the first label that is none of its classes.
    """
    if data.classes is not None:
        if difference := class_difference(network.classes, data.classes):
            raise FailureError(
                f"{network.source}, trained on {network.dataset}, does not fit {data.source}: "
                f"{difference}"
            )
        return
    labels, count = data.images.labels, len(network.classes)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        raise FailureError(
            f"{data.source} has the label {low if low < 0 else high}, and {network.source} was "
            f"trained on {count:,} classes"
        )
