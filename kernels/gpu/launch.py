"""How every kernel is started: one function that counts, records and launches.

Each launcher describes its launch completely (kernel, grid, arguments, tile configuration, bytes
and flops) and hands it to `launch`. Inside `recording()` the description is kept as a `Launch`,
and on meta tensors nothing else happens: so the byte budget of a whole network, and the machine
code of every kernel it starts, can be examined at full size on a machine without a GPU.

    with recording() as launches:
        conv_fprop(x_meta, w_meta, padding=1)
    launches[0].traffic.bytes, launches[0].grid, launches[0].args["BLOCK_M"]
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.gpu.cache_key import settle_cache_key
from fastres.kernels.gpu.launch_table import uses_pdl
from fastres.kernels.override import Override

__all__ = [
    "KernelVariant",
    "Launch",
    "Traffic",
    "launch",
    "num_bytes",
    "recording",
]

# No other device is to be made the current one.
_HERE = nullcontext()

# Types of most arguments; to find that they are no tensors otherwise takes several questions.
_PLAIN = frozenset({int, bool, float, str, type(None), tl.dtype, tl.constexpr})

_recorder: Override[list["Launch"]] = Override()


@dataclass(frozen=True)
class Traffic:
    """What a launch cannot avoid: each operand byte once, and the arithmetic asked for.

    Re-reading through the caches (the nine taps of a 3x3 filter) and padding to tiles are not
    counted: this is the numerator of a roofline, not a simulation.
    """

    reads: int
    writes: int
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.reads + self.writes

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.reads + other.reads, self.writes + other.writes, self.flops + other.flops
        )


@dataclass(frozen=True)
class Launch:
    """One kernel launch: all it takes to count it, compile it or run it again.

    A record holds its tensors; record on the meta device unless the values matter.

    trips: how often the loops of a program run in the mean, the outermost first; a loop that the
        compiler unrolls has none. last_programs: how many programs find their ticket to be the
        last, where a kernel has one.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    num_warps: int
    num_stages: int
    traffic: Traffic
    trips: tuple[float, ...] = (1.0,)
    last_programs: int = 1

    @property
    def name(self) -> str:
        """The kernel's name without its leading underscore."""
        return self.kernel.__name__.removeprefix("_")

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launcher takes beside the kernel's arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"launch_pdl": self.args["PDL"]}

    @property
    def leaves(self) -> dict[str, Any]:
        """Every argument by parameter; in tuples as "parameter.field", or "parameter[0]"."""
        return dict(_leaves(self.args))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor among `leaves`, those behind descriptors too."""
        return _tensors(self.args)


def _leaves(args: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in args.items():
        if hasattr(value, "_asdict"):
            yield from _leaves({f"{name}.{field}": v for field, v in value._asdict().items()})
        elif isinstance(value, tuple):
            yield from _leaves({f"{name}[{i}]": item for i, item in enumerate(value)})
        else:
            yield name, value.value if isinstance(value, tl.constexpr) else value


def _tensors(args: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    bases = {
        name: value.base if isinstance(value, TensorDescriptor) else value
        for name, value in _leaves(args)
    }
    return {name: base for name, base in bases.items() if isinstance(base, torch.Tensor)}


class KernelVariant(NamedTuple):
    """One of the kernels that an operation has: its grid and the arguments that are its alone.

    num_tiles: how many partial statistics or sums are left for each channel. trips: see `Launch`.
    num_columns: groups of programs that own different channels or filter elements, see
        last_program.py.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_tiles: int
    trips: tuple[float, ...]
    num_columns: int = 1

    @property
    def num_programs(self) -> int:
        """Programs of one column."""
        return math.prod(self.grid) // self.num_columns


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches made inside the `with` block, in order; real tensors still run."""
    launches: list[Launch] = []
    with _recorder.set(launches):
        yield launches


def num_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements of all given tensors; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    traffic: Traffic,
    trips: float | tuple[float, ...] = 1.0,
    last_programs: int = 1,
) -> None:
    """Start `kernel` on `grid`, on the device of its tensors.

    Whether by programmatic dependent launch is decided here, for all kernels: each takes `PDL`.
    What the arguments mean stands at `Launch`; a number of trips is that of the main loop.

    Raises: ValueError: when the tensors lie on more than one device, or on a CPU while the
        kernels are not interpreted.
    """
    device = _common_device(kernel, args)
    pdl = uses_pdl(device)
    args = {**args, "PDL": pdl}
    launches = _recorder.value
    if launches is not None:
        of_loops = trips if isinstance(trips, tuple) else (float(trips),)
        launches.append(
            Launch(kernel, grid, args, num_warps, num_stages, traffic, of_loops, last_programs)
        )
    if device.type == "meta":
        return
    if isinstance(kernel, triton.JITFunction):
        _check_not_on_cpu(kernel, device)
        settle_cache_key(kernel)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else _HERE:
        kernel[grid](**args, num_warps=num_warps, num_stages=num_stages, launch_pdl=pdl)


def _check_not_on_cpu(kernel: triton.JITFunction, device: torch.device) -> None:
    if device.type == "cpu":
        raise ValueError(
            f"{kernel.__name__}: Triton kernels run on CPU tensors only when TRITON_INTERPRET=1 "
            "is set before triton is imported; use fastres.kernels.reference otherwise"
        )


def _common_device(kernel: Any, args: Mapping[str, Any]) -> torch.device:
    """The device of all tensors among the arguments.

    Raises: ValueError: when there is more than one, or none.
    """
    devices = {tensor.device for tensor in _tensors_of(args.values())}
    if len(devices) != 1:
        raise ValueError(
            f"{kernel.__name__}: all tensors must be on one device, got {sorted(map(str, devices))}"
        )
    return devices.pop()


def _tensors_of(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those of `_tensors` without names, which would take longer: every launch comes by here."""
    for value in values:
        if type(value) in _PLAIN:
            continue
        if isinstance(value, tuple):
            yield from _tensors_of(value)
        elif isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, TensorDescriptor):
            yield value.base
