"""Does the fused network learn as the eager one does? `python -m benchmarks.prove.loss_curves`.

Five trainings start from the same weights and take every step on the same batch, one after another:

    eager            plain torch, float32 without TF32: the truth
    eager reordered  the same with the images of every batch in reverse order
    amp, reordered   plain torch in the precision of the fused step, in both orders; in float32 it
                     is channels_last
    fused            the step of --fast on its fused route

Two correct trainings do not keep together: a difference in the last bit of one sum grows from step
to step until the curves are as far apart as their noise is wide, however small it was. On a CPU the
float32 training in reverse order, the same mathematics in another order of summation, was from the
second window of 20 steps on as far from the truth as those in bfloat16. So the fused curve is right
if it is no further from the truth than trainings that are known to be right.

The distance in a window is the RMS of loss minus the truth's loss over its 20 steps, and may be
RATIO = 1.25 times the largest of the three others, the ratio of every parity check, plus that
rule's floor for float32: the mean of a batch in another order of summation, 2 u of the loss. Single
steps are compared, not the means of windows, of which a run has too few: between trainings that
differ by chance alone those were measured to vary fourfold. The windows count together, as draws of
a kernel test do: the RMS over all windows, and seeds, of the distance as a share of what is allowed
must not exceed 1. So the first steps, where chance does not yet hide an error, weigh as much as the
last.

Measured on a CPU, ResNet-8, batch 64, bfloat16, 200 steps: among 120 comparisons of correct
trainings the share was 0.73 on average, 0.06 its standard deviation, 0.89 the largest. With two
seeds it was 0.59 for the fused network, 1.08 without the gradient of one convolution of nine, 1.30
with 0.8 of the gradients of all. The RMS of all steps together told neither from the correct ones.
What one layer gets wrong shows sooner in the first update: step_parity.py.

The schedule is one cycle over all steps, as recipes have it: warm-up, then falling to zero. Lines
show the mean loss of 20 steps. Exit codes: 0 right, 1 too far off, 2 bad use, 5 nothing to run.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastres
from benchmarks.harness import ablation
from benchmarks.harness.check_command import make_parser, run_check, step_options
from benchmarks.harness.rows import Row, make_provenance, summarize, write_results
from benchmarks.harness.step_check import without_tf32
from fastres.data.dataset import Dataset
from fastres.engine import machine
from fastres.errors import UsageError
from fastres.kernels.reference.error_bound import FLOOR_RMS, RATIO

__all__ = ["Verdict", "judge", "main", "train_curves"]

SUITE = "loss curves"
TRUTH, FUSED = "eager", "fused"
_WINDOW = 20

Curves = dict[str, list[float]]
"""The loss of every step by training."""


class Verdict(NamedTuple):
    """How far the trainings are from the truth, and how far the fused one may be.

    distances: by training, the RMS in every window. allowed: of the fused one, in every window.
    """

    distances: dict[str, list[float]]
    allowed: list[float]

    @property
    def share(self) -> float:
        """RMS over the windows of the fused one's distance, as a share of what is allowed."""
        pairs = zip(self.distances[FUSED], self.allowed, strict=True)
        return _rms([distance / allowed for distance, allowed in pairs])

    @property
    def is_right(self) -> bool:
        """Whether the fused training is near enough; a NaN is not."""
        return self.share <= 1


def _rms(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).square().mean().sqrt().item()


def _windows(values: Sequence[float]) -> list[Sequence[float]]:
    return [values[start : start + _WINDOW] for start in range(0, len(values), _WINDOW)]


def judge(curves: Sequence[Curves]) -> Verdict:
    """Compare the fused curve of every seed with the truth, and its distances with the others'."""
    verdict = Verdict({name: [] for name in curves[0] if name != TRUTH}, [])
    for of_seed in curves:
        for name, distances in verdict.distances.items():
            pairs = zip(of_seed[name], of_seed[TRUTH], strict=True)
            distances += map(_rms, _windows([loss - exact for loss, exact in pairs]))
    others = [distances for name, distances in verdict.distances.items() if name != FUSED]
    floors = [
        FLOOR_RMS[torch.float32] * _rms(window) for c in curves for window in _windows(c[TRUTH])
    ]
    for floor, *of_others in zip(floors, *others, strict=True):
        verdict.allowed.append(RATIO * max(of_others) + floor)
    return verdict


@dataclass
class _Training:
    """One of the trainings, and the losses of its steps on the device.

    is_reordered: whether it gets the images of every batch in reverse order. context: in which it
    computes.
    """

    built: ablation.Configuration
    is_reordered: bool = False
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    losses: list[Tensor] = field(default_factory=list)

    def train_on(self, images: Tensor, labels: Tensor) -> None:
        if self.is_reordered:
            images, labels = images.flip(0), labels.flip(0)
        totals = self.built.step.totals.values.zero_()
        with self.context():
            self.built.train_on(images, labels)
        self.losses.append(totals[0] / len(labels))

    def read(self) -> list[float]:
        """Wait for the device and return the losses since the last time."""
        losses, self.losses = torch.stack(self.losses).tolist(), []
        return losses


