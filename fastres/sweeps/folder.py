"""The folder of a sweep, which says at every moment what has been done.

sweep.json          its options, written first; search.json the settings that a search has tried
runs/NAME/          the run of one setting from one seed, as `fastres train` leaves it
runs/NAME.json      its options; runs/NAME.log what it printed
runs.csv            a row a run that has ended; settings.csv a row a setting
sweep.png           all of it as a picture, in the end
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fastres import strict_json
from fastres.config import changed_options
from fastres.engine.checkpoint import replace_file
from fastres.engine.run_dir import RunDir, litter_of
from fastres.errors import FailureError
from fastres.option_files import parse_table
from fastres.sweeps.job import Job
from fastres.sweeps.plan import PlannedRun
from fastres.sweeps.results import Measured, RunRow, SettingRow, as_dict, draw, setting_rows

__all__ = ["SweepDir", "default_sweep_folder"]

_OPTIONS = "sweep.json"
_SEARCH = "search.json"
_RESULTS = ("sweep.png", "settings.csv", "runs.csv", _SEARCH)
_RUNS = "runs"


def default_sweep_folder() -> "SweepDir":
    """Return a new folder under runs/, named after the time."""
    return SweepDir(Path("runs") / f"sweep-{datetime.now():%Y%m%d-%H%M%S}", numbered=True)


class SweepDir(RunDir):
    """A folder that holds one sweep; see the head of the file."""

    what = "sweep"
    options_file = _OPTIONS
    results = _RESULTS
    litter = litter_of(_OPTIONS, *_RESULTS)

    def holds_options(self) -> bool:
        """Tell whether sweep.json is of a sweep."""
        content = self.read_bytes(self.options_file)
        try:
            found = strict_json.loads(content)
        except ValueError:
            return False
        return isinstance(found, dict) and "fastres sweep" in found

    def options(self) -> dict[str, Any]:
        """Return the options of the sweep that is here.

        Raises:
            UsageError: when there is none.
            FailureError: when they cannot be read.
        """
        if not self.holds_options():
            raise FailureError(f"{self.path / self.options_file} is not of a sweep")
        found = strict_json.loads(self.read_bytes(self.options_file))
        del found["fastres sweep"]
        return found

    def begin(self, options: Mapping[str, Any], *, overwrite: bool) -> None:
        """Give the claimed folder to a new sweep; the runs of one that was there go first."""
        self.check_free(overwrite=overwrite)
        for path in sorted((self.path / _RUNS).glob("*")):
            if path.is_dir():
                RunDir(path).remove()
            elif path.suffix in (".json", ".log", ".part"):
                path.unlink()
        super().begin({"fastres sweep": 1, **options}, overwrite=overwrite)

    def change(self, options: Mapping[str, Any]) -> None:
        """Replace the options of the sweep, whose runs stay."""
        self.write_json(self.options_file, {"fastres sweep": 1, **options})

    def check_unchanged(self, runs: Iterable[PlannedRun]) -> None:
        """Refuse to go on with runs that began with other options than they would begin with now.

        Raises:
            FailureError: naming the first, when a recipe has been changed meanwhile.
        """
        for run in runs:
            file = self.path / _RUNS / f"{run.name}.json"
            if not file.exists():
                continue
            begun = parse_table(file.read_bytes(), file)
            if changed := changed_options(begun, run.config):
                raise FailureError(
                    f"{file} has another {changed[0]} than the recipe has now: put the recipe back "
                    "or start a new sweep"
                )

    def job(self, run: PlannedRun, threads: int | None) -> Job:
        """Write the options of a run and return it as a job.

        Args:
            run: one of the sweep.
            threads: CPU threads that it may use, where its own options do not say.
        """
        folder = self.path / _RUNS
        folder.mkdir(exist_ok=True)
        self.write_json(f"{_RUNS}/{run.name}.json", run.config.to_json())
        # A node of a cluster may be in another folder.
        path = folder.absolute() / run.name
        return Job(f"{path}.json", str(path), run.config.threads or threads)

    def row(self, run: PlannedRun) -> RunRow | None:
        """Return what a run has ended with; None before its end.

        Raises:
            FailureError: when its summary cannot be read.
        """
        path = self.path / _RUNS / run.name
        if not (path / "summary.json").exists():
            return None
        try:
            summary = strict_json.loads(RunDir(path).read_bytes("summary.json"))
            return RunRow(
                setting=run.setting.label,
                seed=run.config.seed,
                dataset=summary["dataset"],
                test_accuracy=summary["test_accuracy"],
                val_accuracy=summary["val_accuracy"],
                train_seconds=summary["train_seconds"],
                path=str(path),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FailureError(f"{path / 'summary.json'} is no summary of a run: {error}") from None

    def write_tables(
        self, runs: Sequence[PlannedRun], measured: Measured, reference: str | None
    ) -> tuple[list[RunRow], list[SettingRow]]:
        """Write runs.csv and settings.csv of the runs that have ended, and return their rows.

        Args: as of `setting_rows`, runs that have not ended among them.
        """
        by_setting: dict[str, list[RunRow]] = {run.setting.label: [] for run in runs}
        for run in runs:
            if (row := self.row(run)) is not None:
                by_setting[row.setting].append(row)
        ended = [row for rows in by_setting.values() for row in rows]
        settings = setting_rows(ended, measured, reference)
        for name, rows in (("runs.csv", ended), ("settings.csv", settings)):
            values = [as_dict(row) for row in rows]
            if values:
                self.write_csv(name, values, list(values[0]))
        return ended, settings

    def write_picture(
        self, ended: Sequence[RunRow], settings: Sequence[SettingRow], measured: Measured
    ) -> None:
        """Write sweep.png."""
        picture = draw(ended, settings, measured, self.path.name)
        replace_file(self.path / "sweep.png", picture)

    def tried(self) -> list[tuple[dict[str, Any], int]]:
        """Return the settings and seeds that a search has begun, in their order.

        Raises:
            FailureError: when they cannot be read.
        """
        file = self.path / _SEARCH
        if not file.exists():
            return []
        try:
            found = strict_json.loads(self.read_bytes(_SEARCH))
            return [(dict(one["options"]), int(one["seed"])) for one in found["tried"]]
        except (ValueError, KeyError, TypeError) as error:
            raise FailureError(f"{file} is no list of settings: {error}") from None

    def write_tried(self, runs: Iterable[PlannedRun]) -> None:
        """Write what `tried` returns."""
        tried = [{"options": dict(run.setting.options), "seed": run.config.seed} for run in runs]
        self.write_json(_SEARCH, {"tried": tried})
