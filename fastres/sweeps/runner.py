"""A sweep from its plan to its table: on this machine, on a cluster, or as a search."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from fastres import strict_json
from fastres.engine.console import RunConsole
from fastres.errors import FailureError
from fastres.sweeps.cluster import run_on_cluster
from fastres.sweeps.folder import SweepDir
from fastres.sweeps.job import Job, last_line
from fastres.sweeps.local import best_trial, measure_parallel, run_queue, threads_of
from fastres.sweeps.plan import PlannedRun, Setting
from fastres.sweeps.results import Measured, as_dict, datasets_of, has_scipy, table_of
from fastres.sweeps.search import Search, Space

__all__ = ["Runner"]

_MOST_AT_ONCE = 64


@dataclass
class Runner:
    """Runs what is planned in the folder of a sweep.

    Attributes:
        folder: claimed, its options written.
        console: where to report.
        at_once: runs at a time; None measures how many.
        engine: "local", "slurm" or "submitit-local".
        engine_options: for submitit.
        as_json: print the settings' rows as JSON on stdout.
    """

    folder: SweepDir
    console: RunConsole
    at_once: int | None
    engine: str
    engine_options: Mapping[str, Any]
    as_json: bool

    def grid(self, runs: Sequence[PlannedRun]) -> int:
        """Make the planned runs and return the exit code."""
        measured: Measured = (
            "val_accuracy" if all(run.config.val for run in runs) else "test_accuracy"
        )
        reference = runs[0].setting.label
        left = self._begin(runs)
        if left:
            at_once = self._choose(left, len(left))
            threads = self._threads(at_once)
            jobs = {self.folder.job(run, threads): run for run in left}

            def ended(job: Job, code: int) -> None:
                self._tell(jobs[job], job, code)
                self.folder.write_tables(runs, measured, reference)

            self._run(jobs, len(left), at_once, ended)
        return self._report(runs, measured, reference)

    def search(
        self,
        spaces: Mapping[str, Space],
        count: int,
        planned: Callable[[Setting, int], PlannedRun],
        largest: Sequence[PlannedRun],
    ) -> int:
        """Try settings that Optuna proposes, and return the exit code.

        A setting that is proposed again is run from its next seed.

        Args:
            spaces: where they are looked for.
            count: runs in all, those of an earlier start among them.
            planned: makes the run of a setting from a seed.
            largest: runs among which the one with the most work is as large as any.
        """
        runs = [planned(Setting(options), seed) for options, seed in self.folder.tried()]
        left = self._begin(runs, count)
        search = Search(spaces, len(runs))
        for run in runs:
            self._teach(search, run)
        num_new = max(0, count - len(runs))
        jobs: dict[Job, PlannedRun] = {}

        def begun(run: PlannedRun, threads: int | None) -> Job:
            job = self.folder.job(run, threads)
            jobs[job] = run
            return job

        def proposed(threads: int | None) -> Iterator[Job]:
            for run in left:
                yield begun(run, threads)
            for _ in range(num_new):
                setting = search.ask()
                seed = sum(run.setting.label == setting.label for run in runs)
                runs.append(planned(setting, seed))
                self.folder.write_tried(runs)
                yield begun(runs[-1], threads)

        def ended(job: Job, code: int) -> None:
            self._tell(jobs[job], job, code)
            self._teach(search, jobs[job])
            self.folder.write_tables(runs, "val_accuracy", None)

        if num_left := len(left) + num_new:
            at_once = self._choose([*left, *largest], num_left)
            self._run(proposed(self._threads(at_once)), num_left, at_once, ended)
        return self._report(runs, "val_accuracy", None)

    def _begin(self, runs: Sequence[PlannedRun], count: int | None = None) -> list[PlannedRun]:
        """Say what is to be done and return which of the runs have not ended."""
        self.folder.check_unchanged(runs)
        left = [run for run in runs if self.folder.row(run) is None]
        done = len(runs) - len(left)
        before = f", {done:,} of them done before" if done else ""
        total = max(len(runs), count or 0)
        self.console.line(f"{total:,} runs into {self.folder.path}{before}")
        return left

    def _teach(self, search: Search, run: PlannedRun) -> None:
        row = self.folder.row(run)
        if row is not None and row.val_accuracy is not None:
            search.add(run.setting, row.val_accuracy)

    def _choose(self, runs: Sequence[PlannedRun], most: int) -> int:
        """Return how many runs at once, measured unless it was said or a cluster sees to it.

        Args:
            runs: the one with the most work takes about the most memory, and is tried; where it
                fails, one of the next setting.
            most: runs that are left.

        Raises:
            FailureError: where none of them can be trained alone.
            Stopped: after a signal.
        """
        if self.at_once is not None or self.engine == "slurm" or most == 1:
            return min(self.at_once or _MOST_AT_ONCE, most)
        failures = []
        one_of_each = {run.setting.label: run for run in reversed(runs)}
        for run in sorted(one_of_each.values(), key=lambda run: -run.work):
            self.console.line(
                f"how many at once? a moment of {run.name} in 1, 2, 4, ... processes:"
            )
            try:
                trials = measure_parallel(run.config, min(most, _MOST_AT_ONCE), self.console.line)
            except FailureError as error:
                failures.append(f"{run.name}: {error}")
                self.console.line(f"! {failures[-1]}", style="bold yellow")
                continue
            best = best_trial(trials).processes
            self.console.line(f"  {best} at once (--jobs says otherwise)")
            return best
        raise FailureError(failures[0])

    def _threads(self, at_once: int) -> int | None:
        # On a cluster a run has the cores of its own job.
        return None if self.engine == "slurm" else threads_of(at_once)

    def _run(
        self,
        jobs: Iterable[Job],
        count: int,
        at_once: int,
        ended: Callable[[Job, int], None],
    ) -> None:
        """Run jobs on the engine, under a bar of how many of `count` have ended."""
        with self._counting(count) as advance:

            def ended_one(job: Job, code: int) -> None:
                ended(job, code)
                advance()

            if self.engine == "local":
                run_queue(jobs, at_once, ended_one)
            else:
                run_on_cluster(
                    jobs,
                    cluster="slurm" if self.engine == "slurm" else "local",
                    at_once=at_once,
                    options=self.engine_options,
                    folder=self.folder.path / "submitit",
                    ended=ended_one,
                )

    @contextmanager
    def _counting(self, count: int) -> Iterator[Callable[[], None]]:
        """Show a bar that the yielded function advances; silent when not a terminal."""
        rich = self.console.rich
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=rich, transient=True, disable=not rich.is_terminal) as bar:
            task = bar.add_task("runs", total=count)
            yield lambda: bar.advance(task)

    def _tell(self, run: PlannedRun, job: Job, code: int) -> None:
        row = self.folder.row(run)
        if row is None:
            said = f"exit code {code}: {last_line(job.log)}"
            self.console.line(f"! {run.name} failed: {said}", style="bold yellow")
            return
        val = "" if row.val_accuracy is None else f", {row.val_accuracy:.2f} % validation"
        self.console.line(
            f"{run.name}: {row.test_accuracy:.2f} % test{val}, {row.train_seconds:,.0f} s"
        )

    def _report(self, runs: Sequence[PlannedRun], measured: Measured, reference: str | None) -> int:
        """Write and show what the runs came to, and return the exit code."""
        ended, settings = self.folder.write_tables(runs, measured, reference)
        if reference is None:
            settings.sort(key=lambda row: -row.mean)
        if settings:
            self.folder.write_picture(ended, settings, measured)
        if self.as_json:
            print(strict_json.dumps([as_dict(row) for row in settings], indent=2))
        elif settings:
            self.console.line("")
            self.console.rich.print(table_of(settings, measured))
        if any(row.n > 1 for row in settings) and not has_scipy():
            self.console.line(
                "! no interval and no comparison: they need scipy (pip install scipy)",
                style="bold yellow",
            )
        if measured == "val_accuracy":
            self.console.line("settings are judged on validation images")
        failed = len(runs) - len(ended)
        if failed:
            self.console.line(
                f"! {failed:,} of {len(runs):,} runs failed; their logs: "
                f"{self.folder.path}/runs/*.log; --resume tries them again",
                style="bold yellow",
            )
        if ended:
            files = "settings.csv, runs.csv, sweep.png, runs/"
            self.console.line(f"{self.folder.path}: {datasets_of(ended)}; {files}")
        return 1 if failed else 0
