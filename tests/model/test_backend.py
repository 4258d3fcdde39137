"""The backend by its name, its options, what it leaves to inductor, and `explain`."""

import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.backends import registry
from torch._dynamo.exc import BackendCompilerFailed

import fastres
from fastres.fusion import backend
from fastres.kernels.cpu import backend as cpu_backend
from fastres.model import kernel_status
from tests.helpers.community_nets import NETS

pytestmark = pytest.mark.usefixtures("plain")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def forgetful():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def net() -> nn.Module:
    return NETS["kuangliu/basic"]().train()


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_name_needs_no_import(monkeypatch):
    """Installed, torch finds it; from a bare clone the same entry is read from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["entry-points"]["torch_dynamo_backends"]
    assert wanted == {"fastres": f"{backend.__name__}:{backend.fastres.__name__}"}
    installed = [entry.name for entry in entry_points(group="torch_dynamo_backends")]
    if "fastres" not in installed:
        monkeypatch.setitem(registry._COMPILER_FNS, "fastres", backend.fastres)
        monkeypatch.setitem(registry._BACKENDS, "fastres", None)
    compiled = torch.compile(net(), backend="fastres", options={"rest": "eager"})
    compiled(images()).sum().backward()


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ({"fuse": "some"}, None, "'fuse' must be 'auto' or 'all', got 'some'"),
        ({"rest": "eager", "max_autotune": True}, None, "option 'max_autotune': for inductor"),
        ({"rest": "eager"}, "reduce-overhead", "mode 'reduce-overhead': for inductor alone"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, mode, message):
    def compile_graph(gm, inputs):
        return backend.fastres(gm, inputs, mode=mode, options=options)

    with pytest.raises((ValueError, BackendCompilerFailed), match=message):
        torch.compile(net(), backend=compile_graph)(images())


def test_explain_names_every_convolution_and_leaves_the_network_alone(capsys):
    model = net()
    model.extra = nn.Conv2d(3, 3, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fastres.explain(model, images())
    assert capsys.readouterr().out == f"{found}\n"
    assert (found.num_fused, found.num_graphs) == (6, 1)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(row.name for row in found.rows) == sorted(names)
    runs = {row.name: (row.shape, row.runs) for row in found.rows}
    assert runs["conv1"] == ("3x3 3->8", "fused: convolution, norm, ReLU")
    assert runs["extra"] == ("", "as before: no graph holds it")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_explain_says_why():
    model = net().eval()
    reasons = {row.reason for row in fastres.explain(model, images(), verbose=False).rows}
    assert reasons == {"batch norm in evaluation, with gradients"}
    with torch.no_grad():
        assert fastres.explain(model, images(), verbose=False).num_fused == 6


def shapes(k: int, c: int, dtype: torch.dtype):
    return torch.empty(2, c, 16, 16, dtype=dtype), [(torch.empty(k, c, 3, 3), 1, 1)]


def test_what_inductor_does_faster_is_left_to_it(monkeypatch):
    monkeypatch.setattr(kernel_status, "is_interpreted", lambda: False)
    monkeypatch.setattr(kernel_status.cpu_build, "unavailable", lambda: None)
    monkeypatch.setattr(cpu_backend.cpu_build, "has_fused_conv", lambda: True)
    why = kernel_status.why_slower_than_inductor
    assert why(*shapes(16, 16, torch.bfloat16)) is None
    assert "no fused convolution" in why(*shapes(512, 512, torch.bfloat16))
    assert "bfloat16" in why(*shapes(16, 16, torch.float32))
    assert "no kernels for torch.float64" in why(*shapes(16, 16, torch.float64))
    left = fastres.explain(net(), images(), verbose=False)
    assert left.num_fused == 0
    assert fastres.explain(net(), images(), options={"fuse": "all"}, verbose=False).num_fused == 6
    monkeypatch.setattr(kernel_status.cpu_build, "unavailable", lambda: "no compiler")
    assert why(*shapes(16, 16, torch.bfloat16)) == "no compiler"
