"""Which route, precision, layout and loader a run really uses here, and why not the others."""

import importlib.util
from dataclasses import dataclass, field

import torch
from torch import nn

from fastres import host
from fastres.config import Config, LoaderName, PrecisionName, RouteName
from fastres.data.loaders import choose_loader
from fastres.engine import machine
from fastres.engine.distributed import ALONE, Processes
from fastres.errors import UsageError
from fastres.model.kernel_status import cpu_kernels_missing, fused_kernels

__all__ = ["Runtime", "Setting", "resolve_runtime"]

_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PRECISIONS: dict[torch.dtype, PrecisionName] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


@dataclass(frozen=True)
class Setting:
    """One line of the first screen: what is set to which value, and why."""

    name: str
    value: str
    reason: str
    fallback: bool = False


@dataclass
class Runtime:
    """How the training step runs on this machine.

    Attributes:
        device: "cpu" or a CUDA device.
        dtype: of activations and filters under autocast; float32 for none.
        channels_last: weights and activations in NHWC order.
        route: "eager", "compile" or "fused".
        compiled: torch.compile stands around the network.
        graph: the step is one CUDA graph.
        fused_optimizer: the optimizer is one kernel for all parameters.
        loader: "dali", "resident" or "torch".
        threads: of torch on a CPU; None leaves torch's own number.
        deterministic: two runs on one machine are equal bit for bit.
        settings: the same with reasons, for people.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    route: RouteName = "eager"
    compiled: bool = False
    graph: bool = False
    fused_optimizer: bool = False
    loader: LoaderName = "torch"
    threads: int | None = None
    deterministic: bool = False
    settings: list[Setting] = field(default_factory=list)

    @property
    def precision(self) -> PrecisionName:
        """Return "fp32", "bf16" or "fp16"."""
        return _PRECISIONS[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        """Return the layout of images and filters."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def configure_torch(self) -> None:
        """Set what belongs to the whole process: threads, determinism, cuDNN's search."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        # A warning names an operation without a deterministic form. One is harmless here: max
        # pooling adds gradients in any order, and the windows of resnet9 do not overlap.
        # The setter imports inductor, more than a second that a prediction has no other use for.
        if torch.get_deterministic_debug_mode() != int(self.deterministic):
            torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not self.deterministic

    def place(self, model: nn.Module) -> None:
        """Move `model` to the device and into the layout, in place."""
        model.to(self.device)
        model.to(memory_format=self.memory_format)

    def autocast(self) -> torch.autocast:
        """Return the context in which the network computes."""
        return torch.autocast(
            self.device.type,
            dtype=self.dtype if self.dtype != torch.float32 else None,
            enabled=self.dtype != torch.float32,
        )

    def note(self, name: str, value: str, reason: str, *, fallback: bool = False) -> None:
        """Add a line to the first screen."""
        self.settings.append(Setting(name, value, reason, fallback))


def resolve_runtime(config: Config, model: nn.Module, processes: Processes = ALONE) -> Runtime:
    """Decide what `config` means for `model` on this machine, which `processes` share.

    Raises:
        UsageError: where an option that was set to something else than auto cannot be had here.
    """
    runtime = Runtime(device=_choose_device(config), deterministic=config.deterministic)
    if runtime.device.type == "cpu":
        share = max(1, host.usable_cores() // processes.local_size)
        runtime.threads = config.threads or share
        runtime.note("device", "cpu", f"{runtime.threads} threads, {_why_cpu(config)}")
    else:
        runtime.note("device", "cuda", torch.cuda.get_device_name(runtime.device))
    if processes.size > 1:
        share = config.batch_size // processes.size
        runtime.note("processes", str(processes.size), f"{share} images of a batch each")
    _choose_precision(config, runtime)
    _choose_layout(config, runtime, model)
    _choose_route(config, runtime)
    _choose_graph(config, runtime)
    # The plain optimizer reads its rate on the host, which no graph can.
    runtime.fused_optimizer = config.fast or runtime.graph
    kind = "fused" if runtime.fused_optimizer else "one tensor at a time"
    rule = "muon for filters, sgd for the rest" if config.optimizer == "muon" else config.optimizer
    runtime.note("optimizer", kind, rule)
    _choose_loader(config, runtime)
    return runtime


def _choose_device(config: Config) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UsageError("--device cuda: torch finds no usable NVIDIA GPU here")
    use_cuda = available and config.device != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def _why_cpu(config: Config) -> str:
    return "as asked" if config.device == "cpu" else "no NVIDIA GPU here"


def _choose_precision(config: Config, runtime: Runtime) -> None:
    if config.amp != "auto":
        runtime.dtype = _DTYPES[config.amp]
        runtime.note("precision", runtime.precision, "as asked")
    elif not config.fast:
        runtime.note("precision", "fp32", "the reference; --fast or --amp bf16 mixes precisions")
    elif runtime.device.type == "cuda":
        native = torch.cuda.get_device_capability(runtime.device) >= (8, 0)
        runtime.dtype = torch.bfloat16 if native else torch.float16
        reason = "native on this GPU" if native else "this GPU has no bf16; with loss scaling"
        runtime.note("precision", runtime.precision, reason, fallback=not native)
    else:
        instructions = host.bf16_instructions()
        runtime.dtype = torch.bfloat16 if instructions else torch.float32
        reason = (
            f"the processor has {instructions}"
            if instructions
            else "this processor has no bf16 instructions, and emulated bf16 is slower than fp32"
        )
        runtime.note("precision", runtime.precision, reason, fallback=not instructions)


def _choose_layout(config: Config, runtime: Runtime, model: nn.Module) -> None:
    asked = config.channels_last == "on"
    runtime.channels_last = asked or (config.fast and config.channels_last == "auto")
    if runtime.channels_last and runtime.device.type == "cpu":
        unsafe = _unsafe_in_nhwc(model)
        if unsafe and asked:
            raise UsageError(f"--channels-last on: {unsafe}; leave it out, or widen the net")
        if unsafe:
            runtime.channels_last = False
            runtime.note("layout", "NCHW", unsafe, fallback=True)
            return
    if config.channels_last != "auto":
        why = "as asked"
    else:
        why = "part of --fast" if config.fast else "the reference is NCHW"
    runtime.note("layout", "channels-last" if runtime.channels_last else "NCHW", why)


def _unsafe_in_nhwc(model: nn.Module) -> str | None:
    """Say which convolution may not run in NHWC order on a CPU, or return None.

    The backward pass of oneDNN's strided 1x1 convolution works on whole vectors of channels and
    writes past its workspace when a tensor has fewer: wrong gradients, a hang or a crash
    (https://github.com/uxlfoundation/oneDNN/issues/6035; seen with torch 2.15 on AVX2).
    """
    vector = 16 if host.has_avx512() else 8
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.kernel_size == (1, 1)
            and module.stride != (1, 1)
            and module.in_channels < vector
        ):
            return (
                f"oneDNN's strided 1x1 convolution is unsafe in NHWC for the {module.in_channels} "
                f"channels of {name}"
            )
    return None


def _choose_route(config: Config, runtime: Runtime) -> None:
    on_cuda = runtime.device.type == "cuda"
    compiler = machine.cxx_compiler()
    if (config.compile == "on" or config.route == "compile") and compiler is None:
        asked = "--compile on" if config.compile == "on" else "--route compile"
        raise UsageError(f"{asked} needs a C++ compiler (g++ or clang++) and none is installed")
    if config.route != "auto":
        runtime.route, why = config.route, "as asked"
    elif config.compile == "on":
        runtime.route, why = "compile", "as asked"
    elif config.fast:
        runtime.route, why = _fastest_route(runtime, compiler)
    else:
        runtime.route, why = "eager", "the reference"
    if runtime.route == "fused" and config.route == "fused":
        why = f"as asked, {fused_kernels(runtime.device)}"
    wants_compile = on_cuda and config.compile == "auto" and compiler is not None
    runtime.compiled = runtime.route == "compile" or (
        runtime.route == "fused" and (config.compile == "on" or wants_compile)
    )
    if config.route == "auto" and config.compile == "off" and runtime.route == "compile":
        runtime.route, runtime.compiled, why = "eager", False, "--compile off"
    around = " in torch.compile" if runtime.route == "fused" and runtime.compiled else ""
    fallback = config.fast and config.route == "auto" and runtime.route == "eager"
    runtime.note("route", runtime.route + around, why, fallback=fallback)


def _fastest_route(runtime: Runtime, compiler: str | None) -> tuple[RouteName, str]:
    """The route of --fast and why; on a CPU as measured, see benchmarks/results."""
    if runtime.device.type == "cuda":
        if importlib.util.find_spec("triton") is not None:
            return "fused", fused_kernels(runtime.device)
        if compiler is None:
            return "eager", "neither Triton nor a C++ compiler for torch.compile here"
        return "compile", "no Triton here"
    if runtime.dtype != torch.bfloat16:
        return "eager", "in fp32 the fused kernels gain nothing on a CPU, and compile less"
    missing = cpu_kernels_missing()
    if missing:
        return "eager", f"the fused CPU kernels are left out: {missing}"
    return "fused", fused_kernels(runtime.device)


def _choose_graph(config: Config, runtime: Runtime) -> None:
    on_cuda = runtime.device.type == "cuda"
    if config.graph == "on" and not on_cuda:
        raise UsageError("--graph on: CUDA graphs need an NVIDIA GPU")
    runtime.graph = on_cuda and (config.graph == "on" or (config.graph == "auto" and config.fast))
    if not on_cuda:
        runtime.note("graph", "off", "CUDA graphs need an NVIDIA GPU", fallback=config.fast)
    else:
        why = "as asked" if config.graph != "auto" else "one launch a step"
        runtime.note("graph", "on" if runtime.graph else "off", why if runtime.graph else "")


def _choose_loader(config: Config, runtime: Runtime) -> None:
    if config.loader != "auto":
        runtime.loader = config.loader
        runtime.note("loader", config.loader, "as asked")
    elif config.fast:
        runtime.loader, reason = choose_loader(runtime.device)
        runtime.note("loader", runtime.loader, reason)
    else:
        runtime.note("loader", "torch", "the reference")
