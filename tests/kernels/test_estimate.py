"""ESTIMATES: the tuner's contests with a timer that counts, told here what kernels compile to."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu.batchnorm_fwd import bn_apply
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import heuristic_config, im2col_config
from fastres.kernels.gpu.launch_table import Gpu, assume_gpu, conv_config
from fastres.kernels.gpu.table_file import read_table, table_key
from fastres.kernels.tools import estimate as estimate_module
from fastres.kernels.tools import tune
from fastres.kernels.tools.estimate import CountTimer, estimate, fill_multiprocessors
from fastres.kernels.tools.graph_timer import Trial
from fastres.kernels.tools.networks import PRECISIONS
from fastres.kernels.tools.tune_workloads import ConvVariant, ConvWorkload
from fastres.kernels.tools.tuner import Choice

BF16 = PRECISIONS["bf16"]
META, INNER = torch.device("meta"), ConvVariant(True, False, True)
# 16 to 32 channels at stride 2: the filter gradient is by pointers, 44 parts of three tiles.
STRIDED = ConvWorkload(ConvShape(512, 32, 32, 16, 32, stride=2), BF16, {INNER: 2}, bytes=1)
WIDE = ConvWorkload(ConvShape(512, 8, 8, 64, 64), BF16, {INNER: 1}, bytes=1)


@pytest.fixture
def told(monkeypatch):
    """Tell what kernels take, by name; others 1 us. No process compiles while kernels run here."""
    told = SimpleNamespace(microseconds={}, violations={}, programs=6)

    def compile_launches(timer, launches):
        return [
            SimpleNamespace(
                attainable_us=told.microseconds.get(launch.name, 1.0),
                violations=told.violations.get(launch.name, []),
                programs_per_multiprocessor=told.programs,
                plan=SimpleNamespace(bytes=launch.traffic.bytes),
                warp_instructions=100.0,
            )
            for launch in launches
            if hasattr(launch, "kernel")
        ]

    monkeypatch.setattr(CountTimer, "compile", compile_launches)
    return told


def tensor(*size):
    return torch.empty(size, dtype=torch.bfloat16, device=META, memory_format=torch.channels_last)


def chosen(workload, monkeypatch):
    monkeypatch.setattr(estimate_module, "conv_workloads", lambda *_: [workload])
    (found,) = estimate("sm_90", ["resnet20"], [512], "bf16", jobs=1, say=pytest.fail)
    return found, {key.partition("/")[0]: config for key, config in found.entries.items()}


def test_a_trial_takes_the_sum_of_its_launches_cudnn_at_a_share_of_the_peak(told):
    x, w = tensor(512, 64, 32, 32), tensor(64, 64, 3, 3)
    told.microseconds["bn_apply_kernel"] = 5.0

    def both():
        return torch.nn.functional.conv2d(bn_apply(x, torch.empty(2, 64, device=META)), w)

    timer = CountTimer("sm_90", "bf16", jobs=1)
    (seconds,) = timer([Trial("both", both)])
    flops = 2 * 512 * 30 * 30 * 64 * 64 * 9
    assert seconds == pytest.approx(5e-6 + flops / (0.7 * 800e12))
    told.violations["bn_apply_kernel"] = ["2 spills"]
    assert timer([Trial("both", both)]) == [math.inf]


def test_forms_and_routes_are_chosen_by_count(told, monkeypatch):
    """Kernels that are slow or spill are left; where all are equal, what the rules choose stays."""
    told.microseconds |= dict.fromkeys(("conv_fprop_pixel_kernel", "conv_wgrad_pixel_kernel"), 9.0)
    told.violations["conv_fprop_kernel"] = ["4 spills"]
    found, configs = chosen(WIDE, monkeypatch)
    assert (configs["fprop"].route, configs["fprop"].form) == ("triton", "tma")
    assert (configs["dgrad"].route, configs["dgrad"].form) == ("triton", "pixel")
    assert configs["wgrad"].form == "im2col"
    assert not any(config.stored for config in configs.values())
    # Entries of the rules were raced too, and both routes are told of each product.
    assert found.choices[0].baseline_seconds == pytest.approx(9e-6)
    assert all({*choice.by_route} == {"triton", "cudnn"} for choice in found.choices)
    # Equal counts: cuDNN's from 64 channels on, by rule below.
    rank = estimate_module.prefer_cudnn
    triton, cudnn = configs["wgrad"], replace(configs["wgrad"], route="cudnn")
    assert rank(WIDE.shape, (triton, cudnn)) < rank(WIDE.shape, (triton, triton))
    assert rank(STRIDED.shape, (triton, cudnn)) == rank(STRIDED.shape, (triton, triton))
    told.microseconds |= {
        f"conv_{name}_kernel": 1e3
        for op in ("fprop", "dgrad", "wgrad")
        for name in (op, f"{op}_pixel", f"{op}_tma")
    } | {"conv_dgrad_pixel_kernel": 1e3, "conv_wgrad_pixel_kernel": 1e3}
    _, configs = chosen(WIDE, monkeypatch)
    assert {config.route for config in configs.values()} == {"cudnn"}


@pytest.mark.parametrize(("programs", "parts"), [(1, 44), (2, 88), (6, 176), (9, 176)])
def test_a_filter_gradient_by_pointers_fills_the_multiprocessors(told, programs, parts):
    """Three tiles: n programs on each of 132 are 44 n parts; at most four times the rule's."""
    told.programs = programs
    key = table_key("wgrad", STRIDED.shape, torch.bfloat16)
    rule = im2col_config("wgrad", STRIDED.shape, torch.bfloat16)
    assert rule.split_k == 44
    others = {
        table_key(op, STRIDED.shape, torch.bfloat16): im2col_config(
            op, STRIDED.shape, torch.bfloat16
        )
        for op in ("fprop", "dgrad")
    }
    choices = [Choice(k, c, 1.0, 1.0, {}) for k, c in (others | {key: rule}).items()]
    timer = CountTimer("sm_90", "bf16", jobs=1)
    found = fill_multiprocessors(STRIDED, choices, timer)
    assert (rule.split_k if found is None else found.after) == parts
    if found is not None:
        # Two layers; each partial of 32 x 144 fp32 numbers is written once and read once.
        assert found.added_bytes >= 2 * (parts - 44) * 2 * 4 * 32 * 144
    # Forms in patches shift and add whole copies of dw in every part; cuDNN has its own parts.
    for config in (
        ConvConfig(64, 16, 16, 4, 1, split_k=44, form="pixel"),
        ConvConfig(64, 32, 32, 4, 2, split_k=44, route="cudnn"),
    ):
        choices[-1] = Choice(key, config, 1.0, 1.0, {})
        assert fill_multiprocessors(STRIDED, choices, timer) is None


