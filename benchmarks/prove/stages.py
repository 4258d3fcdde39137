"""The parts of each stage of a proof, the most valuable first.

A first run on a GPU finds faults, and one that shows in minute 2 should not cost the others:

    look      what starts, what is right, where the time goes
    measure   routes and tiles, then the rows of the claims with what was chosen
    confirm   tests, other precisions, memory checks, whole trainings

Between them is time to repair and to choose. `cpu` is what a machine without a GPU can prove.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.prove.choose_tests import marked_for_gpus, usable_test_files
from benchmarks.prove.environment import is_installed
from benchmarks.prove.parts import PYTEST, ROOT, Part, Rehearsal, suite_part
from fastres.host import usable_cores

__all__ = ["STAGES", "Stage", "machine_part"]

NETWORKS = ("resnet20", "resnet18")
BATCH_SIZE = "512"
# The denominators of the claims, and what the fused step is built from.
_COMPARED = ("fast", "compile", "peer_compiled", "peer_amp", "amp", "eager", "fast_uncompiled")
# One file that cannot be imported here must not void the others.
_TESTS = (*PYTEST, "--continue-on-collection-errors")
_KERNEL_TESTS = ("tests/kernels/", "tests/model/test_fuse", "tests/engine/test_step")
_ROOFLINE_NEEDS = ("rich", "matplotlib", "tyro")


class Stage(NamedTuple):
    """One run: seconds that it states for all its parts together, and what makes them.

    parts takes the folder of the images, or None for the synthetic set.
    """

    budget: float
    parts: Callable[[Path | None], list[Part]]


def _once(network: str, rehearsal: Rehearsal) -> Rehearsal | None:
    """What is rehearsed of a part that every network has: that of the first."""
    return rehearsal if network == NETWORKS[0] else None


def machine_part() -> Part:
    """What the machine is: in every stage, before its parts."""
    command = ("benchmarks.prove.environment", "--out", "{OUT}/machine.json")
    return Part("machine", command, seconds=5, least=3)


def _compile(what: str, seconds: float, *words: str) -> Part:
    """Kernels of both networks, in as many processes as cores; nothing is timed beside it."""
    command = ("fastres.kernels.tools.warm", "--budget", "{SECONDS}", *words, "--jobs")
    return Part(
        f"compile {what}",
        (*command, str(max(1, usable_cores() - 2))),
        seconds,
        8,
        rehearsal=Rehearsal((*command, "2", "--models", "resnet20", "--arch", "sm_90")),
        needs=("triton",),
    )


def _parity_command(report: str, *words: str) -> tuple[str, ...]:
    files = ("--json", f"{{OUT}}/{report}.jsonl")
    return ("fastres.kernels.tools.parity", "--budget", "{SECONDS}", *files, *words)


def _parity(network: str, seconds: float, *, resumed: bool = False) -> Part:
    """Every product and every other kernel alone, against fp64 and twice.

    resumed: go on behind the check at which the part of this network crashed or hung.
    """
    words = ("--models", network, *(["--resume"] if resumed else []))
    command = _parity_command(f"parity_{network}", *words)
    # 64 channels of 8x8 pixels are the quickest to interpret.
    small = Rehearsal((*command, "--only", "h8w8c64k64"), is_interpreted=True)
    return Part(
        f"parity {network}{' resumed' if resumed else ''}",
        command,
        seconds,
        5 if resumed else 10,
        rehearsal=_once(network, small),
        needs=("triton",),
    )


def _other_precisions(seconds: float) -> Part:
    command = _parity_command("parity_precisions", "--models", "resnet20", "--dtypes")
    small = Rehearsal((*command, "fp32", "--only", "bn_stats/fp32"), is_interpreted=True)
    whole = (*command, "fp16", "tf32", "fp32")
    return Part("parity fp16 fp32", whole, seconds, 10, rehearsal=small, needs=("triton",))


def _of_step(name: str, network: str, seconds: float, module: str, *words: str) -> Part:
    """A command that takes the fast step of a network, without torch.compile around it."""
    command = (module, *words, "--model")
    small = Rehearsal((*command, "resnet8", "--batch-size", "8", "--steps", "2"))
    return Part(
        f"{name} {network}",
        (*command, network, "--batch-size", BATCH_SIZE, "--compile", "off"),
        seconds,
        8,
        rehearsal=_once(network, small),
    )


def _step_parity(network: str, seconds: float) -> Part:
    return _of_step("step parity", network, seconds, "benchmarks.prove.step_parity")


def _kernel_table(network: str, seconds: float) -> Part:
    module = "benchmarks.roofline.kernel_table"
    return _of_step("kernel table", network, seconds, module, "--out", "{OUT}")


def _sanitize(tool: str, seconds: float, *words: str) -> Part:
    """Kernels under compute-sanitizer: what failed in this stage, or what `words` choose."""
    command = ("benchmarks.prove.sanitize", "--tool", tool, *(words or ("--reports", "{OUT}")))
    name = tool if words else f"{tool} of what failed"
    return Part(name, command, seconds, 10, programs=("compute-sanitizer",))


def _step_times(network: str, seconds: float) -> Part:
    """The fused step in turns with torch.compile's and the plain ones."""
    case = f"bench_step[{network} batch {BATCH_SIZE}"
    providers = ("fast_uncompiled", "compile", "amp", "eager")
    return suite_part(
        "model",
        seconds,
        15,
        name=f"step times {network}",
        cases=tuple(f"{case}-{provider}]" for provider in providers),
        rehearsal=("-k", "bench_step and fast") if network == NETWORKS[0] else None,
    )


