"""How far a run is, and what it has measured: the part of a checkpoint that is no tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastres.engine.summary import MetricsRow

__all__ = ["TrainingState"]


@dataclass
class TrainingState:
    """Counted and measured since the run began, resumptions included.

    Attributes:
        step: steps done.
        train_seconds: in finished epochs, without evaluation.
        compile_seconds: before the first step.
        epoch_seconds: in an epoch that was interrupted.
        first_step_seconds: from the start of the process to the end of its first step.
        evaluation_rate: images/s of the last evaluation.
        best_val_accuracy: so far, in percent; -1 before the first.
        rows: one an epoch.
        execution_mode: how the steps were computed, "mixed" in what has changed; see summary.py.
    """

    step: int = 0
    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    epoch_seconds: float = 0.0
    first_step_seconds: float | None = None
    evaluation_rate: float = 0.0
    best_val_accuracy: float = -1.0
    rows: list[MetricsRow] = field(default_factory=list)
    execution_mode: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as checkpoints have named them from the first on."""
        values = vars(self).copy()
        values["way"] = values.pop("execution_mode")
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainingState":
        """Read what `to_json` returned, the columns of its rows in any order."""
        plain = dict(values)
        columns = MetricsRow.__annotations__
        plain["rows"] = [{k: row[k] for k in columns if k in row} for row in values["rows"]]
        return cls(execution_mode=plain.pop("way", {}), **plain)

    def add_mode(self, mode: Mapping[str, Any]) -> None:
        """Note how the coming steps are computed."""
        before = self.execution_mode
        self.execution_mode = {
            key: value if before.get(key, value) == value else "mixed"
            for key, value in mode.items()
        }
