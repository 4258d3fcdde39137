"""Shapes, launch configurations and the record of launches."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.conv_types import BatchNorm
from fastres.kernels.gpu import launch_table
from fastres.kernels.gpu.conv_fprop import conv_fprop
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch import Launch, Traffic, _tensors_of, recording
from fastres.kernels.gpu.launch_config import ConvConfig
from fastres.kernels.gpu.launch_rules import heuristic_config, im2col_config
from fastres.kernels.gpu.launch_table import (
    Gpu,
    assume_entries,
    assume_gpu,
    conv_config,
    force_route,
    unmeasured_config,
)
from fastres.kernels.gpu.table_file import LaunchTable, Section, read_table, table_key
from fastres.kernels.tools.network_launches import network_launches
from fastres.kernels.tools.networks import PRECISIONS, resnet18_convs, resnet20_convs
from fastres.kernels.tools.table_writer import merge_table
from fastres.model.kernel_status import fused_kernels
from tests.helpers.interpreter import DEVICE, HAS_GPU
from tests.helpers.kernel_cases import channels_last
from tests.helpers.launch_tables import ENTRY, H100, H200, as_table, use_table

__all__ = ["use_table"]

REPO = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16


def test_shape_of_a_strided_convolution():
    shape = ConvShape(4, 9, 8, 3, 16, stride=2)
    y = torch.nn.functional.conv2d(torch.zeros(4, 3, 9, 8), torch.zeros(16, 3, 3, 3), None, 2, 1)
    assert tuple(y.shape[2:]) == (shape.P, shape.Q)
    assert shape.gemm("fprop") == (4 * 5 * 4, 16, 27)
    assert shape.gemm("dgrad") == (4 * 9 * 8, 3, 144)
    assert shape.gemm("wgrad") == (16, 27, 4 * 5 * 4)
    assert shape.flops == 2 * y.numel() * 27
    assert shape.num_bytes(2) == 2 * (4 * 9 * 8 * 3 + 16 * 27 + y.numel())


@pytest.mark.parametrize(
    ("convs", "gflops", "layers"), [(resnet20_convs, 0.0816, 21), (resnet18_convs, 1.11, 20)]
)
def test_networks_have_their_published_arithmetic(convs, gflops, layers):
    """Forward GFLOP an image, 2 a multiplication: 41 M (ResNet-20), 0.56 G (ResNet-18) products."""
    listed = convs(1)
    assert sum(conv.num_layers for conv in listed) == layers
    total = sum(conv.shape.flops * conv.num_layers for conv in listed)
    assert total / 1e9 == pytest.approx(gflops, rel=0.01)


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_im2col_tiles_fill_a_gpu_at_training_batch(op, dtype):
    for conv in [*resnet20_convs(512), *resnet18_convs(512)]:
        shape = conv.shape
        config = im2col_config(op, shape, dtype)
        gemm = shape.gemm(op)
        rows, columns = (gemm.n, gemm.m) if op == "wgrad" else (gemm.m, gemm.n)
        programs = -(-rows // config.block_m) * -(-columns // config.block_n) * config.split_k
        assert programs >= 128, (conv, config)
        assert config.block_k <= 64
        assert config.route == "triton"


# What the rules choose on Hopper in bf16 for fprop, dgrad, wgrad: a form, or cuDNN.
RULES = {
    "resnet20 stem": ("strip", "im2col", "strip"),
    "resnet20 stage1": ("strip", "fused", "strip"),
    "resnet20 stage2 down": ("im2col", "pixel", "im2col"),
    "resnet20 stage2 projection": ("im2col", "pixel", "im2col"),
    "resnet20 stage2": ("pixel", "pixel", "strip"),
    "resnet20 stage3": ("pixel", "pixel", "pixel"),
    "resnet18 stage1": ("pixel", "pixel", "pixel"),
    "resnet18 stage2 down": ("im2col", "cudnn", "cudnn"),
    "resnet18 stage2 projection": ("im2col", "im2col", "im2col"),
    "resnet18 stage2": ("tma", "tma", "cudnn"),
    "resnet18 stage4": ("tma", "tma", "cudnn"),
}


@pytest.mark.parametrize("layer", RULES)
def test_rules_choose_a_form_for_every_layer(layer):
    net, _, name = layer.partition(" ")
    convs = {"resnet20": resnet20_convs, "resnet18": resnet18_convs}[net](512)
    (shape,) = (conv.shape for conv in convs if conv.name == name)
    ops = ("fprop", "dgrad", "wgrad")
    configs = [heuristic_config(op, shape, BF16) for op in ops]
    assert tuple(c.form if c.route == "triton" else "cudnn" for c in configs) == RULES[layer]
    is_wide = max(shape.C, shape.K) >= 128
    is_plain = is_wide and shape.R == 3
    assert [c.stored for c in configs] == [is_plain and c.route == "triton" for c in configs]
    # Ampere, and the small GPUs of Blackwell that run its code, spill in other forms, and fp32 has
    # none; wide layers are cuDNN's there.
    for dtype, capability in ((BF16, (8, 0)), (BF16, (12, 0)), (torch.float32, (9, 0))):
        for op in ops:
            config = heuristic_config(op, shape, dtype, capability=capability)
            assert config.form == "im2col"
            assert (config.route == "cudnn") == is_plain
    assert [heuristic_config(op, shape, BF16, capability=(10, 0)) for op in ops] == configs


LAYER = "h32w32c16k16r3s3u1p1"
KNOWN = ConvShape(128, 32, 32, 16, 16)


def of(num_warps, layer=LAYER, batch=128):
    """Entries of one product of fprop, told apart by their warps."""
    return {f"fprop/bfloat16/n{batch}/{layer}": ENTRY | {"num_warps": num_warps}}


def warps_on(gpu, shape=KNOWN):
    with assume_gpu(gpu):
        return conv_config("fprop", shape, BF16, DEVICE).num_warps


def test_table_serves_the_nearest_batch_and_heuristics_the_rest(use_table):
    large = {"route": "cudnn", "split_k": 2}
    key = f"fprop/bfloat16/n1024/{LAYER}"
    use_table((H200, "measured", of(1) | {key: ENTRY | large}, None))
    with assume_gpu(H200):
        small, large = (
            conv_config("fprop", ConvShape(n, 32, 32, 16, 16), BF16, DEVICE) for n in (64, 600)
        )
        assert small == ConvConfig(16, 16, 16, 1, 1)
        assert large.route == "cudnn"
        other = ConvShape(128, 32, 32, 16, 32)
        assert conv_config("fprop", other, BF16, DEVICE) == heuristic_config("fprop", other, BF16)
        for op, dtype in (("dgrad", BF16), ("fprop", torch.float16)):
            assert conv_config(op, KNOWN, dtype, DEVICE) == heuristic_config(op, KNOWN, dtype)
        # Inside such blocks the table is not asked, and its answers are not kept for later.
        with assume_entries({}):
            assert conv_config("fprop", KNOWN, BF16, DEVICE) == heuristic_config(
                "fprop", KNOWN, BF16
            )
        with assume_entries({f"fprop/bfloat16/n8/{LAYER}": large}):
            assert conv_config("fprop", KNOWN, BF16, DEVICE) is large
        with force_route("cudnn"):
            assert conv_config("fprop", KNOWN, BF16, DEVICE) == replace(small, route="cudnn")
        assert conv_config("fprop", KNOWN, BF16, DEVICE) == small


def test_the_nearest_source_serves_a_product(use_table):
    """Own entry, a sibling's, the ESTIMATE, the rules; another batch of a nearer one first."""
    ampere, hopper = Gpu("NVIDIA A100", (8, 0)), Gpu("sm_90", (9, 0))
    sections = [
        (ampere, "measured", of(16), None),
        (hopper, "ESTIMATE", of(8), None),
        (H100, "measured", of(4), None),
        (H200, "measured", of(2, batch=4096), None),
    ]
    rules = heuristic_config("fprop", KNOWN, BF16)
    for gpu, served, sibling, wanted in (
        (H200, sections, 4, 2),
        (H200, sections[:3], 4, 4),
        (H200, sections[:2], 8, 8),
        (H200, sections[:1], rules.num_warps, rules.num_warps),
        (ampere, sections, im2col_config("fprop", KNOWN, BF16).num_warps, 16),
    ):
        use_table(*served)
        assert warps_on(gpu) == wanted
        assert unmeasured_config("fprop", KNOWN, BF16, gpu).num_warps == sibling
    # What is no GPU is served by the rules.
    use_table(*sections)
    assert conv_config("fprop", KNOWN, BF16, torch.device("meta")) == rules


