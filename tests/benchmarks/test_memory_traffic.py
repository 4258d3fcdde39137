"""The byte budget of whole nets, from what the launches of a training step declare."""

import re
import runpy
from pathlib import Path

import pytest

from benchmarks.harness.rows import RESULTS
from benchmarks.roofline import memory_traffic
from fastres.model.resnet import create_model

BUDGET = 25
BATCH = 512
DOCUMENT = RESULTS.parents[1] / "docs" / "fused-block.md"


@pytest.fixture(scope="module", params=[("resnet20", 9), ("resnet18", 8)], ids=lambda p: p[0])
def net(request):
    name, num_blocks = request.param
    blocks = memory_traffic.count_net(create_model(name), BATCH)
    assert [block.op for block in blocks] == ["conv_bn_relu", *["residual_block"] * num_blocks]
    return blocks


def is_stored(block):
    """Whether products bind a block, and passes of their own store operands."""
    return any(launch.name == "bn_backward_apply_kernel" for launch in block.launches)


def test_no_block_makes_more_than_25_passes_unless_products_bind_it(net):
    for number, block in enumerate(net[1:], start=1):
        budget = BUDGET + 2 if is_stored(block) else BUDGET
        assert block.passes <= budget, f"block {number}: {block.passes} passes"


def test_the_stem_makes_8_passes_and_the_images_are_read_twice(net):
    stem = net[0]
    x = stem.launches[0].args["x_ptr"]
    assert stem.activation_bytes == 8 * stem.unit + 2 * x.numel() * x.element_size()


def test_a_whole_step_stays_within_the_budget(net):
    """In sum over the blocks; and filters, statistics and parts never add five passes more."""
    blocks = net[1:]
    units = sum(block.unit for block in blocks)
    assert sum(block.activation_bytes for block in blocks) <= (BUDGET + 2) * units
    for number, block in enumerate(blocks, start=1):
        rest = (block.bytes - block.activation_bytes) / block.unit
        assert 0 < rest <= 5, f"block {number}: {rest:.2f} passes beside the activations"


def test_the_documents_table_is_the_counted_one():
    text = DOCUMENT.read_text()
    assert "<!-- passes -->" in text
    assert memory_traffic.fill(text) == text, (
        "python -m benchmarks.roofline.memory_traffic --document docs/fused-block.md"
    )


def test_the_drawing_is_what_its_script_draws():
    draw = runpy.run_path(str(DOCUMENT.with_name("draw_fused_block.py")))["draw"]
    assert DOCUMENT.with_suffix(".svg").read_text() == draw()


def test_every_test_that_the_document_names_exists():
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", DOCUMENT.read_text())
    assert len(named) >= 14
    assert [name for name in named if f"def {name}(" not in tests] == []
