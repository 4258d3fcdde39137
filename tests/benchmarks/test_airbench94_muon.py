"""The peer airbench94_muon: its steps, batches and views equal a slow rewrite in float64."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import airbench94_muon as peer
from fastres.data.synthetic import synthetic_dataset

CPU = torch.device("cpu")
# Float64 rounding, grown by steps: the polynomial multiplies small singular values by 41.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture(scope="module")
def data():
    return synthetic_dataset(16, 6)


@pytest.fixture
def small(data):
    """A narrow net on two batches an epoch, in float64 throughout."""
    return peer.Airbench94Muon(
        data, CPU, epochs=2, batch_size=8, widths=(6, 8, 8), dtype=torch.float64
    )


def slow_pool(x, size):
    windows = x.unfold(2, size, size).unfold(3, size, size)
    return windows.flatten(4).amax(4)


def slow_logits(weights, images):
    """The net in training mode, from its formulas."""

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def norm(x, bias):
        mean = x.mean((0, 2, 3), keepdim=True)
        rstd = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True).add(1e-12).rsqrt()
        return (x - mean) * rstd + bias.view(-1, 1, 1)

    x = gelu(F.conv2d(images, weights["whiten.weight"], weights["whiten.bias"]))
    for group in range(3):
        name = f"groups.{group}"
        x = slow_pool(F.conv2d(x, weights[f"{name}.conv1.weight"], padding=1), 2)
        x = gelu(norm(x, weights[f"{name}.norm1.bias"]))
        x = F.conv2d(x, weights[f"{name}.conv2.weight"], padding=1)
        x = gelu(norm(x, weights[f"{name}.norm2.bias"]))
    features = slow_pool(x, 3).flatten(1)
    return features @ weights["head.weight"].T / features.shape[1]


def slow_loss(logits, labels):
    """Smoothed by 0.2 and summed."""
    log_probs = logits.log_softmax(1)
    targets = 0.8 * F.one_hot(labels, logits.shape[1]) + 0.2 / logits.shape[1]
    return -(targets * log_probs).sum()


def slow_update(gradient, momentum, weight, lr):
    """Muon by singular values instead of products of matrices."""
    momentum = 0.6 * momentum + gradient
    ahead = (gradient + 0.6 * momentum).flatten(1)
    left, values, right = torch.linalg.svd(ahead, full_matrices=False)
    values = values / (values.square().sum().sqrt() + 1e-7)
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    update = (left * values @ right).view_as(weight)
    return weight * len(weight) ** 0.5 / weight.square().sum().sqrt() - lr * update, momentum


def test_steps_equal_a_slow_rewrite(small, monkeypatch):
    """Four steps, the first layer's bias trained in three: every weight, rate and momentum."""
    torch.manual_seed(1)
    batches = [(torch.randn(8, 3, 32, 32).double(), torch.randint(10, (8,))) for _ in range(4)]
    served = iter(batches)
    monkeypatch.setattr(peer._Batches, "serve", lambda self, epoch: itertools.islice(served, 2))
    small._reset(0)
    weights = {k: v.clone() for k, v in small.net.named_parameters()}
    small._train(small._train_labels, 4, 3)
    weights["whiten.weight"] = small.net.whiten.weight
    trained = [name for name, weight in small.net.named_parameters() if weight.requires_grad]
    momenta = {name: torch.zeros_like(weights[name]) for name in trained}
    for step, (images, labels) in enumerate(batches):
        leaves = {k: v.detach().requires_grad_(k in trained) for k, v in weights.items()}
        loss = slow_loss(slow_logits(leaves, images), labels)
        gradients = torch.autograd.grad(loss, [leaves[name] for name in trained])
        for name, gradient in zip(trained, gradients, strict=True):
            weight = leaves[name].detach()
            if weight.ndim == 4:
                lr = 0.24 * (1 - step / 4)
                weights[name], momenta[name] = slow_update(gradient, momenta[name], weight, lr)
                continue
            if name == "whiten.bias" and step >= 3:
                continue
            peak = 0.67 if name == "head.weight" else 0.053
            lr = peak * (1 - step / (3 if name == "whiten.bias" else 4))
            gradient = gradient + 2e-6 * 8 / peak * weight
            momenta[name] = 0.85 * momenta[name] + gradient
            weights[name] = weight - lr * (gradient + 0.85 * momenta[name])
    for name, weight in small.net.named_parameters():
        torch.testing.assert_close(weight.detach(), weights[name].detach(), **CLOSE)