def _look(_data_dir: Path | None) -> list[Part]:
    return [
        _compile("kernels", 25, "--phases", "training", "checks"),
        _parity("resnet20", 25),
        _parity("resnet18", 25),
        # Where all went well these end at once, and what follows them has their time.
        _parity("resnet20", 12, resumed=True),
        _parity("resnet18", 12, resumed=True),
        _sanitize("memcheck", 20),
        _step_parity("resnet20", 12),
        _step_parity("resnet18", 12),
        _kernel_table("resnet20", 8),
        _kernel_table("resnet18", 8),
        # Last, since torch.compile takes what it is given, and all that is left over comes here.
        _step_times("resnet20", 18),
        _step_times("resnet18", 18),
    ]


def _ablation(network: str, seconds: float) -> Part:
    cases = tuple(f"bench_ablation[cuda {network}-{provider}]" for provider in _COMPARED)
    return suite_part(
        "model",
        seconds,
        20,
        name=f"ablation {network}",
        cases=cases,
        rehearsal=("-k", "bench_ablation"),
    )


def _inference(seconds: float) -> Part:
    providers = ("fast", "compile", "amp")
    cases = [
        f"bench_inference[{n} batch {BATCH_SIZE}-{p}]"
        for n in reversed(NETWORKS)
        for p in providers
    ]
    return suite_part(
        "model",
        seconds,
        15,
        name="inference",
        cases=tuple(cases),
        rehearsal=("-k", "bench_inference and (eager or fast)"),
    )


def _measure(_data_dir: Path | None) -> list[Part]:
    tune = ("fastres.kernels.tools.tune", "--budget", "{SECONDS}")
    return [
        _compile("steps and forms", 33, "--phases", "training", "inference", "forms"),
        _compile("dependent launches", 14, "--phases", "training", "--pdl", "on"),
        Part(
            "tune",
            (*tune, "--out", "{OUT}/launch_table.json"),
            55,
            25,
            rehearsal=Rehearsal((*tune, "--dry-run", "--models", "resnet20")),
            needs=("triton",),
        ),
        _kernel_table("resnet20", 8),
        _kernel_table("resnet18", 8),
        # Three providers of an ablation, and two of inference, are compiled before any is timed.
        _ablation("resnet20", 42),
        _ablation("resnet18", 42),
        _inference(23),
    ]


def _max_autotune(seconds: float) -> Part:
    """Against the best that torch.compile finds, which takes it minutes."""
    ladder = ("fast", "fast_uncompiled", "peer_compiled", "peer_max_autotune")
    inference = ("fast", "compile", "max_autotune")
    return suite_part(
        "model",
        seconds,
        60,
        name="max-autotune resnet18",
        cases=(
            *(f"bench_ablation[autotuned resnet18-{provider}]" for provider in ladder),
            *(f"bench_inference[resnet18 batch {BATCH_SIZE}-{provider}]" for provider in inference),
        ),
        marks="slow or not slow",
    )


def _gpu_tests(seconds: float) -> Part:
    files, notes = usable_test_files(ROOT / "tests")
    names = [path.relative_to(ROOT).as_posix() for path in files if marked_for_gpus(path)]
    # Compiling kernels takes most of their time, and shares the GPU well.
    workers = ("-n", str(max(1, usable_cores() - 2)), "--dist", "worksteal")
    chosen = (*(workers if is_installed("xdist") else ()), "-m", "gpu and not slow")
    # Without a GPU every one of them skips itself.
    rehearsal = Rehearsal((*_TESTS, "-m", "gpu and not slow", "tests/kernels/test_block.py"))
    return Part("GPU tests", (*_TESTS, *chosen, *names), seconds, 20, rehearsal, notes=notes)


