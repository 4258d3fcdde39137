"""What finished runs say of themselves: summary.json and metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres import strict_json
from fastres.config import Config, changed_options, checked_options
from fastres.data.files import FOLDER, kind_at
from fastres.engine.run_dir import RunDir
from fastres.errors import FailureError, UsageError

__all__ = ["SeedResult", "read_metrics", "read_summary", "seed_results"]


@dataclass(frozen=True)
class SeedResult:
    """A finished run of a recipe: its seed and its test accuracy in percent."""

    seed: int
    accuracy: float


def read_summary(path: str) -> dict[str, Any] | None:
    """Return the summary of the run in the folder `path`; None where there is none.

    Raises:
        FailureError: when it is no JSON object.
    """
    return _read_json(Path(path), "summary.json")


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    if kind_at(folder) != FOLDER or kind_at(folder / name) is None:
        return None
    try:
        value = strict_json.loads(RunDir(folder).read_bytes(name))
    except ValueError as error:
        raise FailureError(f"{folder / name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise FailureError(f"{folder / name} is no JSON object")
    return value


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Return the rows of a run, one an epoch; none where it has not come so far.

    Raises:
        FailureError: when they are no JSON.
    """
    folder = Path(path)
    if kind_at(folder) != FOLDER or kind_at(folder / "metrics.jsonl") is None:
        return []
    lines = RunDir(folder).read_bytes("metrics.jsonl").splitlines()
    try:
        return [strict_json.loads(line) for line in lines if line]
    except ValueError as error:
        raise FailureError(f"{folder / 'metrics.jsonl'} is no JSON: {error}") from None


def seed_results(paths: Sequence[str]) -> list[SeedResult]:
    """Return seeds and test accuracies of runs that differ in nothing else.

    Args:
        paths: run folders; a single one need not be one, and then has no result.

    Raises:
        UsageError: when one has not finished, two have the same seed, other options or other data.
        FailureError: when a file of one is not what a run writes.
    """
    if len(paths) == 1 and read_summary(paths[0]) is None:
        return []
    results: list[SeedResult] = []
    first: tuple[Config, Any] | None = None
    for path in paths:
        summary = read_summary(path)
        if summary is None:
            raise UsageError(f"{path} is no finished run: it has no summary.json")
        source = Path(path) / "config.json"
        config = Config(**checked_options(_read_json(Path(path), "config.json") or {}, source))
        data = summary.get("dataset_fingerprint")
        first = first or (config, data)
        changed = set(changed_options(first[0].to_json(), config)) - {"seed", "recipe"}
        if changed or data != first[1]:
            what = ", ".join(sorted(changed)) or "its data"
            raise UsageError(f"{path} differs from {paths[0]} in {what}")
        try:
            results.append(SeedResult(int(summary["seed"]), float(summary["test_accuracy"])))
        except (KeyError, TypeError, ValueError):
            raise FailureError(f"{path}/summary.json lacks the seed or the accuracy") from None
    seeds = [result.seed for result in results]
    if len(set(seeds)) < len(seeds):
        raise UsageError("two of these runs have the same seed")
    return results
