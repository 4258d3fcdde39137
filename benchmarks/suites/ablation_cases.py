"""Which ladders are trained with data flowing, by whom, and the command lines of the processes."""

import functools
from dataclasses import dataclass

import torch

import fastres
from benchmarks.harness import ablation
from benchmarks.harness.ablation import Unavailable, here, low_precision, why_not
from fastres.data.dataset import Dataset

__all__ = ["CASES", "OFTEN", "PEERS", "AblationCase", "data_arguments", "load_data"]

# Their modules, with words of their command lines.
PEERS = {
    "peer_fp32": ("benchmarks.peers.eager_fp32",),
    "peer_amp": ("benchmarks.peers.eager_amp",),
    "peer_compiled": ("benchmarks.peers.compiled",),
    "peer_max_autotune": ("benchmarks.peers.compiled", "--mode", "max-autotune"),
}
# Those whose ratio is claimed somewhere: they train in every turn, the others in every third.
OFTEN = {
    "cpu": ("peer_fp32", "amp", "fast"),
    "cuda": ("fast", "compile", "peer_compiled", "amp"),
}
_ALL = (*PEERS, *ablation.CONFIGURATIONS)
_COMPILED = ("peer_compiled", "compile")
# It searches for minutes, so it has a ladder of its own.
_AUTOTUNED = "peer_max_autotune"
_CUDA = tuple(provider for provider in _ALL if provider != _AUTOTUNED)


@dataclass(frozen=True)
class AblationCase:
    """One ladder.

    Attributes:
        name: of the case among the tests, where `-k cpu` selects by it.
        device, model, batch_size: what trains.
        steps: in a round.
        seconds: that it wants of the budget, starting the processes included.
        providers: who takes part.
        quick: whether it belongs to --quick, and to nothing else.
        slow: whether it is measured by `-m slow` alone.
    """

    name: str
    device: str
    model: str
    batch_size: int
    steps: int
    seconds: float
    providers: tuple[str, ...]
    quick: bool = False
    slow: bool = False

    @property
    def words(self) -> str:
        """The case of its rows, without the data."""
        compiled = ", torch.compile" if self.slow else ""
        return f"{self.device} {self.model} batch {self.batch_size}{compiled}"

    def command(self, provider: str, data_dir: str | None) -> tuple[str, list[str]]:
        """Return module and arguments of the process of a provider.

        Raises:
            Unavailable: where the provider cannot be had.
        """
        _refuse(provider, self.device)
        words = data_arguments(self.device, self.model, self.batch_size, self.steps, data_dir)
        if provider in PEERS:
            module, *mode = PEERS[provider]
            return module, [*mode, *words]
        return "benchmarks.suites.ablation_worker", ["--configuration", provider, *words]


# A CPU compiles ResNet-20 for a minute: torch.compile has a ladder of its own there, and the other
# is repeated in three minutes. A step of ResNet-18 takes a CPU a second, so few climb it.
CASES = (
    AblationCase(
        "cpu resnet20", "cpu", "resnet20", 128, 4, 60,
        tuple(provider for provider in _CUDA if provider not in _COMPILED),
    ),
    AblationCase(
        "cpu resnet18", "cpu", "resnet18", 64, 1, 45,
        ("peer_fp32", "channels_last", "amp", "fused", "fast"),
    ),
    AblationCase(
        "compiled resnet20", "cpu", "resnet20", 128, 4, 180,
        ("peer_fp32", "amp", *_COMPILED, "fast"), slow=True,
    ),
    AblationCase("cuda resnet20", "cuda", "resnet20", 512, 40, 45, _CUDA),
    AblationCase("cuda resnet18", "cuda", "resnet18", 512, 20, 45, _CUDA),
    *(
        AblationCase(
            f"autotuned {model}", "cuda", model, 512, 20, 300,
            ("fast", "fast_uncompiled", *_COMPILED, _AUTOTUNED), slow=True,
        )
        for model in ("resnet20", "resnet18")
    ),
    AblationCase("resnet8", here().type, "resnet8", 64, 2, 10, ("peer_fp32", "fast"), quick=True),
)  # fmt: skip


def _refuse(provider: str, device: str) -> None:
    """Raise Unavailable where a provider of a ladder cannot be had."""
    on_gpu = here().type == "cuda"
    if device == "cuda" and not on_gpu:
        raise Unavailable("needs an NVIDIA GPU")
    if device == "cpu" and on_gpu:
        raise Unavailable("hide the GPU with CUDA_VISIBLE_DEVICES= to see the CPU's ladder")
    if provider in ("peer_compiled", _AUTOTUNED):
        reason = why_not("compile", torch.device(device))
        if reason:
            raise Unavailable(reason)
    if provider in ablation.CONFIGURATIONS:
        ablation.make_config(provider, torch.device(device))
    elif provider != "peer_fp32" and device == "cpu":
        low_precision(torch.device(device))


def data_arguments(
    device: str, model: str, batch_size: int, steps: int, data_dir: str | None
) -> list[str]:
    """The command line that every provider of a ladder understands."""
    words = ["--device", device, "--model", model, "--batch-size", str(batch_size)]
    words += ["--rounds", str(steps)]
    return [*words, "--data-dir", data_dir] if data_dir else words


@functools.lru_cache(maxsize=1)
def load_data(data_dir: str | None) -> Dataset:
    """The dataset of all suites: that in `data_dir`, or the synthetic one."""
    return fastres.load_dataset("auto" if data_dir else "synthetic", data_dir)
