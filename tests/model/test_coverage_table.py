"""The table of docs/your-own-network.md: what of other people's networks runs fused."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastres.fusion.explain import explain
from fastres.fusion.fuse import fuse
from fastres.fusion.fused_module import FusedModule
from tests.helpers.community_nets import FULL_NETS, convs_before_norms, external_nets

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-own-network.md"
NETS = {name: (make, 32) for name, make in FULL_NETS.items()} | external_nets()


def table() -> dict[str, tuple[int, ...]]:
    """{network: its numbers}, as the page has them."""
    _, _, rest = PAGE.read_text().partition("<!-- coverage -->")
    part, _, _ = rest.partition("<!-- end of coverage -->")
    rows = re.findall(r"^\| (\S+/\S+) \| (.*) \|$", part, re.MULTILINE)
    return {name: tuple(int(cell) for cell in cells.split(" | ")) for name, cells in rows}


def absorbed(model: nn.Module) -> set[str]:
    """Paths of all modules that programs of a fused network compute."""
    return {
        ".".join(filter(None, (path, part)))
        for path, module in model.named_modules()
        if isinstance(module, FusedModule)
        for part in module.fused_program.absorbed
    }


def test_the_table_has_all_networks():
    assert list(table()) == list(NETS)
    for name, (total, wanted, compiled, fused) in table().items():
        assert compiled >= 0.95 * wanted or "preact_resnet18" in name
        assert compiled == fused <= wanted <= total


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_the_table_is_true(name):
    if name.startswith(("timm", "torchvision")):
        pytest.importorskip(name.partition("/")[0])
    make, size = NETS[name]
    model, images = make().train(), torch.randn(2, 3, size, size)
    wanted = set(convs_before_norms(model, images))
    rows = explain(model, images, options={"fuse": "all"}, verbose=False).rows
    found = {row.name for row in rows if row.match}
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    fused = absorbed(fuse(model, verbose=False))
    got = len(convs), len(wanted), len(found & wanted), len(fused & wanted)
    assert got == table()[name]