def _train(name: str, seconds: float, data_dir: Path | None, *words: str) -> Part:
    """A whole training, with its run folder among the results."""
    source = ("--dataset", "synthetic") if data_dir is None else ("--data-dir", str(data_dir))
    out = ("--out", f"{{OUT}}/runs/{name}", "--overwrite")
    # Whether torch.compile around the fused kernels pays is what `measure` tells.
    command = ("fastres.train", "--fast", "--compile", "off", *source, *out)
    small = ("--model", "resnet8", "--limit-train", "100", "--epochs", "1", "--batch-size", "50")
    rehearsal = Rehearsal((*command, *small))
    return Part(f"train {name}", (*command, *words), seconds, 15, rehearsal, needs=("tyro",))


def _time_to_accuracy(seconds: float, images: tuple[str, ...]) -> Part:
    """The recipe `speed`, by 20 seeds; rows are written after each of them."""
    command = ("benchmarks.prove.time_to_accuracy", "--recipe", "speed", "--out", "{OUT}", *images)
    small = ("model=resnet8", "limit_train=100", "epochs=1", "batch_size=50")
    changes = tuple(word for value in small for word in ("--set", value))
    rehearsal = Rehearsal((*command, "--runs", "2", *changes))
    return Part("time to accuracy", (*command, "--runs", "20"), seconds, 15, rehearsal)


def _decode(seconds: float, data_dir: Path | None) -> list[Part]:
    """Images are read once beforehand, so that no measurement waits for them."""
    if data_dir is None:
        return []
    command = ("fastres.train", "--dry-run", "--data-dir", str(data_dir))
    return [Part("data", command, seconds, 10, rehearsal=Rehearsal(command), needs=("tyro",))]


def _confirm(data_dir: Path | None) -> list[Part]:
    images = () if data_dir is None else ("--data-dir", str(data_dir))
    curves = ("benchmarks.prove.loss_curves", "--out", "{OUT}", "--compile", "off", *images)
    return [
        *_decode(15, data_dir),
        _compile("recipes", 12, "--phases", "training", "--batches", "128", "256"),
        _compile("evaluation", 8, "--phases", "inference", "--batches", "1000"),
        _gpu_tests(45),
        Part(
            "loss curves",
            (*curves, "--model", "resnet20", "--steps", "200", "--batch-size", BATCH_SIZE),
            15,
            10,
            Rehearsal((*curves, "--model", "resnet8", "--steps", "4", "--batch-size", "8")),
        ),
        _train("quick", 20, data_dir),
        _time_to_accuracy(45, images),
        # Half and a tenth of the recipes' epochs: the whole of them takes longer.
        _train("standard", 15, data_dir, "--recipe", "standard", "--epochs", "30"),
        _train("accurate", 20, data_dir, "--recipe", "accurate", "--epochs", "20"),
        _other_precisions(15),
        _sanitize("memcheck", 20, "--all", "--budget", "{SECONDS}"),
        _sanitize("racecheck", 20, "--all", "--budget", "{SECONDS}"),
        suite_part("loaders", 15, 10, rehearsal=("-k", "bench_")),
        _max_autotune(75),
    ]


def _roofline(model: str, batch_size: int, seconds: float) -> Part:
    """The roofline of an ablation's case; a suite's share of it is counted from its peak rates."""
    case = ("--model", model, "--batch-size", str(batch_size), "--seconds", "{SECONDS}")
    files = ("--results", "{OUT}", "--out", f"{{OUT}}/roofline_{model}.png")
    command = ("benchmarks.roofline", *case, *files)
    return Part(f"roofline {model}", command, seconds, 15, needs=_ROOFLINE_NEEDS)


def _cpu(data_dir: Path | None) -> list[Part]:
    files, notes = usable_test_files(ROOT / "tests")
    names = [path.relative_to(ROOT).as_posix() for path in files]
    kernels = [name for name in names if name.startswith(_KERNEL_TESTS)]
    parity = (*_TESTS, "-m", "not gpu and not slow", *kernels)
    return [
        *_decode(45, data_dir),
        Part("parity", parity, 65, 8, notes=notes),
        _roofline("resnet20", 128, 45),
        suite_part("model", 130, 20, quick_below=90),
        suite_part("ops", 85, 20, quick_below=60),
        suite_part("loaders", 45, 15, quick_below=40),
        suite_part("train", 85, 25, quick_below=90),
        _roofline("resnet18", 64, 45),
    ]


# In the order in which they run.
STAGES = {
    "look": Stage(200, _look),
    "measure": Stage(230, _measure),
    "confirm": Stage(345, _confirm),
    "cpu": Stage(550, _cpu),
}
