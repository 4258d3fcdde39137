"""Say what this machine has and whether it works: `fastres doctor`.

Versions, processor, GPU and driver, bf16, Triton, DALI, compilers, torch.compile, data, cache, and
which route --fast would take and why. What is installed is also used, each in a process of its own,
so that one that crashes or hangs, torch too, is told of like the others.

Exit codes: 0 all that is installed works, 1 something does not, 2 bad use.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastres import host, strict_json
from fastres.cli import guarded, parse
from fastres.errors import FastresError

__all__ = ["DoctorOptions", "Finding", "main"]

_DESCRIPTION = (
    "Say what this machine has, whether it works, and what --fast would do with it. "
    "Example: fastres doctor"
)
Status = Literal["ok", "missing", "broken"]
_PROBE_S = 180.0
_SHM_WANTED_MIB = 256
_STYLES = {"broken": "bold red", "missing": "yellow", "ok": None}
_WITH_TORCH = ("torchvision", "GPU", "bf16", "Triton", "CPU kernels", "torch.compile", "--fast")
# Beside those that are tried; the second line is optional.
_LIBRARIES = (
    *("numpy", "pillow", "safetensors", "rich", "matplotlib", "tyro"),
    *("onnx", "onnxruntime", "huggingface-hub", "scipy", "submitit", "optuna", "tensorboard"),
    *("wandb", "mlflow"),
)


@dataclass(frozen=True)
class DoctorOptions:
    """How to look."""

    data_dir: str | None = None
    """Folder to look for data in; default: $FASTRES_DATA, user cache."""
    quick: bool = False
    """Leave out torch.compile, which takes the longest to try."""
    json: bool = False
    """Print the findings as JSON."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        status: "ok"; "missing", which is no fault; "broken": it is there and does not work.
        detail: version, value, or what is wrong and what would help.
    """

    name: str
    status: Status
    detail: str


# Each is a script that prints one line of detail, "missing: ..." for what there is not; what it
# raises is what is wrong.
_TORCH = """
import torch
x = torch.randn(8, 3, 32, 32, requires_grad=True)
w = torch.randn(4, 3, 3, 3, requires_grad=True)
torch.nn.functional.conv2d(x, w).square().mean().backward()
assert w.grad.isfinite().all(), "a gradient is not finite"
print(torch.__version__)
"""
_TORCHVISION = """
import torchvision, torch
torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([1.0]), 0.5)
print(torchvision.__version__)
"""
_GPU = """
import torch
if not torch.cuda.is_available():
    built = torch.version.cuda
    print(f"missing: this torch is built for {f'CUDA {built}' if built else 'CPUs alone'}")
    raise SystemExit
x = torch.randn(64, 64, device="cuda")
assert (x @ x).isfinite().all(), "a product on the GPU is not finite"
free, total = torch.cuda.mem_get_info()
major, minor = torch.cuda.get_device_capability()
print(f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {total / 2**30:.0f} GiB "
      f"({free / 2**30:.0f} free), CUDA {torch.version.cuda}, "
      f"cuDNN {torch.backends.cudnn.version()}")
"""
_BF16 = """
import torch
from fastres import host
on_gpu = torch.cuda.is_available()
native = torch.cuda.get_device_capability() >= (8, 0) if on_gpu else host.bf16_instructions()
if not native:
    print("missing: not on this GPU; --fast takes fp16" if on_gpu
          else "missing: the processor has no instructions for it; --fast takes fp32")
    raise SystemExit
x = torch.randn(64, 64, device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16)
assert (x @ x).isfinite().all(), "a product in bf16 is not finite"
print("native on the GPU" if on_gpu else f"the processor has {native}")
"""
_TRITON = """
import torch, triton
import triton.language as tl

@triton.jit
def twice(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)

if torch.cuda.is_available():
    x = torch.randn(1000, device="cuda")
    y = torch.empty_like(x)
    twice[(8,)](x, y, 1000, BLOCK=128)
    assert torch.equal(y, 2 * x), "a kernel computed something else"
    print(triton.__version__)
else:
    print(f"{triton.__version__}, without a GPU to run on")
"""
_DALI = """
import numpy as np
from nvidia import dali
from nvidia.dali import fn, pipeline_def

@pipeline_def(batch_size=2, num_threads=1, device_id=None)
def pipe():
    pixels = fn.constant(idata=[1, 2], shape=[1, 2, 1], dtype=dali.types.UINT8, layout="HWC")
    return fn.flip(pixels)