def test_a_table_is_read_again_when_it_is_written(use_table):
    path = use_table((H200, "measured", of(1), None))
    assert warps_on(H200) == 1
    config = ConvConfig(64, 16, 32, 4, 3)
    merge_table(path, H200, {f"fprop/bfloat16/n128/{LAYER}": config}, {})
    assert warps_on(H200) == 4


def test_a_look_up_does_not_read_the_table_again(use_table, monkeypatch):
    """A thousand entries more, or a thousand calls, and each is looked at once."""
    use_table((H200, "measured", of(1), None))
    assert warps_on(H200) == 1
    monkeypatch.setattr(launch_table, "load_table", None)
    monkeypatch.setattr(Section, "nearest", None)
    assert warps_on(H200) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"programs": 1}, "malformed entry"),
        ({"block_n": 24}, "block_n must be a power of two >= 16, got 24"),
        ({"route": "magic"}, "route must be one of"),
        ({"split_k": 0}, "split_k must be at least 1"),
        ({"form": "box"}, "form must be one of"),
        ({"patch_h": 3}, "patch_h must be 1, 2, 4 or 8, got 3"),
        ({"ahead": -1}, "ahead must not be negative, got -1"),
        ({"grid_size": 132}, "grid_size must be 0, or above in another form, got 132"),
        ({"basis": "ESTIMATE"}, "basis must be 'measured' in 'gpus', got 'ESTIMATE'"),
        ({"basis": None}, "basis must be 'measured' in 'gpus', got None"),
    ],
)
def test_a_bad_entry_is_refused(use_table, entry, message):
    use_table((H200, "measured", {f"fprop/bfloat16/n128/{LAYER}": ENTRY | entry}, None))
    with pytest.raises(ValueError, match=rf"^table\.json: .*{re.escape(message)}"):
        warps_on(H200)