def _trainings(
    model: str, batch_size: int, num_classes: int, steps: int, seed: int, options: dict[str, Any]
) -> dict[str, _Training]:
    """Build the trainings of a seed; plain torch takes the precision that the fused one has."""

    def assemble(configuration: str, **more: Any) -> ablation.Configuration:
        common = {"seed": seed, "schedule": "one-cycle", "warmup": 0.2, **more}
        case = (model, batch_size, ablation.here(), num_classes, steps)
        return ablation.assemble(configuration, *case, **common)

    fused = assemble("fast", route="fused", **options)
    precision = fused.runtime.precision
    same, amp = ("channels_last", {}) if precision == "fp32" else ("amp", {"amp": precision})
    return {
        TRUTH: _Training(assemble(TRUTH), context=without_tf32),
        f"{TRUTH} reordered": _Training(assemble(TRUTH), True, without_tf32),
        same: _Training(assemble(same, **amp)),
        f"{same} reordered": _Training(assemble(same, **amp), True),
        FUSED: _Training(fused),
    }


def _batches(
    data: Dataset, batch_size: int, device: torch.device, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training batches of the resident loader for ever."""
    loader = fastres.make_loader(
        data, batch_size=batch_size, loader="resident", device=device, seed=seed
    )
    while True:
        yield from loader


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _line(step: int, window: Curves) -> str:
    """Mean losses of the steps up to `step`, side by side."""
    return f"{step:5} " + " ".join(
        f"{_mean(losses):>{_width(n)}.5f}" for n, losses in window.items()
    )


def _width(name: str) -> int:
    return max(len(name), 9)


def train_curves(trainings: Mapping[str, _Training], batches: Iterator, steps: int) -> Curves:
    """Train all of them on the same batches, step by step in turns, and print as it goes."""
    print(" step " + " ".join(f"{name:>{_width(name)}}" for name in trainings), flush=True)
    curves: Curves = {name: [] for name in trainings}
    for step, (images, labels) in enumerate(itertools.islice(batches, steps), start=1):
        for training in trainings.values():
            training.train_on(images, labels)
        if step % _WINDOW == 0 or step == steps:
            window = {name: training.read() for name, training in trainings.items()}
            print(_line(step, window), flush=True)
            for name, losses in window.items():
                curves[name] += losses
    return curves


def _rows(case: str, curves: Sequence[Curves], verdict: Verdict) -> list[Row]:
    """Mean losses of every window, a value a seed, and the distances from the truth."""
    rows = []
    for name in curves[0]:
        of_seeds = [[_mean(window) for window in _windows(c[name])] for c in curves]
        for number, values in enumerate(zip(*of_seeds, strict=True)):
            metric = f"loss_from_step_{number * _WINDOW + 1}"
            rows.append(summarize(SUITE, case, name, metric, "nats", values))
    for name, distances in {**verdict.distances, "allowed": verdict.allowed}.items():
        rows.append(summarize(SUITE, case, name, "distance", "nats", distances))
    rows.append(summarize(SUITE, case, FUSED, "share_of_allowed", "1", [verdict.share]))
    return rows


def _say(verdict: Verdict) -> None:
    print("RMS distance from eager in every window:", flush=True)
    for name, distances in {**verdict.distances, "allowed": verdict.allowed}.items():
        print(f"{name:>22} " + " ".join(f"{off:.1e}" for off in distances), flush=True)
    word = "ok" if verdict.is_right else "WRONG"
    print(f"{word}: fused is {verdict.share:.2f} of what is allowed from eager", flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks.prove.loss_curves", __doc__)
    parser.add_argument("--steps", type=int, default=200, help="of a training; default 200")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind; default 1")
    default = os.environ.get("FASTRES_DATA")
    parser.add_argument(
        "--data-dir", default=default, help="images; default: $FASTRES_DATA, else synthetic ones"
    )
    parser.add_argument("--out", type=Path, help="folder for rows; default: no rows")
    options = parser.parse_args(argv)
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def _run(argv: Sequence[str]) -> int:
    options = _parse(argv)
    step = step_options(options)
    machine.keep_freed_memory()
    data = fastres.load_dataset("auto" if options.data_dir else "synthetic", options.data_dir)
    case, curves = (options.model, options.batch_size), []
    for seed in range(options.seeds):
        trainings = _trainings(*case, len(data.classes), options.steps, seed, step)
        runtime = trainings[FUSED].built.runtime
        words = (
            f"{case[0]} batch {case[1]}, {runtime.precision}, {options.steps} steps, {data.name}"
        )
        print(f"{words}, seed {seed}", flush=True)
        batches = _batches(data, options.batch_size, runtime.device, seed)
        curves.append(train_curves(trainings, batches, options.steps))
    verdict = judge(curves)
    _say(verdict)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        provenance = make_provenance(
            runtime.precision, ["python", "-m", "benchmarks.prove.loss_curves", *argv]
        )
        provenance["seeds"] = list(range(options.seeds))
        rows = _rows(words, curves, verdict)
        print(write_results("loss_curves", rows, provenance, options.out), flush=True)
    return 0 if verdict.is_right else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_check(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