def test_the_command_writes_what_a_gpu_of_the_architecture_uses(
    told, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(estimate_module, "conv_workloads", lambda *_: [STRIDED])
    monkeypatch.setattr(tune, "_obstacle", lambda options: None)
    path = tmp_path / "table.json"
    assert tune.main(["--estimate", "sm_90", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    key = table_key("wgrad", STRIDED.shape, torch.bfloat16)
    assert f"| {key} | " in out
    assert f"{key}: 176 parts for 44, 6 programs a multiprocessor: " in out
    assert read_table(path).architectures["sm_90"].entries[key].split_k == 176
    about = json.loads(path.read_text())["architectures"]["sm_90"]["provenance"]
    assert about["kind"].startswith("ESTIMATE")
    assert {"command", "versions", "date", "commit"} <= about.keys()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--estimate", "sm_90"], "error: kernels are interpreted in this process"),
        (["--estimate", "sm_90", "--jobs", "0"], "error: --jobs must be at least 1, got 0"),
    ],
)
def test_what_stands_in_the_way_is_said(argv, message, capsys):
    assert tune.main(argv) == 2
    assert capsys.readouterr().err.startswith(message)


def test_hopper_cards_use_the_committed_estimates():
    """Of a filter gradient by pointers, which has more parts than by rule."""
    with assume_gpu(Gpu("NVIDIA H200", (9, 0))):
        config = conv_config("wgrad", STRIDED.shape, torch.bfloat16, META)
    rule = heuristic_config("wgrad", STRIDED.shape, torch.bfloat16)
    assert (config.form, rule.form) == ("im2col", "im2col")
    assert rule.split_k < config.split_k <= 4 * rule.split_k