def test_a_bad_table_is_refused(use_table):
    path = use_table((H200, "measured", of(1), None), schema=3)
    with pytest.raises(
        ValueError,
        match=r"^table\.json: schema must be 4, got 3: tune this GPU again with python -m [\w.]+$",
    ):
        warps_on(H200)
    for bad in (
        as_table((H200, "measured", {"x": ENTRY}, None)),
        {"schema": 4, "gpus": {"NVIDIA H200": {"entries": {}}}},
        {"schema": 4, "gpus": {"NVIDIA H200": {"capability": [9, 0]}}},
        {"schema": 4, "gpus": {"NVIDIA H200": {"capability": 9, "entries": {}}}},
        {"schema": 4, "gpus": []},
    ):
        path.write_text(json.dumps(bad))
        launch_table.forget_table()
        with pytest.raises(ValueError, match=r"^table\.json: malformed entry"):
            warps_on(H200)


def test_no_table_is_no_error(tmp_path):
    assert read_table(tmp_path / "absent.json") == LaunchTable()
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        read_table(loop)


def test_people_are_told_where_configurations_are_from(use_table):
    sections = [
        (Gpu("sm_90", (9, 0)), "ESTIMATE", of(1), None),
        (H100, "measured", of(1), None),
        (H200, "measured", of(1), None),
    ]
    tune = "nothing timed: python -m fastres.kernels.tools.tune measures them"
    for number, wanted in enumerate(
        (
            f"launch configurations are by rule, {tune}",
            f"launch configurations are ESTIMATES, {tune}",
            "launch configurations measured on NVIDIA H100",
            "launch configurations measured on this GPU",
        )
    ):
        use_table(*sections[:number])
        with assume_gpu(H200):
            assert fused_kernels(torch.device("cuda")) == f"Triton kernels, {wanted}"


def test_the_committed_table_is_of_estimates_made_by_the_command():
    """Every product of both networks."""
    path = REPO / "kernels" / "gpu" / "launch_table.json"
    entries = read_table(path).architectures["sm_90"].entries
    convs = [conv.shape for of in (resnet20_convs, resnet18_convs) for conv in of(512)]
    wanted = {table_key(op, s, BF16) for op in ("fprop", "dgrad", "wgrad") for s in convs}
    no_gradient = {table_key("dgrad", shape, BF16) for shape in convs if shape.C == 3}
    assert wanted - no_gradient == entries.keys()
    about = json.loads(path.read_text())["architectures"]["sm_90"]["provenance"]
    assert about["kind"] == "ESTIMATE: counted in machine code, nothing timed"
    assert " --estimate sm_90" in about["command"]


