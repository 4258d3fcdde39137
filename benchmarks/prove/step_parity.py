"""Is the fast step right, and the same every time? `python -m benchmarks.prove.step_parity`.

Trains the step of --fast on its fused route some steps long, from one seed on the same batches:

    twice      run eagerly, launch by launch, against itself: bit for bit
    captured   as one CUDA graph, against the eager one: bit for bit
    update     loss and update of the first step against eager float32, see harness/step_check.py

Compared bit for bit after every step are the loss, weights, running statistics, the state of the
optimizer and of the loss scale. All of them train with --deterministic: where cuDNN computes a
layer it may else add in any order, or choose another algorithm the next time. The project's own
kernels add in one order in either mode. Torch fills new memory with NaN then, so that a value which
no kernel writes shows as well.

A line each: ok, DIFFERS (from which step on, which tensor first, how many values, how far) or
WRONG. Exit codes: 0 all is ok, 1 something is not, 2 bad use, 5 nothing to run on this machine.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.harness import ablation
from benchmarks.harness.check_command import make_parser, run_check, step_options
from benchmarks.harness.step_check import check_step
from fastres.engine import machine
from fastres.errors import UsageError
from fastres.kernels.tools.error_check import as_bits

__all__ = ["State", "difference", "main", "train"]

State = dict[str, Tensor]
"""Everything that a step may change, by name: the loss first, then in the order of the network."""


def train(
    model: str, batch_size: int, num_steps: int, **options: Any
) -> tuple[ablation.Configuration, list[State]]:
    """Train the fast step on its fused route and return it, with its state after every step.

    Options are those of `Config`. The first batch is the fixed one, from seed 0.

    Raises:
        Unavailable: when this machine cannot have it.
    """
    options = {"route": "fused", "deterministic": True, **options}
    built = ablation.assemble("fast", model, batch_size, ablation.here(), **options)
    states = []
    for seed in range(num_steps):
        images, labels = ablation.fixed_batch(batch_size, seed=seed)
        images = images.to(built.runtime.device, memory_format=built.runtime.memory_format)
        built.step.totals.values.zero_()
        built.train_on(images, labels.to(built.runtime.device))
        states.append(_state(built, batch_size))
    return built, states


def _state(built: ablation.Configuration, batch_size: int) -> State:
    """Copies of what the last step left."""
    state = {"loss": built.step.totals.values[0] / batch_size}
    for name, tensor in built.step.state_dict().items():
        if name != "totals.values":
            state[name] = tensor.detach().clone()
    return state


def _num_differing(first: Tensor, second: Tensor) -> int:
    """Values whose bits differ: two equal NaNs do not, two zeros of unlike sign do."""
    return int((as_bits(first) != as_bits(second)).sum())


def difference(first: Sequence[State], second: Sequence[State]) -> str | None:
    """Say from which step on two trainings differ and in what, or None where in no bit."""
    for step, (one, other) in enumerate(zip(first, second, strict=True), start=1):
        if one.keys() != other.keys():
            return f"after step {step}: {', '.join(sorted(one.keys() ^ other.keys()))} in one alone"
        counts = {name: _num_differing(one[name], other[name]) for name in one}
        differing = [name for name, count in counts.items() if count]
        if differing:
            name = differing[0]
            a, b = one[name], other[name]
            off = (a.double() - b.double()).abs().max().item()
            return (
                f"after step {step}: {name} first, {counts[name]} of {a.numel()} values by up to "
                f"{off:.1e} at {b.double().abs().max().item():.1e}; {len(differing)} of {len(one)} "
                f"tensors"
            )
    return None


def _compare(name: str, first: Sequence[State], second: Sequence[State]) -> bool:
    """Print the line of one comparison bit for bit and return whether it is ok."""
    found = difference(first, second)
    same = f"ok, {len(first)} steps, {len(first[0])} tensors bit for bit"
    print(f"{name:<9} {same if found is None else f'DIFFERS {found}'}", flush=True)
    return found is None


def _check_update(
    model: str, batch_size: int, built: ablation.Configuration, states: Sequence[State]
) -> bool:
    """Print the line of the first update and return whether it is ok."""
    loss = states[0]["loss"].item()
    parameters = [states[0][f"model.{name}"] for name, _ in built.model.named_parameters()]
    try:
        off = check_step("the step", model, batch_size, built.runtime, loss, parameters)
        lost = [step for step, s in enumerate(states, start=1) if not s["loss"].isfinite()]
        if lost:
            raise AssertionError(f"the loss of step {lost[0]} is not finite")
    except AssertionError as error:
        print(f"update    WRONG {error}", flush=True)
        return False
    assert off is not None
    print(
        f"update    ok, loss {loss:.5f}, off by {off.error:.1e} of the update's RMS, allowed "
        f"{off.allowed:.1e}",
        flush=True,
    )
    return True


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks.prove.step_parity", __doc__)
    parser.add_argument("--steps", type=int, default=5, help="of each training; default 5")
    options = parser.parse_args(argv)
    if options.steps < 1:
        raise UsageError(f"--steps must be at least 1, got {options.steps}")
    return options


def _run(argv: Sequence[str]) -> int:
    options = _parse(argv)
    step = step_options(options)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    machine.keep_freed_memory()
    case = (options.model, options.batch_size)

    def trained(graph: str) -> tuple[ablation.Configuration, list[State]]:
        return train(*case, options.steps, graph=graph, **step)

    built, states = trained("off")
    route = next(setting for setting in built.runtime.settings if setting.name == "route")
    words = f"{case[0]} batch {case[1]}, {built.runtime.precision}"
    print(f"{words}: {route.value}, {route.reason}", flush=True)
    results = [_compare("twice", states, trained("off")[1])]
    if built.runtime.device.type == "cuda":
        results.append(_compare("captured", states, trained("on")[1]))
    else:
        print("captured  left out: a CUDA graph needs an NVIDIA GPU", flush=True)
    # Its references are built with settings of their own, so it comes last.
    results.append(_check_update(*case, built, states))
    return 0 if all(results) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_check(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
