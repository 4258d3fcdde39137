"""The codegen report: what the kernels of real networks compile to, and the command that prints it.

Kernels are interpreted in the test process, so they are compiled in another one, which this file
is the program of: one launch of each variant of each kernel for some GPUs. The slow test compiles
all launches of all layers, through the command.
"""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from fastres.host import usable_cores
from fastres.kernels.gpu.conv_fprop import conv_fprop
from fastres.kernels.gpu.launch import Launch, Traffic, recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.tools import codegen, codegen_report, compile_pool
from fastres.kernels.tools.codegen_report import (
    CodegenEntry,
    Plan,
    compile_entries,
    plan_entries,
)
from fastres.kernels.tools.control_flow import ProgramCount
from fastres.kernels.tools.machine_code import MachineCode, compile_launch
from fastres.kernels.tools.network_launches import network_launches
from fastres.kernels.tools.networks import (
    MAX_BATCH,
    NETWORKS,
    PRECISIONS,
    network_blocks,
    network_convs,
)
from fastres.kernels.tools.peak_rates import PEAK_RATES
from tests.helpers.interpreter import HAS_GPU

REPO = Path(__file__).resolve().parents[2]

# GPU, precision, network, whether the convolutions alone. The narrow network has the tiles of 16
# channels, where a tensor core is easily missed; the wide one those that need most registers.
GROUPS = {
    "narrow sm_90 bf16": ("sm_90", "bf16", "resnet20", False),
    "wide sm_90 bf16": ("sm_90", "bf16", "resnet18", True),
    "narrow sm_100 bf16": ("sm_100", "bf16", "resnet20", True),
    "wide sm_80 fp16": ("sm_80", "fp16", "resnet18", True),
}

# Registers cannot hold the widest tiles, and 16 pixels are too few for a warpgroup's product.
BAD = {
    "spills": ConvConfig(256, 256, 64, 4, 2),
    "no tensor-core instruction of sm_90": ConvConfig(16, 16, 32, 4, 2),
    "read 32 bits wide": ConvConfig(16, 16, 16, 4, 2),
}

KERNELS = {
    "augment_normalize",
    "bn_apply",
    "bn_backward_apply",
    "bn_backward_reduce",
    "bn_stats",
    "add_to_totals",
    "conv_backward",
    "conv_dgrad",
    "conv_dgrad_pixel",
    "conv_dgrad_tma",
    "conv_fprop",
    "conv_fprop_pixel",
    "conv_fprop_tma",
    "conv_strip_fprop",
    "conv_strip_wgrad",
    "conv_wgrad",
    "conv_wgrad_pixel",
    "pool_linear_bwd",
    "pool_linear_fwd",
    "running_stats",
    "sgd",
    "smooth_cross_entropy_bwd",
    "smooth_cross_entropy_fwd",
}

# sm_86, sm_89 and sm_120 run what sm_80 runs (mma.sync) and give a program 99 KiB. The code of
# sm_90 and sm_100 runs on GPUs of 228 KiB a multiprocessor alone, 1 KiB of it reserved for each
# program: with 113 KiB two programs share one.
SHARED_BYTES = {"sm_80": 99 * 1024, "sm_90": 113 * 1024, "sm_100": 113 * 1024}


def compiling_environment():
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}


def one_of_each_variant(arch, precision, model, convolutions_only):
    """The last launch of each variant of each kernel: of the deepest stage that has it."""
    variants = {
        (plan.kernel, plan.variant): plan
        for plan in plan_entries(arch, model, precision, 512, ["training", "inference"])
        if plan.kernel.startswith("conv") or not convolutions_only
    }
    return list(variants.values())