def test_recording_counts_each_operand_once_and_runs_nothing_on_meta():
    x = torch.empty(4, 16, 8, 8, dtype=BF16, device="meta", memory_format=torch.channels_last)
    w = torch.empty(32, 16, 3, 3, dtype=BF16, device="meta", memory_format=torch.channels_last)
    vector = torch.empty(32, device="meta")
    config = ConvConfig(128, 32, 32, 4, 4)
    with recording() as launches:
        y, _ = conv_fprop(x, w, padding=1, batch_norm=BatchNorm(vector, vector), config=config)
        conv_wgrad(x, y, (3, 3), padding=1, config=ConvConfig(64, 32, 64, 4, 2, split_k=4))
    assert y.is_meta
    assert [launch.name for launch in launches] == [
        "conv_fprop_kernel",
        "conv_wgrad_kernel",
    ]
    fprop, wgrad = (launch.traffic for launch in launches)
    num_y = 4 * 32 * 8 * 8
    # The last program reads the partials of all, those of groups among them.
    partials = launches[0].args["batch_norm"].partials_ptr.numel()
    assert fprop == Traffic(
        reads=2 * (x.numel() + w.numel()) + 4 * (partials + 2 * 32),
        writes=2 * num_y + 4 * (partials + 5 * 32),
        flops=2 * num_y * 9 * 16,
    )
    num_partials = 4 + 2
    assert wgrad.reads == 2 * (x.numel() + num_y) + 4 * num_partials * w.numel()
    assert wgrad.writes == 2 * w.numel() + 4 * num_partials * w.numel()
    assert (fprop + wgrad).bytes == fprop.bytes + wgrad.bytes
    with recording() as nothing:
        pass
    assert nothing == []


def test_a_record_looks_inside_named_tuples():
    x = torch.empty(4, 16, 8, 8, dtype=BF16, device="meta", memory_format=torch.channels_last)
    w = torch.empty(16, 16, 3, 3, dtype=BF16, device="meta", memory_format=torch.channels_last)
    gamma, beta = torch.empty(16, device="meta"), torch.empty(16, device="meta")
    config = ConvConfig(16, 16, 16, 4, 1, form="pixel")
    with recording() as launches:
        conv_fprop(x, w, padding=1, batch_norm=BatchNorm(gamma, beta, 0.25), config=config)
    (made,) = launches
    assert made.tensors["batch_norm.gamma_ptr"] is gamma
    assert made.tensors["batch_norm.beta_ptr"] is beta
    assert {*made.tensors} == {
        "x_ptr", "w_ptr", "y_ptr", "batch_norm.partials_ptr", "batch_norm.counters_ptr",
        "batch_norm.gamma_ptr", "batch_norm.beta_ptr", "batch_norm.stats_ptr",
    }  # fmt: skip
    assert (made.leaves["SHAPE.H"], made.leaves["SHAPE.WHOLE"]) == (8, True)
    assert (made.leaves["batch_norm.eps"], made.leaves["batch_norm.GROUP"]) == (0.25, 2)
    assert made.leaves["batch_norm.num_pixels"] == 4 * 8 * 8
    assert not {"batch_norm", "SHAPE"} & made.leaves.keys()


def test_a_launch_finds_the_devices_of_all_its_tensors():
    """Those in named tuples and behind descriptors too, though it gives them no names."""
    for named in network_launches("resnet18", 16, PRECISIONS["bf16"], "training"):
        if isinstance(named.launch, Launch):
            found = {id(tensor) for tensor in _tensors_of(named.launch.args.values())}
            assert found == {id(tensor) for tensor in named.launch.tensors.values()}


@pytest.mark.skipif(HAS_GPU, reason="one device is enough to mix with meta")
@pytest.mark.parametrize(("device_w", "device_gamma"), [("meta", "cpu"), ("cpu", "meta")])
def test_tensors_on_two_devices_are_refused(device_w, device_gamma):
    x, w = channels_last(torch.zeros(1, 16, 4, 4)), torch.zeros(16, 16, 1, 1, device=device_w)
    batch_norm = BatchNorm(torch.ones(16, device=device_gamma), torch.zeros(16))
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        conv_fprop(x, w, batch_norm=batch_norm)
