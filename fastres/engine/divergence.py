"""A run that has diverged ends with one sentence, and before it saves.

A NaN or an infinity stays where it came up, so nothing waits for the device in a step: each step
adds to a count there whether its loss was finite (`Totals`), and what a checkpoint would hold is
looked through before it is saved. What is agreed on here is agreed on by all processes.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from fastres.engine.checkpoint import first_nonfinite
from fastres.engine.evaluation import Score
from fastres.engine.step import TrainStep
from fastres.errors import FailureError

__all__ = ["require_finite_scores", "require_finite_state"]

# Halved by every overflow and doubled after 2,000 steps without one, the loss scale of fp16 falls
# this far only where gradients overflow whatever the scale. fairseq gives up at 1e-4.
_LEAST_LOSS_SCALE = 2.0**-14


def require_finite_state(step: TrainStep, done: int, kept: Path) -> None:
    """Refuse to save or to go on where a number of the run is not finite; all processes call it.

    Args:
        step: its losses since the totals were last set to zero, and its `state_dict`.
        done: steps of the run so far.
        kept: the checkpoint of before.

    Raises:
        FailureError: in every process, naming what is not finite, the step and its learning rate.
    """
    lost = step.processes.any(step.totals.nonfinite_steps())
    if lost:
        raise _diverged(step, "the loss is not finite in", done - lost + 1, kept)
    tensors = step.state_dict()
    name = first_nonfinite(tensors)
    if step.processes.any(int(name is not None)):
        raise _diverged(step, f"{name or 'the state'} is not finite after", done, kept)
    scale = tensors.get("scaler.scale")
    if scale is not None and scale < _LEAST_LOSS_SCALE:
        what = f"gradients overflow in fp16 at a loss scale of {scale.item():g} after"
        raise _diverged(step, what, done, kept)


def require_finite_scores(
    step: TrainStep, done: int, kept: Path, scores: Mapping[str, Score]
) -> None:
    """Refuse to record an evaluation whose loss is not finite: the weights are, and overflow.

    Raises:
        FailureError: naming the split, the step and its learning rate.
    """
    for split, score in scores.items():
        if not math.isfinite(score.loss):
            raise _diverged(step, f"the {split} loss is {score.loss} after", done, kept)


def _diverged(step: TrainStep, what: str, number: int, kept: Path) -> FailureError:
    """Say what happened in step `number`, counted from 1, and what is left."""
    left = f"{kept} is still the checkpoint of before" if kept.exists() else "nothing was saved"
    return FailureError(
        f"{what} step {number:,} of {step.total_steps:,}, at a learning rate of "
        f"{step.learning_rate(number - 1):g}: the run has diverged; lower --lr ({left})"
    )
