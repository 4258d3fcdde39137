"""The study of depth: plain and residual nets of growing depth, all trained by one recipe.

He et al. 2015, section 4.2 and figures 1, 6 and 7 (https://arxiv.org/abs/1512.03385). Shortcuts are
of option A, which has no parameters: a plain net and the residual net of its depth have the same
number of them, and start from the same values.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastres import host
from fastres.config import Config
from fastres.engine.console import RunConsole
from fastres.engine.trainer import Trainer
from fastres.errors import FailureError, UsageError
from fastres.model.resnet import MODELS
from fastres.studies.folder import StudyDir
from fastres.studies.picture import draw, lines_of
from fastres.studies.probes import (
    FirstLayerGradient,
    measure_responses,
    plain_network,
    probe_images,
)
from fastres.studies.records import KINDS, Kind, NetRecord, StudyRecord

__all__ = ["DegradationStudy", "StudiedNet", "studied_nets"]

_RESPONSE_IMAGES = 1000
_PREFIXES: dict[Kind, str] = {"plain": "plain", "residual": "resnet"}


@dataclass(frozen=True)
class StudiedNet:
    """One network of a study: plain or residual, so many layers, from this seed."""

    kind: Kind
    depth: int
    seed: int

    @property
    def model(self) -> str:
        """Return its name in `MODELS`."""
        return f"{_PREFIXES[self.kind]}{self.depth}"

    @property
    def name(self) -> str:
        """Return what its files are called."""
        return f"{self.model}-seed{self.seed}"


def studied_nets(depths: Sequence[int], seeds: Sequence[int]) -> list[StudiedNet]:
    """List the networks of a study in the order in which they run: plain beside residual.

    Raises:
        UsageError: for a depth that has no plain and residual net, or nothing to do.
    """
    known = [depth for depth in range(200) if f"plain{depth}" in MODELS]
    for depth in depths:
        if depth not in known:
            raise UsageError(f"--depths must be of {', '.join(map(str, known))}, got {depth}")
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise UsageError(f"--seeds must be between 0 and {2**63 - 1}, got {seed}")
    if not depths or not seeds:
        raise UsageError("--depths and --seeds need at least one number each")
    # Repetitions would only find themselves done; the order of a picture is that of the depths.
    return [
        StudiedNet(kind, depth, seed)
        for seed in dict.fromkeys(seeds)
        for depth in sorted(set(depths))
        for kind in KINDS
    ]


class DegradationStudy:
    """Trains the networks one after another and keeps each one's record as soon as it ends.

    Args:
        nets: of `studied_nets`.
        recipe: the options that all of them are trained with; model and seed are theirs. The
            attribute says instead of `auto` which data was found, and where.
        folder: to be claimed, and begun or gone on with, before `run`.
        console: where to report; the first screen is printed at once.
        command: the words that repeat the study.

    Raises:
        UsageError: for options that the data or the machine does not allow.
        FailureError: for data that cannot be read.
    """

    def __init__(
        self,
        nets: Sequence[StudiedNet],
        recipe: Config,
        folder: StudyDir,
        console: RunConsole,
        command: Sequence[str],
    ):
        self.nets, self.recipe, self.folder, self.console = nets, recipe, folder, console
        self.command = list(command)
        first = self._trainer(nets[0])
        first.training_batches()
        first.show_header()
        found = first.config
        self.recipe = recipe.replace(dataset=found.dataset, data_dir=found.data_dir)

    def _trainer(self, net: StudiedNet) -> Trainer:
        config = self.recipe.replace(model=net.model, seed=net.seed)
        trainer = Trainer(config, self.folder.net(net.name), self.console)
        trainer.command = self.command
        return trainer

    def run(self, options: Mapping[str, Any]) -> StudyRecord:
        """Run what has not ended yet and return the record of all.

        Args:
            options: of the study, for its record.

        Raises:
            Stopped: after a signal; what has been trained is in the folder.
            FailureError: when a run fails, or the folder holds networks of other data.
        """
        records: list[NetRecord] = []
        for number, net in enumerate(self.nets, 1):
            record = self.folder.record(net.name)
            ended = "" if record is None else ": has ended before"
            self.console.line("")
            self.console.line(f"[{number}/{len(self.nets)}] {net.name}{ended}", style="bold")
            if record is None:
                record = self._train(net)
                self.folder.write_record(net.name, record)
            self._check_same_data(record, records)
            records.append(record)
            study: StudyRecord = {
                "options": dict(options),
                "provenance": host.provenance(self.command),
                "nets": records,
            }
            self.folder.write_study(study, _png(study))
        return study

    def _train(self, net: StudiedNet) -> NetRecord:
        """Train a network, from its last checkpoint where it has one, and measure it."""
        trainer = self._trainer(net)
        self.console.model(net.model, trainer.model_summary)
        # It sets the number of threads, by which sums are rounded.
        prepared = trainer.prepare()
        gradient = FirstLayerGradient(trainer)
        # The trainer restores a checkpoint when it runs: until then the weights are the first ones.
        at_start = gradient()["first_layer_gradient"]
        trainer.extra_metrics = gradient
        folder = trainer.folder
        with folder.claimed():
            begun = (folder.path / folder.options_file).exists()
            if not begun:
                folder.begin(trainer.config.to_json(), overwrite=False)
            summary = trainer.run(prepared, resume=begun)
        model = plain_network(trainer)
        filters = model.get_parameter("conv1.weight").detach()
        images, _ = probe_images(trainer, trainer.data.test, _RESPONSE_IMAGES)
        layers, blocks = measure_responses(model, images)
        return {
            "kind": net.kind,
            "depth": net.depth,
            "seed": net.seed,
            "first_layer_parameters": filters.numel(),
            "first_layer_norm": filters.double().norm().item(),
            "gradient_at_start": at_start,
            "rows": prepared.state.rows,
            "layers": layers,
            "blocks": blocks,
            "summary": summary,
        }

    def _check_same_data(self, record: NetRecord, others: Sequence[NetRecord]) -> None:
        for other in others:
            if other["summary"]["dataset_fingerprint"] != record["summary"]["dataset_fingerprint"]:
                raise FailureError(
                    f"{self.folder.path} holds networks that were trained on different data; give "
                    "the --data-dir of the first ones, or start a new study"
                )


def _png(study: StudyRecord) -> bytes:
    summary = study["nets"][0]["summary"]
    title = (
        f"plain and residual nets on {summary['train_images']:,} images of {summary['dataset']}, "
        f"{summary['epochs']:g} epochs"
    )
    figure = draw([lines_of(net) for net in study["nets"]], title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
