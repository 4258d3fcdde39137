"""Programmatic dependent launch (PDL): every kernel waits first, and who decides whether to use it.

Kernels are interpreted in the test process, so they are compiled in another one, which this file is
the program of.
"""

import ast
import functools
import json
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu import launch as launch_module
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.cross_entropy import smooth_cross_entropy_fwd
from fastres.kernels.gpu.launch import Traffic, launch, recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import strip_config
from fastres.kernels.gpu.launch_table import Gpu, assume_gpu, force_pdl, uses_pdl
from fastres.kernels.gpu.table_file import read_table
from fastres.kernels.tools.codegen_report import plan_entries
from fastres.kernels.tools.machine_code import Build, disassemble, to_build
from fastres.kernels.tools.table_writer import merge_table
from tests.helpers.compiling import run_compiling
from tests.helpers.interpreter import HAS_GPU
from tests.helpers.launch_tables import use_table

__all__ = ["use_table"]

REPO = Path(__file__).resolve().parents[2]
SOURCES = sorted((REPO / "kernels" / "gpu").rglob("*.py"))
GPU = torch.device("cuda", 0)

# Whatever reads or writes global memory, or says something about the kernels before and after.
PTX = r"griddepcontrol\.\w+|\b(?:ld|st|red|atom)\.global|cp\.async(?:\.bulk\.tensor|\.c[ag])"
SASS = r"\b(?:ACQBULK|PREEXIT|LDG|LDGSTS|STG|RED|ATOMG?|UTMALDG|UTMASTG)\b"