def violations_of_a_bad_tile(config, plan):
    """What the entry of a forward convolution says with tiles that nobody should choose."""
    x, w = (
        torch.empty(size, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
        for size in ((512, 128, 16, 16), (128, 128, 3, 3))
    )
    with recording() as launches:
        conv_fprop(x, w, padding=1, config=config)
    return CodegenEntry(plan, compile_launch(launches[0], 90)).violations


@triton.jit
def _sum_in_last_kernel(
    x_ptr,  # (num_programs * BLOCK,) fp32 in
    partials_ptr,  # (num_programs,) fp32 scratch
    tickets_ptr,  # (1,) int32: 0 before and after
    sum_ptr,  # (1,) fp32 out
    num_partials,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    x = tl.load(x_ptr + program * BLOCK + tl.arange(0, BLOCK))
    tl.store(partials_ptr + program, tl.sum(x, axis=0))
    if tl.atomic_add(tickets_ptr, 1) == num_partials - 1:
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, num_partials, BLOCK):
            sums += tl.load(partials_ptr + first + tl.arange(0, BLOCK))
        tl.store(sum_ptr, tl.sum(sums, axis=0))
        tl.store(tickets_ptr, 0)


def count_of_a_ticket(capability):
    """How the instructions of a kernel are counted whose last program adds the sums of all."""
    args = {
        "x_ptr": torch.empty(1 << 20, device="meta"),
        "partials_ptr": torch.empty(1024, device="meta"),
        "tickets_ptr": torch.empty(1, dtype=torch.int32, device="meta"),
        "sum_ptr": torch.empty(1, device="meta"),
        "num_partials": 1024,
        "BLOCK": 1024,
        "PDL": False,
    }
    launch = Launch(_sum_in_last_kernel, (1024,), args, 4, 1, Traffic(0, 0))
    return dataclasses.asdict(compile_launch(launch, capability).program)


def main() -> int:
    groups = {name: one_of_each_variant(*group) for name, group in GROUPS.items()}
    plans = [plan for group in groups.values() for plan in group]
    entries = iter(compile_entries(plans, jobs=usable_cores()))
    answer = {
        name: [codegen.entry_record(next(entries)) for _ in group] for name, group in groups.items()
    }
    fprop = next(plan for plan in plans if plan.kernel == "conv_fprop_kernel")
    answer["bad"] = {word: violations_of_a_bad_tile(config, fprop) for word, config in BAD.items()}
    answer["ticket"] = {arch: count_of_a_ticket(int(arch[3:])) for arch in PEAK_RATES}
    print(json.dumps(answer))
    return 0


@pytest.fixture(scope="module")
def compiled():
    done = subprocess.run(
        [sys.executable, __file__],
        env=compiling_environment(),
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_entry(entry):
    """No spills, tensor cores in every product, wide loads and stores, little shared memory.

    Products of 16 channels run on tensor cores too: HGMMA (sm_90) is 64 rows by any multiple of 8,
    HMMA (sm_80) 16 by 8, and Triton gives sm_100 a tcgen05 product for every tile of 64 rows, all
    of which the heuristics' tiles of at least 64 pixels or filter rows by 16 channels fill. Only
    fp32 that is not to be rounded to TF32 is multiplied by ordinary instructions.
    """
    assert entry["violations"] == "", entry
    assert entry["spills"] == 0, entry
    assert entry["shared_bytes"] <= SHARED_BYTES[entry["arch"]], entry
    is_conv = entry["kernel"].startswith("conv")
    if is_conv and entry["precision"] != "fp32":
        kind = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "tcgen05"}[entry["arch"]]
        assert entry["tensor_cores"].endswith(f" {kind}"), entry
        assert entry["tensor_core_instructions"] > 0, entry
    # The stem reads images of 3 channels, and what has no pixels reads little.
    if is_conv and entry["layer"] != "stem":
        bits = dict(words.split(" ") for words in entry["load_bits"].split(", ") if words)
        # Helpers of the forms in patches call them ptr.
        pixels = bits.keys() & {"x_ptr", "g_ptr", "y_ptr", "producer_y_ptr", "shortcut_ptr", "ptr"}
        is_tma = "_tma_" in entry["kernel"]
        assert pixels or is_tma, entry
        assert {bits[name] for name in pixels} <= {"128"}, entry
        assert (entry["tma_loads"] > 0) == is_tma, entry
    if entry["kernel"].startswith(("conv_fprop", "conv_dgrad", "bn_apply", "bn_backward_apply")):
        assert entry["wide_stores"] > 0, entry


@pytest.mark.parametrize("group", GROUPS)
def test_machine_code(compiled, group):
    for entry in compiled[group]:
        check_entry(entry)
    variants = {(entry["kernel"], entry["variant"]) for entry in compiled[group]}
    assert len(variants) == len(compiled[group]) >= 13


def test_every_kernel_has_an_entry(compiled):
    kernels = {entry["kernel"].removesuffix("_kernel") for entry in compiled["narrow sm_90 bf16"]}
    assert kernels == KERNELS
    sources = "\n".join(path.read_text() for path in (REPO / "kernels" / "gpu").glob("*.py"))
    all_kernels = set(re.findall(r"^def _(\w+)_kernel\(", sources, re.MULTILINE))
    # Ten classes fill no second tile of logits; test_head_code.py compiles that sum. Gradients of
    # 16 channels share a launch; test_conv_strip_code.py compiles the one of dx alone.
    assert all_kernels - {"add_shares", "conv_strip_dgrad"} == KERNELS


@pytest.mark.parametrize("word", BAD)
def test_a_bad_tile_is_a_violation(compiled, word):
    assert any(word in violation for violation in compiled["bad"][word]), compiled["bad"]


@pytest.mark.parametrize("arch", PEAK_RATES)
def test_what_the_last_program_executes_is_counted_apart(compiled, arch):
    count = compiled["ticket"][arch]
    assert len(count["by_depth"]) == 1
    assert 40 < count["by_depth"][0] < 100
    outside, loop = count["last_by_depth"]
    assert 40 < outside < 150
    assert 20 < loop < 100


def make_entry(arch="sm_90", precision="bf16", kernel="conv_fprop_kernel", **changes):
    code = {
        "registers": 64,
        "shared_bytes": 1024,
        "spills": 0,
        "hgmma": 4,
        "hmma": 0,
        "tcgen05": 0,
        "tma_loads": 0,
        "wide_loads": 4,
        "narrow_loads": 0,
        "wide_stores": 4,
        "narrow_stores": 0,
        "load_bits": {"x_ptr": 128, "scale_shift_ptr": 32},
        "program": ProgramCount((100, 40)),
    }
    numbers = {"bytes": 3_000_000, "flops": 1000, "trips": (5.0,), "last_programs": 1}
    for name in numbers:
        numbers[name] = changes.pop(name, numbers[name])
    plan = Plan(
        model="resnet20",
        phase="training",
        layer="stage1",
        kernel=kernel,
        variant="plain",
        precision=precision,
        arch=arch,
        configured_by="heuristics",
        tile="",
        launches=1,
        programs=132,
        num_warps=4,
        expected_bits={"x_ptr": 128},
        build=None,
        **numbers,
    )
    return CodegenEntry(plan, MachineCode(**(code | changes)))


def test_what_counts_as_a_violation():
    assert make_entry().violations == []
    assert make_entry(spills=2).violations == ["2 spills"]
    assert make_entry(hgmma=0, hmma=4).violations == ["no tensor-core instruction of sm_90"]
    assert make_entry(arch="sm_80", hgmma=0, hmma=4).violations == []
    assert make_entry(precision="fp32", hgmma=0).violations == []
    assert make_entry(kernel="conv_fprop_tma_kernel").violations == ["no TMA load"]
    assert make_entry(kernel="conv_fprop_tma_kernel", tma_loads=2).violations == []
    assert make_entry(kernel="bn_apply_kernel", hgmma=0).violations == []
    assert make_entry(load_bits={"x_ptr": 64}).violations == ["x_ptr read 64 bits wide"]
    too_much = make_entry(arch="sm_80", hgmma=0, hmma=4, shared_bytes=164 * 1024).violations
    assert too_much == ["167936 bytes of shared memory, sm_80 has 166912"]


def test_the_roofline_is_the_longer_of_memory_and_arithmetic():
    by_memory = make_entry()
    assert (by_memory.roofline_us, by_memory.bound) == (pytest.approx(1.0), "memory")
    by_arithmetic = make_entry(flops=8_000_000_000)
    assert (by_arithmetic.roofline_us, by_arithmetic.bound) == (pytest.approx(10.0), "arithmetic")
    assert make_entry(precision="tf32", flops=8_000_000_000).roofline_us == pytest.approx(20.0)


def test_issue_time_counts_every_warp_and_every_trip():
    entry = make_entry()
    assert entry.warp_instructions == 132 * 4 * (100 + 5 * 40)
    # As many programs as multiprocessors, as many warps as schedulers: 300 clocks.
    assert entry.issue_us == pytest.approx(300 / 1755)
    assert entry.attainable_us == pytest.approx(1.0)
    assert make_entry(trips=(1000.0,)).attainable_us == pytest.approx(40_100 / 1755 / 0.7)
    assert entry.count_notes == ["loop x 5"]
    last = make_entry(program=ProgramCount((100, 40), (30, 8)), last_programs=2)
    assert last.warp_instructions == 4 * (132 * 300 + 2 * 38)
    assert last.count_notes == ["loop x 5", "38 by the last program alone"]
    # A loop that most programs do not enter has become a branch.
    branch = make_entry(program=ProgramCount((100,), conditional=60), trips=(0.25,))
    assert branch.warp_instructions == 132 * 4 * (40 + 0.25 * 60)
    unrolled = make_entry(program=ProgramCount((300,), skipped=9)).count_notes
    assert unrolled == ["loop unrolled, or on another way", "9 of slow paths left out"]


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        # 64 registers of 32 x 4 threads; 57 take as many, being given by eights.
        ({}, 8),
        ({"registers": 57}, 8),
        ({"registers": 24}, 16),
        ({"registers": 16, "shared_bytes": 113 * 1024}, 2),
        ({"registers": 16, "shared_bytes": 113 * 1024 + 1}, 1),
    ],
)
def test_programs_that_share_a_multiprocessor(changes, programs):
    assert make_entry(**changes).programs_per_multiprocessor == programs


