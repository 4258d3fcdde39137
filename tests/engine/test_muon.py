"""Muon against the same steps written out in fp64; what it leaves alone; loss scaling."""

import pytest
import torch

from fastres.config import Config
from fastres.engine.muon import Muon, orthogonalize
from fastres.engine.optim import Optimizer
from fastres.model.resnet import create_model

LR, MOMENTUM = 0.1, 0.6
SHAPES = [(16, 8, 3, 3), (8, 16, 1, 1), (16, 8, 3, 3)]


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layers(memory_format=torch.channels_last):
    filters = [
        normal(shape, i).contiguous(memory_format=memory_format) for i, shape in enumerate(SHAPES)
    ]
    return [w.requires_grad_() for w in filters]


def give_gradients(params, seed, scale=1.0):
    for i, p in enumerate(params):
        p.grad = torch.empty_like(p).copy_(scale * normal(p.shape, 100 * seed + i))


def newton_schulz(g):
    x = g.double() / g.double().norm()
    for _ in range(3):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


def plain_step(w, buffer, grad):
    """One layer in fp64, its columns in the order of (C, R, S)."""
    buffer = MOMENTUM * buffer + grad.double()
    u = (grad + MOMENTUM * buffer).flatten(1)
    w = w * w.shape[0] ** 0.5 / w.norm()
    return w - LR * newton_schulz(u).view(w.shape), buffer


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("is_tensor", [False, True])
def test_steps_are_those_written_out(memory_format, is_tensor):
    params = layers(memory_format)
    expected = [(p.detach().double(), torch.zeros_like(p, dtype=torch.float64)) for p in params]
    muon = Muon(
        params, torch.tensor(LR) if is_tensor else LR, momentum=MOMENTUM, dtype=torch.float32
    )
    for seed in (1, 2, 3):
        give_gradients(params, seed)
        muon.step()
        expected = [plain_step(*state, p.grad) for state, p in zip(expected, params, strict=True)]
    for p, (w, buffer) in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-5)
        kept = muon.state[p]["momentum_buffer"].double()
        torch.testing.assert_close(kept, buffer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 12, 40), (2, 40, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_come_near_one(shape, dtype):
    """From a tenth of the norm upwards, as the polynomial does; vectors stay."""
    u, _, v = torch.linalg.svd(normal(shape, 0), full_matrices=False)
    values = torch.linspace(0.15, 1.0, 12)
    result = orthogonalize(u * values @ v, dtype).float()
    found = torch.linalg.svdvals(result)
    assert found.min() > 0.3
    assert found.max() < 1.3
    turned = u.mT @ result @ v.mT
    off = turned - torch.diag_embed(torch.diagonal(turned, dim1=1, dim2=2))
    assert off.abs().max() < (1e-5 if dtype == torch.float32 else 0.05)


def test_a_layer_without_a_direction_stays():
    assert orthogonalize(torch.zeros(1, 4, 6)).eq(0).all()
    w = torch.zeros(4, 2, 1, 1, requires_grad=True)
    w.grad = torch.zeros_like(w)
    Muon([w], LR).step()
    assert w.eq(0).all()


def test_layers_move_alike_alone_and_in_a_batch():
    together, alone = layers(), layers()
    give_gradients(together, 1)
    give_gradients(alone, 1)
    Muon(together, LR, dtype=torch.float32).step()
    for w in alone:
        Muon([w], LR, dtype=torch.float32).step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_loss_scale_changes_nothing_and_an_overflow_skips_the_step():
    plain, scaled = layers(), layers()
    rules = [Muon(params, LR, dtype=torch.float32) for params in (plain, scaled)]
    for seed, overflows in ((1, 0.0), (2, 1.0), (3, 0.0)):
        give_gradients(scaled, seed, scale=64.0)
        rules[1].grad_scale = torch.tensor(64.0)
        rules[1].found_inf = torch.tensor(overflows)
        if overflows:
            scaled[0].grad[0] = torch.inf
        else:
            give_gradients(plain, seed)
            rules[0].step()
        rules[1].step()
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_takes_hidden_filters_and_sgd_the_rest():
    model = create_model("resnet8", seed=0)
    model.bn1.weight.requires_grad_(False)
    config = Config(optimizer="muon", lr=0.5, bias_lr_scale=16.0, muon_lr=0.1)
    optimizer = Optimizer(model, config, fused=True)
    muon, sgd = optimizer.rules
    names = [
        {optimizer.names[id(p)] for p in g["params"]} for r in (muon, sgd) for g in r.param_groups
    ]
    hidden = {n for n, p in model.named_parameters() if p.ndim == 4 and n != "conv1.weight"}
    assert names[0] == hidden
    assert names[1] == {"conv1.weight", "fc.weight"}
    others = {n for n, p in model.named_parameters() if p.ndim < 2}
    assert names[2] == others - {"bn1.weight"}
    optimizer.set_lr_factor(0.5)
    rates = [float(group["lr"]) for rule in optimizer.rules for group in rule.param_groups]
    assert rates == pytest.approx([0.05, 0.25, 4.0])
    assert set(optimizer.layout()) == {
        f"{n}.momentum_buffer" for n, p in model.named_parameters() if p.requires_grad
    }
