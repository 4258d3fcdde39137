"""What the parity command checks of convolutions: every product of every layer, alone.

    fprop        the product with its prologue and the statistics of y
    dgrad        dx with its prologue, the mask or the shortcut and the sums of the batch norm
    wgrad        dw of operands as training has them: formed, or stored for both gradients
    dgrad+wgrad  both in one launch, where that is the form

in every variant that training has. Before them come the two of which nobody knew whether a GPU
computes them at all: products of a pipelined loop whose operand a prologue forms in registers, and
tensor descriptors of rank 4, in a CUDA graph too.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fastres.kernels.conv_shape import ConvOp, ConvShape
from fastres.kernels.gpu import backend as gpu_backend
from fastres.kernels.gpu.batchnorm_fwd import bn_apply
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_table import conv_config
from fastres.kernels.reference import backend as reference_backend
from fastres.kernels.reference.block import bn_apply_ref
from fastres.kernels.tools.candidates import (
    STARTS,
    GpuLimits,
    Product,
    im2col_start,
    product_of,
    start_configs,
)
from fastres.kernels.tools.networks import Precision
from fastres.kernels.tools.parity_check import Check
from fastres.kernels.tools.tune_workloads import (
    ConvCase,
    ConvVariant,
    ConvWorkload,
    conv_outcome,
    input_grads,
    make_case,
)

__all__ = ["Forms", "LayerConfigs", "first_checks", "product_checks"]

Forms = Literal["chosen", "all"]

OPS: tuple[ConvOp, ...] = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class LayerConfigs:
    """Which configurations a layer's products are checked in.

    chosen: what training takes, by product. tried: those and, if asked for, the start of every
    other form and cuDNN.
    """

    chosen: Mapping[ConvOp, ConvConfig]
    tried: Mapping[ConvOp, Sequence[ConvConfig]]

    @classmethod
    def of(
        cls, workload: ConvWorkload, forms: Forms, device: torch.device, gpu: GpuLimits
    ) -> "LayerConfigs":
        """Those of a layer on a device."""
        precision = workload.precision
        chosen = {
            op: conv_config(op, workload.shape, precision.dtype, device, tf32=precision.tf32)
            for op in OPS
        }
        tried: dict[ConvOp, Sequence[ConvConfig]] = {op: [chosen[op]] for op in OPS}
        if forms == "all":
            for op in OPS:
                product = product_of(op, workload)
                cudnn = replace(im2col_start(product), route="cudnn")
                tried[op] = [*dict.fromkeys([chosen[op], *start_configs(product, gpu), cudnn])]
        return cls(chosen, tried)


@dataclass(frozen=True)
class _Layer:
    """A layer of a network with some images, and how its checks are named."""

    workload: ConvWorkload
    precision_name: str
    shape: ConvShape

    @property
    def precision(self) -> Precision:
        return self.workload.precision

    def product(self, op: ConvOp) -> Product:
        return product_of(op, self.workload)

    def check(
        self,
        op: str,
        variant: ConvVariant,
        configs: Mapping[ConvOp, ConvConfig],
        compute: Callable[[ConvCase], dict[str, Tensor]],
        *,
        prefix: str = "",
        in_graph: bool = False,
    ) -> Check:
        """One product of one variant; `configs` are those that its name tells."""
        # dw knows nothing of the shortcut.
        words = ["prologue"] if op == "wgrad" else ["prologue", "shortcut"]
        words = [word for word in words if getattr(variant, word)]
        parts = [
            *filter(None, [prefix]),
            op,
            self.precision_name,
            self.shape.layer_key,
            "+".join(words) or "plain",
            "+".join(map(_form, configs.values())),
            *(["graph"] if in_graph else []),
        ]
        return Check(
            name="/".join(parts),
            label=", ".join(f"{c.route} {c.label}" for c in configs.values()),
            precision=self.precision,
            make=functools.partial(_make, self.shape, variant, self.precision.dtype),
            compute=compute,
            plain=_plain_forward if op == "fprop" else _plain_backward,
            same_as=(op == "fprop", self.shape, self.precision, variant),
            entries={self.product(op).key: config for op, config in configs.items()},
            in_graph=in_graph,
        )


def _form(config: ConvConfig) -> str:
    """The form of a configuration, in one word."""
    if config.route == "cudnn":
        return "cudnn"
    return f"{config.form}-stored" if config.stored else config.form


def _make(
    shape: ConvShape, variant: ConvVariant, dtype: torch.dtype, device: torch.device, seed: int
) -> ConvCase:
    return make_case(shape, variant, dtype, device, seed)


def _plain_forward(case: ConvCase) -> dict[str, Tensor]:
    return conv_outcome(case, "forward", reference_backend)


def _plain_backward(case: ConvCase) -> dict[str, Tensor]:
    outcome = conv_outcome(case, "backward", reference_backend)
    if case.producer is not None:
        outcome["activation"] = bn_apply_ref(case.x, case.producer.scale_shift)
    return outcome


def _fprop(case: ConvCase) -> dict[str, Tensor]:
    return conv_outcome(case, "forward", gpu_backend)


def _both(case: ConvCase) -> dict[str, Tensor]:
    return conv_outcome(case, "backward", gpu_backend)


def _dgrad(dgrad: ConvConfig, wgrad: ConvConfig, case: ConvCase) -> dict[str, Tensor]:
    """dx beside this wgrad, and what its kernel stores for it."""
    dy, activation = gpu_backend.shared_operands(case.dy, case.x, case.producer, dgrad, wgrad)
    dx, producer = gpu_backend.input_gradient(
        dy,
        case.x,
        case.layer,
        case.producer,
        case.producer_weight,
        case.shortcut,
        activation,
        dgrad,
    )
    stored = {} if activation is None else {"activation": activation}
    return input_grads(dx, producer) | stored


def _wgrad(dgrad: ConvConfig | None, wgrad: ConvConfig, case: ConvCase) -> dict[str, Tensor]:
    """dw of what this dgrad leaves it; None: of what no other gradient reads."""
    x, producer = case.x, case.producer
    dy, activation = gpu_backend.shared_operands(case.dy, x, producer, dgrad or wgrad, wgrad)
    if activation is not None and producer is not None:
        x, producer = bn_apply(x, producer.scale_shift), None
    return {"dw": gpu_backend.filter_gradient(dy, x, case.layer, producer, wgrad)}


def product_checks(
    workload: ConvWorkload, precision_name: str, batch: int, configs: LayerConfigs
) -> Iterator[Check]:
    """The products of a layer, one after the other, in the variants that training has of them.

    Args:
        workload: the layer, with as many images as its configurations are chosen for.
        precision_name: key of PRECISIONS.
        batch: images of the check.
        configs: what is checked.
    """
    layer = _Layer(workload, precision_name, replace(workload.shape, N=batch))
    variants = list(workload.variants)
    if workload.shape.stride > 1:
        # One of the two that read the input of a block adds what the other left: either may.
        variants += [v._replace(shortcut=not v.shortcut) for v in variants if v.need_dx]
    # Whether the shortcut's gradient is added later makes no difference to y.
    for variant in {v.prologue: v for v in variants}.values():
        for config in configs.tried["fprop"]:
            yield layer.check("fprop", variant._replace(shortcut=False), {"fprop": config}, _fprop)
    for variant in variants:
        yield from _backward_checks(layer, variant, configs)


def _backward_checks(layer: _Layer, variant: ConvVariant, configs: LayerConfigs) -> Iterator[Check]:
    chosen_dgrad, chosen_wgrad = configs.chosen["dgrad"], configs.chosen["wgrad"]
    is_fused = chosen_dgrad.form == "fused" and chosen_dgrad.route == "triton"
    for config in configs.tried["dgrad"] if variant.need_dx else ():
        if config.form == "fused" and config.route == "triton":
            both: dict[ConvOp, ConvConfig] = {"dgrad": config, "wgrad": chosen_wgrad}
            check = layer.check("dgrad+wgrad", variant, both, _both)
            # The second says what is taken where the first cannot compute: it is not run.
            name = check.name.rpartition("/")[0] + "/fused"
            yield replace(check, name=name, label=f"triton {config.label}")
            continue
        compute = functools.partial(_dgrad, config, chosen_wgrad)
        yield layer.check("dgrad", variant, {"dgrad": config}, compute)
    # Where one launch computes both, training has no wgrad alone.
    if is_fused and variant.need_dx and len(configs.tried["wgrad"]) == 1:
        return
    for config in configs.tried["wgrad"]:
        dgrad = chosen_dgrad if variant.need_dx and not is_fused else None
        compute = functools.partial(_wgrad, dgrad, config)
        yield layer.check("wgrad", variant, {"wgrad": config}, compute)


def first_checks(
    workloads: Sequence[tuple[ConvWorkload, str]], batch: int, gpu: GpuLimits
) -> Iterator[Check]:
    """What was unknown, each of the first layer that has it.

    Args:
        workloads: layers with the names of their precisions, those that matter most first.
        batch: images.
        gpu: whether it has TMA.
    """
    layers = [_Layer(w, name, replace(w.shape, N=batch)) for w, name in workloads]
    masked = ConvVariant(prologue=True, shortcut=False, need_dx=True)
    for layer in [layer for layer in layers if masked in layer.workload.variants][:1]:
        for op in OPS:
            start = im2col_start(layer.product(op))
            config = replace(start, num_stages=max(2, start.num_stages))
            prefix = "pipelined-register-operand"
            yield layer.check(op, masked, {op: config}, _compute(op, config), prefix=prefix)
    if not gpu.has_tma:
        return
    plain = masked._replace(prologue=False)
    for op in OPS[:2]:
        found = [(layer, STARTS["tma"](layer.product(op))) for layer in layers]
        for layer, start in [(layer, start) for layer, start in found if start is not None][:1]:
            assert start is not None
            for variant, in_graph in ((plain, False), (masked, False), (masked, True)):
                yield layer.check(
                    op,
                    variant,
                    {op: replace(start, stored=False)},
                    _compute(op, replace(start, stored=False)),
                    prefix="tma-rank-4",
                    in_graph=in_graph,
                )


def _compute(op: ConvOp, config: ConvConfig) -> Callable[[ConvCase], dict[str, Tensor]]:
    """One product alone, its operands formed."""
    if op == "fprop":
        return _fprop
    if op == "wgrad":
        return functools.partial(_wgrad, None, config)
    return functools.partial(_dgrad, config, config)
