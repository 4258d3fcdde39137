"""Measure this GPU and write its launch table: `python -m fastres.kernels.tools.tune`.

For every convolution of the chosen networks the tuner times tile configurations and, as equal work,
the `triton` and `cudnn` routes, and keeps the fastest that computes the right thing; see tuner.py.
All layers get their routes first, with heuristic tiles, then their tiles; those that move most
bytes come first, and the table is written after each, so a run that is cut off loses little.
Entries of other GPUs and of other layers stay.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastres.host import provenance
from fastres.output import reader_may_leave

if TYPE_CHECKING:
    import torch

    from fastres.kernels.conv_shape import ConvOp
    from fastres.kernels.tools.tune_workloads import ConvWorkload
    from fastres.kernels.tools.tuner import Choice

__all__ = ["main"]

NETWORKS = ("resnet20", "resnet18")
DTYPES = ("bf16", "fp16", "tf32", "fp32")


class _Parser(argparse.ArgumentParser):
    """A parser that answers wrong use in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m fastres.kernels.tools.tune", description=__doc__)
    add = parser.add_argument
    text = f"networks: {', '.join(NETWORKS)}; default all"
    add("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME", help=text)
    add("--batches", nargs="+", type=int, default=[512], metavar="N", help="images; default 512")
    text = f"precisions: {', '.join(DTYPES)} (tf32: fp32 as torch multiplies it); default bf16"
    add("--dtypes", nargs="+", choices=DTYPES, default=["bf16"], metavar="NAME", help=text)
    add("--budget", type=float, metavar="SECONDS", help="stop in time and keep what is done")
    add("--out", type=Path, metavar="FILE", help="table to write; default: the package's")
    add("--candidates", type=int, default=24, metavar="N", help="tiles a product; default 24")
    text = "cold: emptied before every call (default); hot: as the call before left it"
    add("--l2", choices=("cold", "hot"), default="cold", help=text)
    add("--dry-run", action="store_true", help="list the candidates and measure nothing")
    return parser


def _obstacle(options: argparse.Namespace) -> str | None:
    """Why nothing can be measured here, or None."""
    for batch in options.batches:
        if batch < 1:
            return f"--batches must be at least 1, got {batch}"
    if options.candidates < 1:
        return f"--candidates must be at least 1, got {options.candidates}"
    if options.budget is not None and options.budget <= 0:
        return f"--budget must be above 0 seconds, got {options.budget:g}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux only)"
    if options.out is not None and not options.out.resolve().parent.is_dir():
        return f"--out: there is no folder {options.out.parent}"
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        return "no NVIDIA GPU is here to be measured; --dry-run lists what would be"
    return None


def _workloads(options: argparse.Namespace) -> "list[ConvWorkload]":
    from fastres.kernels.tools.networks import PRECISIONS
    from fastres.kernels.tools.tune_workloads import conv_workloads

    precisions = [PRECISIONS[name] for name in options.dtypes]
    return conv_workloads(options.models, options.batches, precisions)


def _print_candidates(workloads: "Sequence[ConvWorkload]", limit: int) -> None:
    """List what would be timed, most valuable layer first."""
    from fastres.kernels.gpu.launch_config import table_key
    from fastres.kernels.tools.tuner import candidates

    whole = sum(workload.bytes for workload in workloads)
    number = 0
    for workload in workloads:
        tf32, dtype = workload.precision.tf32, workload.precision.dtype
        ops: list[ConvOp] = ["fprop", "dgrad", "wgrad"]
        if not any(variant.need_dx for variant in workload.variants):
            ops.remove("dgrad")
        for op in ops:
            found = candidates(op, workload.shape, dtype, tf32=tf32, limit=limit)
            number += len(found)
            key = table_key(op, workload.shape, dtype, tf32=tf32)
            share = workload.bytes / whole
            print(f"{key}: {100 * share:.1f} % of the bytes, {len(found)} candidates")
            for config in found:
                print(f"  {config.label}")
    print(f"{number} candidates of {len(workloads)} layers; cudnn besides, for each product")


def _provenance(options: argparse.Namespace, device: "torch.device") -> dict[str, Any]:
    """How the entries were measured: kept in the table beside them."""
    import torch

    command = ["python", "-m", "fastres.kernels.tools.tune", *sys.argv[1:]]
    return {
        **provenance(command),
        "cudnn": torch.backends.cudnn.version(),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "l2": options.l2,
    }


def _report(choices: "Sequence[Choice]") -> None:
    """Print one line a product: its time against that of the heuristics."""
    for choice in choices:
        config = choice.config
        print(
            f"{choice.key}: {config.route} {config.label}, {1e6 * choice.seconds:.1f} us, "
            f"heuristics {1e6 * choice.heuristic_seconds:.1f} us, {choice.speedup:.2f} times",
            flush=True,
        )


def _measure(options: argparse.Namespace) -> int:
    """Tune, writing after each layer."""
    import torch

    from fastres.kernels.gpu.launch_config import TABLE_PATH, gpu_name
    from fastres.kernels.tools.graph_timer import GraphTimer
    from fastres.kernels.tools.tuner import Tuner, merge_table

    # As training sets it: cuDNN times its algorithms too.
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda", torch.cuda.current_device())
    out = options.out or TABLE_PATH
    started = time.monotonic()
    # Not every release of torch names the attribute in its type stubs.
    properties: Any = torch.cuda.get_device_properties(device)
    tuner = Tuner(
        device,
        GraphTimer(device, cold=options.l2 == "cold"),
        deadline=None if options.budget is None else started + options.budget,
        shared_bytes=properties.shared_memory_per_block_optin,
        multiprocessors=properties.multi_processor_count,
        has_tma=properties.major >= 9,
        limit=options.candidates,
    )
    workloads = _workloads(options)
    name, measured = gpu_name(device), _provenance(options, device)
    print(f"{name}: {len(workloads)} layers, {options.l2} L2, table {out}")
    done: list[Choice] = []
    for choices in tuner.run(workloads):
        merge_table(out, name, {choice.key: choice.config for choice in choices}, measured)
        _report(choices)
        done += choices
    tuned = len({choice.key.rpartition("/")[2] for choice in done})
    spent = time.monotonic() - started
    print(f"{len(done)} entries of {tuned} layer shapes written to {out} in {spent:.0f} s")
    return 0


@reader_may_leave()
def main(argv: Sequence[str] | None = None) -> int:
    """Tune or list; 2 where nothing can be measured."""
    options = _parser().parse_args(argv)
    reason = _obstacle(options)
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    try:
        if options.dry_run:
            _print_candidates(_workloads(options), options.candidates)
            return 0
        return _measure(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was written stays", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
