"""The errors of He et al. 2015 beside those that runs of the recipe `paper` reached.

Source: table 6, https://arxiv.org/abs/1512.03385; of ResNet-110 the best of five runs.
A run is beside the paper's only with its length, batch and width, on images of CIFAR-10. How long
one takes is an ESTIMATE: its images by the measured rate of ResNet-20, and by operations an image
for the deeper ones.
"""

import re
from collections.abc import Sequence

from benchmarks.harness.rows import Result, newest
from benchmarks.report.tables import by_machine, machine_label, markdown, number
from fastres.recipes import from_recipe

__all__ = ["paper_table"]

# Test error on CIFAR-10 in percent.
_ERRORS = {
    "resnet20": "8.75",
    "resnet32": "7.51",
    "resnet44": "7.17",
    "resnet56": "6.97",
    "resnet110": "6.43 (6.61 +- 0.16)",
}
_RUN = re.compile(
    r"(?P<dataset>cifar10(?:-\S+)?) (?P<images>\d+) (?P<model>\S+) w1 paper "
    r"(?P<epochs>[\d.]+) epochs batch (?P<batch>\d+)"
)
_RATE = re.compile(r"\w+ resnet20 batch 128, cifar10(?:-\S+)?")


def paper_table(results: Sequence[Result]) -> str:
    """Lay the five networks out, with a column of hours for every machine whose rate is known."""
    current = newest(results)
    measured = {model: [t for r in current if (t := _error(r, model))] for model in _ERRORS}
    hours = {machine_label(group[0][1]): _hours(group) for group in by_machine(current)}
    machines = [label for label, estimate in hours.items() if estimate is not None]
    header = ["network", "parameters", "the paper's error, %", "ours, %"]
    header += [f"hours on {label} (ESTIMATE)" for label in machines]
    relative = _operations()
    lines = []
    for model, error in _ERRORS.items():
        params, operations = relative[model]
        cells = [model, f"{params:,}", error, "; ".join(measured[model]) or "not run here"]
        ratio = operations / relative["resnet20"][1]
        cells += [number(ratio * (hours[label] or 0)) for label in machines]
        lines.append([*cells, f"`python -m fastres.train --fast --recipe paper --model {model}`"])
    return "\n".join(markdown([*header, "command"], lines)) + "\n"


def _error(result: Result, model: str) -> str | None:
    """Return the error of a row with what else a reader must know; None: it is beside the point."""
    row, provenance = result
    run = (
        _RUN.fullmatch(row.case) if (row.suite, row.metric) == ("train", "test_accuracy") else None
    )
    config = from_recipe("paper", model)
    if run is None or run["model"] != model or int(run["batch"]) != config.batch_size:
        return None
    steps = float(run["epochs"]) * (int(run["images"]) // config.batch_size)
    # Cases round the number of epochs to six digits.
    if config.steps is None or abs(steps - config.steps) > 1:
        return None
    middle, low, high = (f"{100 - accuracy:.2f}" for accuracy in (row.median, row.high, row.low))
    spread = "" if low == high else f" ({low} to {high})"
    where = machine_label(provenance)
    return f"{middle}{spread}, n {row.n}: {run['dataset']} {run['images']}, {row.provider}, {where}"


def _hours(group: Sequence[Result]) -> float | None:
    """Return how long a machine would take for ResNet-20, at the rate that it was measured to."""
    rates = [
        row.median
        for row, _ in group
        if (row.suite, row.metric, row.provider) == ("ladder", "images_per_second", "fast")
        and _RATE.fullmatch(row.case)
    ]
    config = from_recipe("paper")
    return None if not rates else (config.steps or 0) * config.batch_size / max(rates) / 3600


def _operations() -> dict[str, tuple[int, int]]:
    """Return parameters, and operations of a training step an image, of every network."""
    # Here, since a report without this table needs no torch.
    from fastres.model.resnet import create_model
    from fastres.model.summary import summarize

    found = {}
    for model in _ERRORS:
        summary = summarize(create_model(model, shortcut=from_recipe("paper", model).shortcut))
        found[model] = (summary.params, summary.training_flops)
    return found