@pytest.mark.parametrize(("network", "blocks"), [("resnet20", 9), ("resnet18", 8)])
def test_convolutions_are_those_of_the_blocks(network, blocks):
    stem, *others = network_blocks(network, 8)
    assert sum(block.count for block in others) == blocks
    counted = {stem.layers[0]: 1}
    for block in others:
        for shape in (*block.layers, *([block.projection] if block.projection else [])):
            counted[shape] = counted.get(shape, 0) + block.count
    assert counted == {conv.shape: conv.num_layers for conv in network_convs(network, 8)}
    names = [conv.name for conv in network_convs(network, 8)]
    assert names[:5] == ["stem", "stage1", "stage2 down", "stage2 projection", "stage2"]
    assert [block.name for block in others[:3]] == ["stage1", "stage2 first", "stage2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "sm_70"], "choose from"),
        (["--model", "vgg"], "choose from"),
        (["--dtype", "int8"], "choose from"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--batch", f"{10**17}"], f"--batch must be at most {MAX_BATCH}, got 1{17 * '0'}"),
        (["--batch", f"{MAX_BATCH + 1}"], f"--batch must be at most {MAX_BATCH}, got"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--jobs", "-1"], "--jobs must be at least 1, got -1"),
        (["--json"], "--json needs a FILE, but with --step"),
        (["--step", "vgg"], "choose from"),
        (["--step", "resnet20", "--json", "x"], "--step writes no file"),
        (["--step", "resnet20", "--csv", "x"], "--step writes no file"),
        (["--step", "resnet20", "--model", "resnet20"], "leave --model out"),
        (["--step", "resnet20", "--arch", "sm_80", "sm_90"], "one --arch at a time"),
    ],
)
def test_wrong_use_is_one_sentence(argv, message, capsys):
    try:
        code = codegen.main(argv)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    if message == "choose from":
        names = {"--arch": PEAK_RATES, "--dtype": PRECISIONS}.get(argv[0], NETWORKS)
        assert all(name in error for name in names)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_largest_batch_can_be_launched(network):
    for phase in ("training", "inference"):
        for named in network_launches(network, MAX_BATCH, PRECISIONS["bf16"], phase):
            if isinstance(named.launch, Launch):
                # The limits of CUDA: the first dimension of a grid, then the others.
                first, *others = named.launch.grid
                assert first < 2**31
                assert all(size < 2**16 for size in others)


def test_no_more_processes_than_compilations(monkeypatch):
    """Of any number that is asked for, such as one that no pool could hold."""
    asked = []

    def pool(jobs, **_):
        asked.append(jobs)
        return ThreadPoolExecutor(jobs)

    monkeypatch.setattr(compile_pool, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(codegen_report, "compile_build", lambda build: f"code of {build}")
    plans = [SimpleNamespace(build=name) for name in ("a", "b", "a", "c")]
    entries = codegen_report.compile_entries(plans, 10**12)
    assert asked == [3]
    assert [entry.code for entry in entries] == [f"code of {name}" for name in "abac"]


@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted where there is a GPU")
def test_interpreted_kernels_are_refused_in_one_sentence(capsys):
    assert codegen.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_the_command_prints_and_writes_its_entries(tmp_path):
    command = [sys.executable, "-m", "fastres.kernels.tools.codegen", "--phase", "inference"]
    command += [
        "--model",
        "resnet20",
        "--jobs",
        "1",
        "--csv",
        "report.csv",
        "--json",
        "report.json",
    ]
    done = subprocess.run(
        command, env=compiling_environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "ESTIMATES of lower bounds for H100 SXM: 132 multiprocessors at 1.755" in done.stdout
    assert done.stdout.endswith(" entries, 0 with a violation\n")
    entries = json.loads((tmp_path / "report.json").read_text())
    with (tmp_path / "report.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["tile"] for row in rows] == [entry["tile"] for entry in entries]
    stage1 = [entry for entry in entries if entry["layer"] == "stage1"]
    assert {entry["variant"] for entry in stage1} >= {
        "bn out, relu out",
        "bn out, residual, relu out",
    }
    plain = next(entry for entry in stage1 if entry["variant"] == "bn out, relu out")
    activation = 512 * 32 * 32 * 16
    assert plain["declared_bytes"] == 2 * (2 * activation + 16 * 16 * 9) + 4 * 2 * 16
    assert plain["declared_flops"] == 2 * activation * 16 * 9
    # One in each of the three blocks.
    assert plain["launches"] == 3


def test_help_is_cheap():
    code = "import sys; from fastres.kernels.tools import codegen; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert tuple(PEAK_RATES) == codegen.ARCHITECTURES
    assert tuple(NETWORKS) == codegen.NETWORKS
    assert tuple(PRECISIONS) == codegen.DTYPES


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_launch_of_every_layer(dtype, tmp_path):
    """What rules and ESTIMATES choose is as demanded; what else a table could, nearly so."""
    command = [sys.executable, "-m", "fastres.kernels.tools.codegen", "--arch", *PEAK_RATES]
    command += ["--dtype", dtype, "--json", str(tmp_path / "report.json")]
    done = subprocess.run(
        command, env=compiling_environment(), cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr
    entries = json.loads((tmp_path / "report.json").read_text())
    assert len(entries) > 700
    for entry in entries:
        is_chosen = entry["configured_by"] in ("heuristics", entry["arch"])
        # Triton loads x in the layout of its product where it rounds it to TF32 in registers.
        is_narrow = (dtype, entry["kernel"]) == ("tf32", "conv_wgrad_kernel")
        if is_chosen and not is_narrow:
            check_entry(entry)
        else:
            assert entry["spills"] <= (0 if is_chosen else 16), entry


if __name__ == "__main__":
    sys.exit(main())