@functools.cache
def kernels():
    """The syntax tree of every kernel, by name."""
    return {
        node.name: node
        for path in SOURCES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and re.fullmatch(r"_\w+_kernel", node.name)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


@pytest.mark.parametrize("name", kernels())
def test_every_kernel_waits_first(name):
    node = kernels()[name]
    parameters = {a.arg: a.annotation and ast.unparse(a.annotation) for a in node.args.args}
    assert parameters.get("PDL") == "tl.constexpr"
    assert ast.unparse(node.body[0]) == "wait_for_previous_kernel(PDL)"


def one_build_a_kernel():
    """A build of every kernel, by name."""
    plans = plan_entries("sm_90", "resnet20", "bf16", 512, ["training", "inference"])
    builds = {plan.build.kernel: plan.build for plan in plans}
    with recording() as launches:
        # More classes than one tile of logits holds.
        smooth_cross_entropy_fwd(
            torch.empty(512, 1000, device="meta"),
            torch.empty(512, dtype=torch.int64, device="meta"),
            0.1,
        )
        # Of 16 channels both gradients share a launch, unless one is wanted alone.
        g, w = (
            torch.empty(size, dtype=torch.bfloat16, device="meta").to(
                memory_format=torch.channels_last
            )
            for size in ((512, 16, 32, 32), (16, 16, 3, 3))
        )
        config = strip_config("dgrad", ConvShape(512, 32, 32, 16, 16), torch.bfloat16)
        conv_dgrad(g, w, (32, 32), padding=1, config=config)
    return builds | {launch.kernel.fn.__name__: to_build(launch, 90) for launch in launches}


def memory_accesses(build: Build, pdl: bool):
    """What PTX and machine code do with memory and other kernels, in the order of the text."""
    compiled = replace(build, args={**build.args, "PDL": pdl}).run_launcher()
    sass, _ = disassemble(compiled.asm["cubin"])
    return re.findall(PTX, compiled.asm["ptx"]), re.findall(SASS, sass)


def main() -> int:
    builds = one_build_a_kernel()
    codes = {name: memory_accesses(build, True) for name, build in builds.items()}
    without = memory_accesses(builds["_bn_apply_kernel"], False)
    print(json.dumps({"with": codes, "without": without}))
    return 0


@pytest.fixture(scope="module")
def codes():
    return run_compiling(__file__)


@pytest.mark.parametrize("name", kernels())
def test_no_access_to_memory_is_compiled_before_the_wait(codes, name):
    ptx, sass = codes["with"][name]
    assert ptx[:2] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    assert sass[:2] == ["ACQBULK", "PREEXIT"]
    for found in (ptx, sass):
        assert len(found) > 2
        assert not {*found[:2]} & {*found[2:]}


def test_without_it_no_kernel_waits(codes):
    ptx, sass = codes["without"]
    assert not [word for word in ptx if word.startswith("griddepcontrol")]
    assert not {"ACQBULK", "PREEXIT"} & {*sass}


OWN = Gpu("test", (9, 0))
SIBLING, AMPERE, OLDER = Gpu("other", (9, 0)), Gpu("test", (8, 0)), Gpu("older", (8, 0))


@pytest.mark.parametrize(
    ("gpu", "table", "forced", "wanted"),
    [
        (OWN, {}, None, False),
        (OWN, {OLDER: True}, None, False),
        (OWN, {OWN: False}, None, False),
        (OWN, {OWN: True}, None, True),
        (OWN, {SIBLING: True}, None, True),
        (OWN, {SIBLING: True, OWN: False}, None, False),
        (OWN, {SIBLING: True, OWN: None}, None, True),
        (Gpu("test", (10, 0)), {SIBLING: True}, None, False),
        (OWN, {OWN: True}, False, False),
        (OWN, {}, True, True),
        (AMPERE, {AMPERE: True}, None, False),
        (AMPERE, {}, True, False),
    ],
)
def test_the_table_decides_unless_forced_where_a_gpu_has_it(use_table, gpu, table, forced, wanted):
    """A GPU's own choice, else that of one of its compute capability."""
    use_table(*((of, "measured", {}, pdl) for of, pdl in table.items()))
    with assume_gpu(gpu), nullcontext() if forced is None else force_pdl(forced):
        assert uses_pdl(GPU) is wanted


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_gpus_use_it(device):
    with force_pdl(True):
        assert not uses_pdl(torch.device(device))


@pytest.mark.parametrize("pdl", [[], 1, "on"])
def test_a_bad_switch_is_refused(use_table, pdl):
    path = use_table((OWN, "measured", {}, pdl))
    with pytest.raises(ValueError, match=r"^table\.json: pdl must be true or false, got "):
        read_table(path)


def test_tuning_keeps_the_switch(use_table):
    path = use_table((OWN, "measured", {}, True))
    key = "fprop/bfloat16/n1/h1w1c1k1r1s1u1p0"
    merge_table(path, OWN, {key: ConvConfig(16, 16, 16, 1, 1)}, {})
    assert read_table(path).gpus["test"].pdl is True


@pytest.mark.parametrize("pdl", [True, False])
def test_a_launch_tells_the_kernel_and_triton(pdl, monkeypatch):
    started = []

    class Kernel(SimpleNamespace):
        def __getitem__(self, grid):
            return lambda **kwargs: started.append(kwargs)

    monkeypatch.setattr(launch_module, "uses_pdl", lambda device: pdl)
    x = torch.zeros(1)
    traffic = Traffic(reads=4, writes=0)
    with recording() as launches:
        launch(Kernel(__name__="k"), (1,), {"x": x}, num_warps=1, num_stages=1, traffic=traffic)
    assert launches[0].args["PDL"] is pdl
    (kwargs,) = started
    assert kwargs == {"x": x, "PDL": pdl, "num_warps": 1, "num_stages": 1, "launch_pdl": pdl}


@pytest.mark.skipif(HAS_GPU, reason="a GPU compiles its kernels")
def test_triton_offers_what_the_launch_and_the_wait_use():
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.language.extra import cuda

    assert "launch_pdl" in CUDAOptions.__dataclass_fields__
    assert {"gdc_wait", "gdc_launch_dependents"} <= {*cuda.__all__}


if __name__ == "__main__":
    sys.exit(main())