p = pipe()
p.build()
(out,) = p.run()
assert np.asarray(out.at(0)).ravel().tolist() == [2, 1], "a pipeline computed something else"
print(dali.__version__)
"""
_COMPILE = """
import torch
f = torch.compile(lambda x: (x.sin() + 1).relu().sum())
x = torch.randn(1000)
assert torch.allclose(f(x), (x.sin() + 1).relu().sum(), rtol=1e-4), "it computed something else"
print("compiles and runs")
"""
_CPU_KERNELS = """
import torch, fastres
from fastres.kernels.cpu import build
from fastres.kernels.dispatch import is_interpreted
from fastres.model.kernel_status import fused_kernels
if is_interpreted():
    print("missing: TRITON_INTERPRET is set, and Triton's interpreter takes their place")
    raise SystemExit
if (why := build.unavailable()) is not None:
    assert "failed" not in why and "cannot be built" not in why, why
    print(f"missing: {why}")
    raise SystemExit
model = fastres.create_model("resnet8", 10, seed=0).eval()
fused = fastres.fuse(model, verbose=False).eval()
x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
for in_bf16, allowed in ((False, 1e-3), (True, 0.1)):
    with torch.inference_mode():
        wanted = model(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            error = (fused(x) - wanted).abs().max() / wanted.abs().max()
    assert error < allowed, f"a fused network differs from the plain one by {error:.2g}"
print(fused_kernels(torch.device("cpu")))
"""
_FAST = """
from fastres import strict_json
from fastres.engine.runtime import resolve_runtime
from fastres.model.resnet import network_of
from fastres.recipes import from_recipe
config = from_recipe("quick").replace(fast=True)
settings = resolve_runtime(config, network_of(config, 10)).settings
print(strict_json.dumps({s.name: {"value": s.value, "reason": s.reason} for s in settings}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _run(argv: list[str]) -> int:
    options = parse(DoctorOptions, "fastres doctor", _DESCRIPTION, argv, DoctorOptions())
    from rich.console import Console

    # Not that of the engine, which needs torch.
    console = Console(stderr=options.json, highlight=False, soft_wrap=True)

    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False)

    findings: list[Finding] = []
    fast: dict[str, Any] = {}
    looks = _looks(options) | {"--fast": lambda: _what_fast_takes(fast)}
    for name, look in looks.items():
        has_torch = all(found.name != "torch" or found.status == "ok" for found in findings)
        with console.status(f"{name} ..."):
            found = (
                _looked(name, look)
                if has_torch or name not in _WITH_TORCH
                else Finding(name, "missing", "needs torch")
            )
        findings.append(found)
        line(f"{found.status:<8} {found.name:<15} {found.detail}", _STYLES[found.status])
    if fast:
        line("\n--fast would take here, with the default recipe:", "bold")
    for name, setting in fast.items():
        reason = f"  ({setting['reason']})" if setting["reason"] else ""
        line(f"{name:<12} {setting['value']}{reason}")
    broken = [found.name for found in findings if found.status == "broken"]
    if broken:
        line(f"\ninstalled, and does not work: {', '.join(broken)}", "bold red")
    if options.json:
        found_all = [asdict(found) for found in findings]
        print(strict_json.dumps({"findings": found_all, "fast": fast}, indent=2))
    return 1 if broken else 0


def _looks(options: DoctorOptions) -> dict[str, Callable[[], Finding]]:
    looks: dict[str, Callable[[], Finding]] = {
        "fastres": _fastres,
        "libraries": _libraries,
        "processor": _processor,
        "torch": _torch,
        "torchvision": lambda: _tried("torchvision", "torchvision", _TORCHVISION),
        "GPU": _gpu,
        "bf16": lambda: _tried("bf16", "torch", _BF16),
        "Triton": lambda: _tried("Triton", "triton", _TRITON),
        "DALI": lambda: _tried("DALI", "nvidia.dali", _DALI),
        "C++ compiler": _compiler,
        "CPU kernels": lambda: _tried("CPU kernels", "torch", _CPU_KERNELS),
    }
    if not options.quick:
        looks["torch.compile"] = _torch_compile
    return looks | {
        "cache": _cache,
        "data": lambda: _data(options.data_dir),
        "/dev/shm": _shared_memory,
    }


def _looked(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except FastresError as error:
        return Finding(name, "broken", str(error))
    except Exception as error:  # whatever is wrong with the machine is what is asked
        return Finding(name, "broken", f"{type(error).__name__}: {error}")


def _probe(code: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[1])
    before = os.environ.get("PYTHONPATH")
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{before}" if before else root}
    with tempfile.TemporaryDirectory() as folder:
        # In a file: Triton reads the source of a kernel again.
        file = Path(folder) / "probe.py"
        file.write_text(code)
        return subprocess.run(
            [sys.executable, str(file)], capture_output=True, text=True, timeout=_PROBE_S, env=env
        )


def _tried(name: str, module: str, code: str) -> Finding:
    """Run `code` if `module` is installed; its last line on stdout is the detail."""
    if not _is_installed(module):
        return Finding(name, "missing", "not installed")
    try:
        done = _probe(code)
    except subprocess.TimeoutExpired:
        return Finding(name, "broken", f"hung: stopped after {_PROBE_S:.0f} s")
    if done.returncode < 0:
        return Finding(name, "broken", f"killed by signal {-done.returncode}")
    if done.returncode:
        return Finding(name, "broken", _reason(done.stderr, done.returncode))
    lines = done.stdout.strip().splitlines() or [""]
    if lines[-1].startswith("missing: "):
        return Finding(name, "missing", lines[-1].removeprefix("missing: "))
    return Finding(name, "ok", lines[-1])


def _reason(stderr: str, exit_code: int) -> str:
    """Return the line that names the error: libraries print advice behind it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return (named or lines or [f"ended with exit code {exit_code}"])[-1]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _fastres() -> Finding:
    import fastres

    python = sys.version.split()[0]
    where = Path(fastres.__file__).parent
    return Finding(
        "fastres", "ok", f"{fastres.__version__}, commit {host.commit()}, Python {python}, {where}"
    )


def _libraries() -> Finding:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding("libraries", "ok", ", ".join(f"{name} {found[name]}" for name in found))


def _processor() -> Finding:
    about = host.describe_host()
    vectors = about["cpu_vectors"] or "no wide vectors"
    memory = "" if about["memory_gib"] is None else f", {about['memory_gib']:.0f} GiB of memory"
    detail = f"{about['cpu']}, {about['cores']} cores, {vectors}{memory}"
    return Finding("processor", "ok", detail)


def _torch() -> Finding:
    found = _tried("torch", "torch", _TORCH)
    return found if found.status == "ok" else Finding("torch", "broken", found.detail)


def _driver() -> str | None:
    """Return what nvidia-smi says of GPU and driver; None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not run: {error}"
    return "; ".join((done.stdout.strip() or done.stderr.strip()).splitlines())


def _gpu() -> Finding:
    driver, found = _driver(), _tried("GPU", "torch", _GPU)
    if found.status != "missing":
        return Finding("GPU", found.status, f"{found.detail}; driver: {driver or 'no nvidia-smi'}")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("GPU", "missing", "hidden by CUDA_VISIBLE_DEVICES")
    if driver is None:
        return Finding("GPU", "missing", "no NVIDIA GPU here, or no driver")
    return Finding("GPU", "broken", f"torch sees none; nvidia-smi: {driver}; {found.detail}")


def _compiler() -> Finding:
    from fastres.engine import machine

    found = machine.cxx_compiler()
    if found is None:
        return Finding(
            "C++ compiler", "missing", "g++ or clang++: torch.compile and the CPU kernels need one"
        )
    done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30)
    if done.returncode:
        return Finding("C++ compiler", "broken", _reason(done.stderr, done.returncode))
    return Finding("C++ compiler", "ok", done.stdout.split("\n")[0])


def _torch_compile() -> Finding:
    from fastres.engine import machine

    if machine.cxx_compiler() is None:
        return Finding("torch.compile", "missing", "needs a C++ compiler")
    return _tried("torch.compile", "torch", _COMPILE)


def _cache() -> Finding:
    folder = host.cache_folder()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return Finding("cache", "broken", f"cannot write into {nearest}: {error.strerror}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(nearest).free
    return Finding("cache", "ok", f"{folder}, {size / 1e6:,.0f} MB, {free / 1e9:,.1f} GB free")


def _data(data_dir: str | None) -> Finding:
    from fastres.data.source import load_dataset

    data = load_dataset("auto", data_dir, download=False)
    if data.name == "synthetic":
        return Finding("data", "missing", "no CIFAR and no image folder yet; training downloads it")
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images"
    return Finding("data", "ok", f"{data.name}, {sizes}, {data.source}")


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("/dev/shm", "missing", "--loader torch --workers needs it")
    free = shutil.disk_usage("/dev/shm").free / 2**20
    if free < _SHM_WANTED_MIB:
        detail = f"{free:,.0f} MiB free: little for --loader torch --workers (docker: --shm-size)"
        return Finding("/dev/shm", "missing", detail)
    return Finding("/dev/shm", "ok", f"{free:,.0f} MiB free")


def _what_fast_takes(settings: dict[str, Any]) -> Finding:
    """Fill `settings` with what --fast would set: {name: {"value": ..., "reason": ...}}."""
    found = _tried("--fast", "torch", _FAST)
    if found.status != "ok":
        return found
    settings.update(strict_json.loads(found.detail))
    values = (f"{name} {setting['value']}" for name, setting in settings.items())
    return Finding("--fast", "ok", ", ".join(values))


if __name__ == "__main__":
    sys.exit(main())
