"""The checks of the parity command in their order: what tells most comes first.

The unknowns, then every product of every layer, those of the layers that move most bytes first;
every other kernel; blocks, forward and backward; whole networks, at last in a CUDA graph.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.tools.candidates import gpu_limits, product_of
from fastres.kernels.tools.networks import PRECISIONS, NamedBlock, network_blocks
from fastres.kernels.tools.parity_check import Check
from fastres.kernels.tools.parity_convs import Forms, LayerConfigs, first_checks, product_checks
from fastres.kernels.tools.parity_kernels import kernel_checks
from fastres.kernels.tools.tune_pdl import NetworkStep, blocks_step
from fastres.kernels.tools.tune_workloads import conv_workloads

__all__ = ["plan_checks"]


def plan_checks(
    networks: Sequence[str],
    batch: int,
    chosen_batch: int,
    precisions: Sequence[str],
    forms: Forms,
    device: torch.device,
) -> list[Check]:
    """All checks, each once.

    Args:
        networks: keys of NETWORKS.
        batch: images of each check.
        chosen_batch: images of the training whose configurations are checked.
        precisions: keys of PRECISIONS.
        forms: "chosen": the configurations of training; "all": every form.
        device: for whose launch table and rules.
    """
    gpu = gpu_limits(device)
    workloads = [
        (workload, name)
        for name in precisions
        for workload in conv_workloads(networks, [chosen_batch], [PRECISIONS[name]])
    ]
    configs = [LayerConfigs.of(workload, forms, device, gpu) for workload, _ in workloads]
    entries = {
        product_of(op, workload).key: config
        for (workload, _), of_layer in zip(workloads, configs, strict=True)
        for op, config in of_layer.chosen.items()
    }
    checks = [*first_checks(workloads, batch, gpu)]
    for (workload, name), of_layer in zip(workloads, configs, strict=True):
        checks += product_checks(workload, name, batch, of_layer)
    pairs = [(network, name) for network in networks for name in precisions]
    for network, name in pairs:
        checks += kernel_checks(network, batch, name, entries)
    for network, name in pairs:
        checks += _block_checks(network, batch, name, entries)
    for network, name in pairs:
        checks += _network_checks(network, batch, name, entries)
    return [*{(check.name, check.label): check for check in checks}.values()]


def _block_checks(
    network: str, batch: int, precision: str, entries: Mapping[str, ConvConfig]
) -> Iterator[Check]:
    """Every kind of block of a network, forward and backward; two in a row without a last ReLU."""
    blocks, kind = network_blocks(network, batch), f"block/{precision}/{network}"
    for block in blocks:
        yield _step_check(f"{kind}/{block.name.replace(' ', '-')}", [block], precision, entries)
    first = [block for block in blocks if block.shortcut != "none"][:2]
    yield _step_check(f"{kind}/no-last-relu", first, precision, entries, relu=False)


def _network_checks(
    network: str, batch: int, precision: str, entries: Mapping[str, ConvConfig]
) -> Iterator[Check]:
    """All blocks of a network in a row, forward and backward; then in a CUDA graph."""
    blocks = [b for b in network_blocks(network, batch) for _ in range(b.count)]
    name = f"network/{precision}/{network}"
    check = _step_check(name, blocks, precision, entries)
    yield replace(check, pooled=True)
    yield replace(check, name=f"{name}/graph", pooled=True, in_graph=True)


def _step_check(
    name: str,
    blocks: Sequence[NamedBlock],
    precision: str,
    entries: Mapping[str, ConvConfig],
    *,
    relu: bool = True,
) -> Check:
    def make(device: torch.device, seed: int) -> NetworkStep:
        step = blocks_step(blocks, PRECISIONS[precision], device, seed)
        return replace(step, blocks=tuple((b._replace(relu=relu), dx) for b, dx in step.blocks))

    return Check(
        name=name,
        label="",
        precision=PRECISIONS[precision],
        make=make,
        compute=functools.partial(NetworkStep.outcome, backend=gpu_backend),
        plain=functools.partial(NetworkStep.outcome, backend=reference_backend),
        same_as=name,
        entries=entries,
        has_relu=True,
    )
