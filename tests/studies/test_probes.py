"""Gradients and responses of a network: against autograd, by hand, and where F(x) is zero."""

import pytest
import torch
import torch.nn.functional as F

from fastres import create_model
from fastres.model.resnet import BasicBlock
from fastres.studies.probes import first_layer_gradient, measure_responses


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def net(name, **options):
    return create_model(name, width=0.25, shortcut="A", seed=0, **options)


def blocks_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BasicBlock)}


def test_a_branch_whose_last_batch_norm_has_no_gain_adds_nothing(images):
    model = net("resnet14")
    torch.nn.init.zeros_(blocks_of(model)["layer2.1"].bn2.weight)
    layers, blocks = measure_responses(model, images)
    assert [block["block"] for block in blocks] == list(blocks_of(model))
    assert all((b["residual_rms"] == 0) == (b["block"] == "layer2.1") for b in blocks)
    assert all((x["std"] == 0) == (x["layer"] == "layer2.1.bn2") for x in layers)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_responses_are_those_of_a_forward_by_hand(shortcut, images):
    model = create_model("resnet8", width=0.25, shortcut=shortcut, seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.running_mean, 0, 0.2)
    layers, blocks = measure_responses(model, images)
    with torch.no_grad():
        x = model.bn1(model.conv1(images))
        stds, shares, x = [x.std(correction=0)], [], F.relu(x)
        for block in blocks_of(model).values():
            first = block.bn1(block.conv1(x))
            branch = block.bn2(block.conv2(F.relu(first)))
            added = x if block.downsample is None else block.downsample(x)
            stds += [first.std(correction=0), branch.std(correction=0)]
            shares.append(branch.norm() / added.norm())
            x = F.relu(branch + added)
    assert [layer["std"] for layer in layers] == pytest.approx([s.item() for s in stds], rel=1e-5)
    found = [block["residual_rms"] / block["shortcut_rms"] for block in blocks]
    assert found == pytest.approx([share.item() for share in shares], rel=1e-5)


def test_plain_nets_have_no_shortcut_and_start_as_the_residual_ones(images):
    for depth in (8, 14, 110):
        plain, residual = net(f"plain{depth}"), net(f"resnet{depth}")
        assert not any(b.residual or b.downsample for b in blocks_of(plain).values())
        assert all(block.residual for block in blocks_of(residual).values())
        pairs = zip(plain.state_dict().items(), residual.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)
    layers, blocks = measure_responses(net("plain14"), images)
    assert len(layers) == 13
    assert blocks == []


def test_the_gradient_of_the_first_layer_is_autograds(images):
    model, labels = net("resnet8"), torch.arange(6)
    F.cross_entropy(model(images), labels).backward()
    expected = sum(x**2 for x in model.conv1.weight.grad.double().flatten().tolist()) ** 0.5
    again = net("resnet8")
    before = {name: value.clone() for name, value in again.named_parameters()}
    assert first_layer_gradient(again, images, labels) == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(before[name], value) for name, value in again.named_parameters())
    assert all(value.grad is None for value in again.parameters())