def test_a_run_starts_like_the_published_one(small):
    net = peer.AirbenchNet(widths=(26, 8, 8)).double()
    assert net.head.weight.std().item() == pytest.approx(1, rel=1e-6)
    first = net.groups[0].conv1.weight
    # 24 of 26 filters pass the 24 channels of the first layer on.
    assert torch.equal(first[:24, :, 1, 1], torch.eye(24).double())
    images = small._normalized(small._train_images)
    net.set_whitening(images)
    filters = net.whiten.weight
    assert torch.equal(filters[12:], -filters[:12])
    outputs = F.conv2d(images, filters[:12]).movedim(1, 3).reshape(-1, 12)
    covariance = outputs.T @ outputs / len(outputs)
    diagonal = covariance.diagonal()
    assert (covariance - diagonal.diag()).abs().max() < 1e-9
    # Components of a variance far above 5e-4 come out at 1.
    assert 0.99 < diagonal[-1] < 1


def test_batches_are_shifted_and_mirrored_in_turns(data):
    images = torch.from_numpy(data.train.images.copy()).permute(0, 3, 1, 2).double()
    labels = torch.arange(16)
    torch.manual_seed(0)
    batches = peer._Batches(images, labels, 6)
    seen = []
    for epoch in (0, 1):
        found = {}
        for pictures, names in batches.serve(epoch):
            assert pictures.shape == (6, 3, 32, 32)
            for picture, name in zip(pictures, names.tolist(), strict=True):
                padded = F.pad(images[name : name + 1], (2,) * 4, mode="reflect")[0]
                matches = [
                    (flip, top, left)
                    for flip, top, left in itertools.product((False, True), range(5), range(5))
                    if torch.equal(
                        picture, (padded.flip(2) if flip else padded)[:, top:, left:][:, :32, :32]
                    )
                ]
                assert len(matches) == 1
                found[name] = matches[0]
        # Two whole batches of 16 images, none of them twice.
        assert len(found) == 12
        seen.append(found)
    both = seen[0].keys() & seen[1].keys()
    assert all(seen[0][name][0] != seen[1][name][0] for name in both)
    assert {flip for flip, _, _ in seen[0].values()} == {False, True}
    assert len({place[1:] for found in seen for place in found.values()}) > 8


def test_six_views_are_weighed_as_published(small):
    small._reset(3)
    views, plain = small._evaluate(small._test_images)
    images = small._normalized(small._test_images)
    net = small.net.eval()
    expected = torch.zeros_like(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain, net(images), **CLOSE)
        for shift, share in ((0, 0.5), (-1, 0.25), (1, 0.25)):
            around = F.pad(images, (1,) * 4, mode="reflect")
            moved = around[:, :, 1 + shift : 33 + shift, 1 + shift : 33 + shift]
            expected += share / 2 * (net(moved) + net(moved.flip(3)))
    torch.testing.assert_close(views, expected, **CLOSE)


def test_a_seed_decides_a_run_whatever_ran_before(small):
    first = small.run(5)
    weights = {k: v.clone() for k, v in small.net.state_dict().items()}
    small.warm_up()
    assert small.run(5)["test_accuracy"] == first["test_accuracy"]
    assert all(torch.equal(v, weights[k]) for k, v in small.net.state_dict().items())
    assert 0 < first["train_seconds"] < first["seconds"]


def test_the_command_prints_one_json_line(data, monkeypatch, capsys):
    """In the precision of this machine; the net of the published widths has 0.74 GFLOP an image."""
    assert peer.AirbenchNet().head.weight.shape == (10, 256)
    flops = peer.summarize(peer.AirbenchNet()).training_flops
    assert flops == pytest.approx(0.29e15 / (8 * 50_000), rel=0.03)
    monkeypatch.setattr(peer.fastres, "load_dataset", lambda *_: data)
    monkeypatch.setattr(
        peer.Airbench94Muon.__init__,
        "__kwdefaults__",
        {**peer.Airbench94Muon.__init__.__kwdefaults__, "widths": (8, 8, 8)},
    )
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    words = ["--epochs", "1", "--batch-size", "5", "--limit", "10", "--threads", "1"]
    assert peer.main([*words, "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 <= result["test_accuracy"] <= 100
    assert (result["train_images"], result["batch_size"]) == (10, 5)
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert peer.main(["--batch-size", "50"]) == 2
    assert "between 1 and 16" in capsys.readouterr().err
