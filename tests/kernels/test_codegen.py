"""The report card: what the kernels of real networks compile to, and the command that prints it.

Kernels are interpreted in the test process, so they are compiled in another one, which this file
is the program of: one launch of each form of each kernel for some GPUs. All launches of all layers
are compiled by the slow test, through the command.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastres.kernels.gpu.conv_fprop import conv_fprop
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.tools import codegen
from fastres.kernels.tools.codegen_report import CEILINGS, Card, Plan, compile_cards, planned_cards
from fastres.kernels.tools.machine_code import MachineCode, compile_launch
from fastres.kernels.tools.networks import MODELS, PRECISIONS, network_chains
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
    "bn_backward_finalize",
    "bn_backward_reduce",
    "bn_finalize",
    "bn_stats",
    "conv_dgrad",
    "conv_dgrad_box",
    "conv_fprop",
    "conv_fprop_box",
    "conv_wgrad",
    "pool_linear_bwd",
    "pool_linear_fwd",
    "smooth_cross_entropy_bwd",
    "smooth_cross_entropy_fwd",
    "sum_parts",
}

# sm_86, sm_89 and sm_120 run what sm_80 runs (mma.sync) and give a program 99 KiB. The code of
# sm_90 and sm_100 runs on GPUs of 228 KiB a multiprocessor alone, 1 KiB of it reserved for each
# program: with 113 KiB two programs share one.
SHARED_BYTES = {"sm_80": 99 * 1024, "sm_90": 113 * 1024, "sm_100": 113 * 1024}


def compiling_environment():
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}


def one_of_each_form(arch, precision, model, convolutions_only):
    """The last launch of each form of each kernel: of the deepest stage that has it."""
    forms = {
        (plan.kernel, plan.variant): plan
        for plan in planned_cards(arch, model, precision, 512, ["training", "inference"])
        if plan.kernel.startswith("conv") or not convolutions_only
    }
    return list(forms.values())


def faults_of_a_bad_tile(config, plan):
    """What the card of a forward convolution says with tiles that nobody should choose."""
    x, w = (
        torch.empty(size, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
        for size in ((512, 128, 16, 16), (128, 128, 3, 3))
    )
    with recording() as launches:
        conv_fprop(x, w, padding=1, config=config)
    return Card(plan, compile_launch(launches[0], 90)).faults


def main() -> int:
    groups = {name: one_of_each_form(*group) for name, group in GROUPS.items()}
    plans = [plan for group in groups.values() for plan in group]
    cards = iter(compile_cards(plans, jobs=len(os.sched_getaffinity(0))))
    answer = {
        name: [codegen.card_record(next(cards)) for _ in group] for name, group in groups.items()
    }
    fprop = next(plan for plan in plans if plan.kernel == "conv_fprop_kernel")
    answer["bad"] = {word: faults_of_a_bad_tile(config, fprop) for word, config in BAD.items()}
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


def check_card(card):
    """No spills, tensor cores in every product, wide loads and stores, little shared memory.

    Products of 16 channels run on tensor cores too: HGMMA (sm_90) is 64 rows by any multiple of 8,
    HMMA (sm_80) 16 by 8, and Triton gives sm_100 a tcgen05 product for every tile of 64 rows, all
    of which the heuristics' tiles of at least 64 pixels or filter rows by 16 channels fill. Only
    fp32 that is not to be rounded to TF32 is multiplied by ordinary instructions.
    """
    assert card["faults"] == "", card
    assert card["spills"] == 0, card
    assert card["shared_bytes"] <= SHARED_BYTES[card["arch"]], card
    is_conv = card["kernel"].startswith("conv")
    if is_conv and card["precision"] != "fp32":
        kind = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "tcgen05"}[card["arch"]]
        assert card["tensor_cores"].endswith(f" {kind}"), card
        assert card["tensor_core_instructions"] > 0, card
    # The stem reads images of 3 channels, and what has no pixels reads little.
    if is_conv and card["layer"] != "stem":
        bits = dict(words.split(" ") for words in card["load_bits"].split(", ") if words)
        pixels = bits.keys() & {"x_ptr", "g_ptr", "y_ptr", "y_prev_ptr", "shortcut_ptr"}
        is_box = "_box_" in card["kernel"]
        assert pixels or is_box, card
        assert {bits[name] for name in pixels} <= {"128"}, card
        assert (card["box_loads"] > 0) == is_box, card
    if card["kernel"].startswith(("conv_fprop", "conv_dgrad", "bn_apply", "bn_backward_apply")):
        assert card["wide_stores"] > 0, card


@pytest.mark.parametrize("group", GROUPS)
def test_machine_code(compiled, group):
    for card in compiled[group]:
        check_card(card)
    forms = {(card["kernel"], card["variant"]) for card in compiled[group]}
    assert len(forms) == len(compiled[group]) >= 13


def test_every_kernel_has_a_card(compiled):
    kernels = {card["kernel"].removesuffix("_kernel") for card in compiled["narrow sm_90 bf16"]}
    assert kernels == KERNELS
    sources = "\n".join(path.read_text() for path in (REPO / "kernels" / "gpu").glob("*.py"))
    all_kernels = set(re.findall(r"^def _(\w+)_kernel\(", sources, re.MULTILINE))
    # Ten classes fill no second tile of logits; test_head_code.py compiles that sum.
    assert all_kernels - {"add_shares"} == KERNELS


@pytest.mark.parametrize("word", BAD)
def test_a_bad_tile_is_a_fault(compiled, word):
    assert any(word in fault for fault in compiled["bad"][word]), compiled["bad"]


def make_card(arch="sm_90", precision="bf16", kernel="conv_fprop_kernel", **changes):
    code = {
        "registers": 64,
        "shared_bytes": 1024,
        "spills": 0,
        "hgmma": 4,
        "hmma": 0,
        "tcgen05": 0,
        "box_loads": 0,
        "wide_loads": 4,
        "narrow_loads": 0,
        "wide_stores": 4,
        "narrow_stores": 0,
        "load_bits": {"x_ptr": 128, "ab_ptr": 32},
    }
    numbers = {"bytes": 4_300_000, "flops": 1000}
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
        expected_bits={"x_ptr": 128},
        build=None,
        **numbers,
    )
    return Card(plan, MachineCode(**(code | changes)))


def test_what_counts_as_a_fault():
    assert make_card().faults == []
    assert make_card(spills=2).faults == ["2 spills"]
    assert make_card(hgmma=0, hmma=4).faults == ["no tensor-core instruction of sm_90"]
    assert make_card(arch="sm_80", hgmma=0, hmma=4).faults == []
    assert make_card(precision="fp32", hgmma=0).faults == []
    assert make_card(kernel="conv_fprop_box_kernel").faults == ["no box is loaded"]
    assert make_card(kernel="conv_fprop_box_kernel", box_loads=2).faults == []
    assert make_card(kernel="bn_apply_kernel", hgmma=0).faults == []
    assert make_card(load_bits={"x_ptr": 64}).faults == ["x_ptr read 64 bits wide"]
    too_much = make_card(arch="sm_80", hgmma=0, hmma=4, shared_bytes=164 * 1024).faults
    assert too_much == ["167936 bytes of shared memory, sm_80 has 166912"]


def test_the_roofline_is_the_longer_of_memory_and_arithmetic():
    by_memory = make_card()
    assert (by_memory.roofline_us, by_memory.bound) == (pytest.approx(1.0), "memory")
    by_arithmetic = make_card(flops=7_900_000_000)
    assert (by_arithmetic.roofline_us, by_arithmetic.bound) == (pytest.approx(10.0), "arithmetic")
    assert make_card(precision="tf32", flops=7_900_000_000).roofline_us == pytest.approx(20.0)


@pytest.mark.parametrize("model", MODELS)
def test_chains_hold_every_convolution_of_the_network(model):
    counted = {}
    for chain in network_chains(MODELS[model](8)):
        for shape in chain.conv_shapes():
            counted[shape] = counted.get(shape, 0) + chain.count
    assert counted == {conv.shape: conv.num_layers for conv in MODELS[model](8)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "sm_70"], "choose from"),
        (["--model", "vgg"], "choose from"),
        (["--dtype", "int8"], "choose from"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
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
        names = {"--arch": CEILINGS, "--model": MODELS, "--dtype": PRECISIONS}[argv[0]]
        assert all(name in error for name in names)


@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted where there is a GPU")
def test_interpreted_kernels_are_refused_in_one_sentence(capsys):
    assert codegen.main([]) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


def test_the_command_prints_and_writes_its_cards(tmp_path):
    command = [sys.executable, "-m", "fastres.kernels.tools.codegen", "--phase", "inference"]
    command += ["--model", "resnet20", "--jobs", "1", "--csv", "cards.csv", "--json", "cards.json"]
    done = subprocess.run(
        command, env=compiling_environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "ESTIMATE for H200: 4.3 TB/s" in done.stdout
    assert done.stdout.endswith(" cards, 0 with a fault\n")
    cards = json.loads((tmp_path / "cards.json").read_text())
    with (tmp_path / "cards.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["tile"] for row in rows] == [card["tile"] for card in cards]
    stage1 = [card for card in cards if card["layer"] == "stage1"]
    assert {card["variant"] for card in stage1} >= {
        "bn out, relu out",
        "bn out, residual, relu out",
    }
    plain = next(card for card in stage1 if card["variant"] == "bn out, relu out")
    activation = 512 * 32 * 32 * 16
    assert plain["declared_bytes"] == 2 * (2 * activation + 16 * 16 * 9) + 4 * 2 * 16
    assert plain["declared_flops"] == 2 * activation * 16 * 9
    # One in each of the three blocks.
    assert plain["launches"] == 3


def test_help_is_cheap():
    code = "import sys; from fastres.kernels.tools import codegen; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert tuple(CEILINGS) == codegen.ARCHITECTURES
    assert tuple(MODELS) == codegen.NETWORKS
    assert tuple(PRECISIONS) == codegen.DTYPES


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_launch_of_every_layer(dtype, tmp_path):
    command = [sys.executable, "-m", "fastres.kernels.tools.codegen", "--arch", *CEILINGS]
    command += ["--dtype", dtype, "--json", str(tmp_path / "cards.json")]
    done = subprocess.run(
        command, env=compiling_environment(), cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    cards = json.loads((tmp_path / "cards.json").read_text())
    assert len(cards) > 700
    for card in cards:
        check_card(card)


if __name__ == "__main__":
    sys.exit(main())
