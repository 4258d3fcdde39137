"""The folder of a network for the Hugging Face Hub: weights, config.json and a model card."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from fastres import strict_json
from fastres.config import Config
from fastres.engine.checkpoint import replace_file
from fastres.errors import FailureError
from fastres.inference.hub_files import CONFIG, WEIGHTS, hub_config
from fastres.inference.runs import SeedResult
from fastres.inference.tables import printable
from fastres.inference.trained import TrainedNetwork

__all__ = ["model_card", "write_hub_folder"]


def write_hub_folder(
    folder: Path,
    network: TrainedNetwork,
    *,
    licence: str,
    results: Sequence[SeedResult],
    summary: Mapping[str, Any] | None,
) -> None:
    """Write model.safetensors, config.json and README.md.

    Args:
        folder: is made where there is none.
        network: whose weights they are.
        licence: of the weights, as the Hub names it.
        results: test accuracies of runs that differ in their seed alone, the first that of these
            weights; none where it is not known.
        summary: of the run; None where there is none.

    Raises:
        FailureError: when a file cannot be written, or the summary lacks what a run writes.
    """
    card = model_card(network, licence=licence, results=results, summary=summary)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in network.model.state_dict().items()}
    replace_file(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    config = strict_json.dumps(hub_config(network.identity()), indent=2) + "\n"
    replace_file(folder / CONFIG, config.encode())
    replace_file(folder / "README.md", card.encode())


def model_card(
    network: TrainedNetwork,
    *,
    licence: str,
    results: Sequence[SeedResult],
    summary: Mapping[str, Any] | None,
) -> str:
    """Return the model card: what the network is, how it was trained, how good, how to use it."""
    config, parameters = network.config, sum(p.numel() for p in network.model.parameters())
    head = {
        "license": licence,
        "library_name": "fastres",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "resnet", "cifar", config.model],
        "datasets": [network.dataset] if network.dataset in ("cifar10", "cifar100") else [],
    }
    lines = ["---", *_yaml({k: v for k, v in head.items() if v}), "---", ""]
    lines += [f"# {config.model} on {_cell(network.dataset)}", ""]
    # Weights without a run may come from elsewhere.
    trained = f", trained with fastres by the recipe `{config.recipe}`" if summary else ""
    lines += [
        f"A {config.model} of {parameters:,} parameters for images of 32 x 32 pixels in "
        f"{len(network.classes):,} classes{trained}.",
        "",
        "## How good",
        "",
        *_accuracy_lines(results, config),
        "",
        "## How it was trained",
        "",
        *_training_lines(network, summary),
        "",
        "## Use it",
        "",
        "```python",
        "import fastres",
        "",
        'network = fastres.load("this-folder")',
        'print(fastres.predict(network, ["cat.jpg"]))',
        "```",
        "",
        "`fastres.hub.HubNetwork.from_pretrained` reads it from the Hub, and the weights are a "
        "plain `state_dict`.",
        "Images x in 0..1 are normalised as (x - mean) / std, with mean "
        f"{_numbers(network.mean)} and std {_numbers(network.std)}.",
        "",
        "## Limits",
        "",
        "It tells its classes apart and nothing else: it has no class for what is none of them. "
        "Larger pictures are resized to 32 x 32.",
        "",
    ]
    return "\n".join(lines)


def _accuracy_lines(results: Sequence[SeedResult], config: Config) -> list[str]:
    if not results:
        return ["The test accuracy is not known: the weights come without a run."]
    views = "" if config.tta == "none" else f", with test-time augmentation ({config.tta})"
    lines = [
        f"Test accuracy of these weights (seed {results[0].seed}){views}: "
        f"{results[0].accuracy:.2f} %."
    ]
    if len(results) > 1:
        values = [result.accuracy for result in results]
        spread = statistics.stdev(values)
        seeds = ", ".join(str(result.seed) for result in results)
        lines.append(
            f"Over {len(values)} seeds ({seeds}): {statistics.mean(values):.2f} % in the mean, "
            f"standard deviation {spread:.2f}, standard error "
            f"{spread / math.sqrt(len(values)):.2f}."
        )
    else:
        lines.append("One run; how far seeds spread was not measured.")
    chosen = "epoch that is best on images held out of training" if config.val else "last epoch"
    lines.append(f"It is that of the {chosen}; no test image chose anything.")
    return lines


def _training_lines(network: TrainedNetwork, summary: Mapping[str, Any] | None) -> list[str]:
    rows: list[tuple[str, Any]] = [("dataset", network.dataset)]
    if summary is None:
        if (origin := network.config.recipe).startswith("converted-"):
            rows += [("origin", origin.replace("-", " from ", 1))]
        rows += [("weights from", network.source.name)]
    else:
        rows += [("recipe", network.config.recipe), ("seed", network.config.seed)]
        try:
            rows += _rows_of(summary)
        except (KeyError, TypeError, ValueError) as error:
            raise FailureError(
                f"{network.source.parent}/summary.json is not what a run writes: {error!r}"
            ) from None
    lines = [f"| {name} | {_cell(str(value))} |" for name, value in rows]
    return ["| what | value |", "| --- | --- |", *lines]


def _cell(text: str) -> str:
    """Return text, which may be a stranger's, so that Markdown shows its characters."""
    return re.sub(r"([\\`*_{}\[\]<>()#|&~!])", r"\\\1", printable(text))


def _public(command: str) -> str:
    """Return a command without the folders of the machine that it ran on."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", ".../", command)


def _rows_of(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("epochs", f"{summary['epochs']:g}"),
        ("batch size", summary["batch_size"]),
        ("training images", f"{summary['train_images']:,}"),
        ("seconds of training", f"{summary['train_seconds']:,.0f}"),
        ("machine", summary["machine"]["gpu"] or summary["machine"]["cpu"]),
        ("precision", summary["precision"]),
        ("torch", summary["versions"]["torch"]),
        ("commit of fastres", summary["commit"] or "not known"),
        ("date", summary["date"]),
        ("command", _public(summary["command"])),
    ]


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _yaml(values: Mapping[str, Any]) -> list[str]:
    """Texts and lists of texts; JSON's strings are YAML's."""
    lines = []
    for name, value in values.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {strict_json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{name}: {strict_json.dumps(value)}")
    return lines
