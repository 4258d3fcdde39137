"""The folder of a study: a run folder for each network, and what is made of all of them.

    study.json       every option, written first
    nets/NAME/       the run of one network, as `fastres train` leaves it
    nets/NAME.json   its record, written when it has ended: what a resumed study does not run again
    results.json, epochs.csv, layers.csv, blocks.csv, degradation.png

As in run_dir.py, each file is complete at every moment.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from fastres import strict_json
from fastres.engine.checkpoint import replace_file
from fastres.engine.run_dir import RunDir, litter_of
from fastres.errors import FailureError
from fastres.studies.records import (
    NetRecord,
    StudyRecord,
    block_rows,
    epoch_rows,
    layer_rows,
)

__all__ = ["StudyDir", "default_study_folder"]

_OPTIONS = "study.json"
_RESULTS = ("degradation.png", "results.json", "epochs.csv", "layers.csv", "blocks.csv")
_NETS = "nets"
_STUDY = "degradation"
_EPOCH_COLUMNS = ("epoch", "train_error", "test_error", "gradient_norm", "gradient_rms")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "epochs.csv": _EPOCH_COLUMNS,
    "layers.csv": ("number", "layer", "std"),
    "blocks.csv": ("number", "block", "residual_rms", "shortcut_rms", "residual_share"),
}


def default_study_folder() -> "StudyDir":
    """Return a new folder under runs/, named after the study and the time."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return StudyDir(Path("runs") / f"{_STUDY}-{stamp}", numbered=True)


class StudyDir(RunDir):
    """A folder that holds one study; see the head of the file."""

    what = "study"
    options_file = _OPTIONS
    results = _RESULTS
    litter = litter_of(_OPTIONS, *_RESULTS)

    def net(self, name: str) -> RunDir:
        """Return the run folder of a network."""
        return RunDir(self.path / _NETS / name)

    def holds_options(self) -> bool:
        """Tell whether study.json is of a study of depth."""
        try:
            found = strict_json.loads(self.read_bytes(self.options_file))
        except ValueError:
            return False
        return isinstance(found, dict) and found.get("study") == _STUDY

    def begin(self, options: Mapping[str, Any], *, overwrite: bool) -> None:
        """Give the claimed folder to a new study; the runs of one that was there go first.

        Raises:
            UsageError, FailureError: as of a run.
        """
        self.check_free(overwrite=overwrite)
        for path in sorted((self.path / _NETS).glob("*")):
            if path.is_dir():
                RunDir(path).remove()
            elif path.suffix in (".json", ".part"):
                path.unlink()
        super().begin({"study": _STUDY, **options}, overwrite=overwrite)

    def options(self) -> dict[str, Any]:
        """Return the options of the study that is here.

        Raises:
            UsageError: when there is none.
            FailureError: when they cannot be read.
        """
        if not self.holds_options():
            raise FailureError(f"{self.path / self.options_file} is not of a study of depth")
        return strict_json.loads(self.read_bytes(self.options_file))

    def change(self, options: Mapping[str, Any]) -> None:
        """Replace the options of the study, whose results stay."""
        self.write_json(self.options_file, {"study": _STUDY, **options})

    def record(self, name: str) -> NetRecord | None:
        """Return what the network `name` has left behind, None before its end.

        Raises:
            FailureError: when it cannot be read.
        """
        file = f"{_NETS}/{name}.json"
        if not (self.path / file).exists():
            return None
        try:
            return cast(NetRecord, strict_json.loads(self.read_bytes(file)))
        except ValueError as error:
            raise FailureError(f"{self.path / file} is no JSON file: {error}") from None

    def write_record(self, name: str, record: NetRecord) -> None:
        """Write what a network that has ended leaves behind."""
        self.write_json(f"{_NETS}/{name}.json", record)

    def write_study(self, study: StudyRecord, picture: bytes) -> None:
        """Write the results of the networks that have ended so far."""
        nets = study["nets"]
        self.write_json("results.json", study)
        tables = (epoch_rows(nets), layer_rows(nets), block_rows(nets))
        for (name, columns), rows in zip(_COLUMNS.items(), tables, strict=True):
            self.write_csv(name, rows, ("kind", "depth", "seed", *columns))
        replace_file(self.path / "degradation.png", picture)
