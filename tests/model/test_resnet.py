"""The reference networks: sizes of the paper, the two design rules, shortcuts, initial weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres import create_model
from fastres.errors import UsageError
from fastres.model.resnet import MODELS, BasicBlock, ZeroPadShortcut
from fastres.model.summary import summarize
from fastres.model.whiten import whiten_stem

# He et al. 2015, table 6: parameters in millions, with zero-padding shortcuts.
PAPER_MILLIONS = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85}


@pytest.mark.parametrize(("name", "millions"), PAPER_MILLIONS.items())
def test_parameters_equal_the_paper(name, millions):
    params = summarize(create_model(name, shortcut="A")).params
    assert round(params / 1e6, 2) == millions


def test_resnet110_has_the_papers_1_7_million_parameters():
    assert round(summarize(create_model("resnet110", shortcut="A")).params / 1e6, 1) == 1.7


@pytest.mark.parametrize(("name", "params"), [("resnet18", 11_173_962), ("resnet50", 23_520_842)])
def test_wide_nets_have_the_known_size_of_their_cifar_form(name, params):
    assert summarize(create_model(name)).params == params


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [1.0, 0.3])
def test_same_map_same_filters_and_half_the_map_twice_the_filters(name, width):
    """Judged by the 3x3 convolutions, which are the layers that the paper's rules speak of."""
    model = create_model(name, width=width)
    kernels = {n: m.kernel_size for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    filters_of = {}
    for layer in summarize(model).layers:
        # The conv that stands before a pool still has the larger map, and belongs to the next size.
        if kernels.get(layer.name) == (3, 3) and not layer.name.endswith(".conv"):
            filters, size, _ = layer.output
            filters_of.setdefault(size, set()).add(filters)
    sizes = sorted(filters_of, reverse=True)
    assert len(sizes) >= 3 or name == "resnet9"
    assert all(len(filters) == 1 for filters in filters_of.values())
    for size in sizes:
        (filters,) = filters_of[size]
        assert filters * size == next(iter(filters_of[32])) * 32


@pytest.mark.parametrize("name", MODELS)
def test_every_model_maps_images_to_logits_and_trains(name):
    model = create_model(name, num_classes=7, width=0.125)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([0, 6])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_depth_counts_the_weighted_layers():
    for name in ("resnet20", "resnet56", "plain32", "resnet18", "resnet34", "resnet50"):
        layers = summarize(create_model(name, shortcut="A" if "50" not in name else "B")).layers
        weighted = [
            x for x in layers if x.kind in ("Conv2d", "Linear") and "downsample" not in x.name
        ]
        assert len(weighted) == int(name.removeprefix("resnet").removeprefix("plain"))


def test_flops_of_resnet20_equal_a_count_by_hand():
    stem = 1024 * 3 * 9 * 16
    first = 6 * 1024 * 16 * 9 * 16
    second = 256 * 16 * 9 * 32 + 5 * 256 * 32 * 9 * 32
    third = 64 * 32 * 9 * 64 + 5 * 64 * 64 * 9 * 64
    macs = stem + first + second + third + 640
    assert summarize(create_model("resnet20", shortcut="A")).forward_flops == 2 * macs


def test_a_block_is_relu_of_residual_plus_shortcut():
    block = BasicBlock(4, 4, 1, "B").eval()
    x = torch.randn(2, 4, 8, 8)
    residual = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(residual + x))
    nn.init.zeros_(block.bn2.weight)
    torch.testing.assert_close(block(x), F.relu(x))


def test_a_plain_block_has_no_shortcut():
    block = BasicBlock(4, 4, 1, "none").eval()
    nn.init.zeros_(block.bn2.weight)
    assert block(torch.ones(1, 4, 8, 8)).abs().max() == 0


def test_zero_padding_keeps_every_second_pixel_and_adds_silent_channels():
    x = torch.arange(2 * 2 * 4 * 4.0).view(2, 2, 4, 4)
    out = ZeroPadShortcut(2, 5, 2)(x)
    assert out.shape == (2, 5, 2, 2)
    torch.testing.assert_close(out[:, 1:3], x[:, :, ::2, ::2])
    assert out[:, [0, 3, 4]].abs().max() == 0


def test_shortcut_a_has_no_parameters_and_b_projects():
    a, b = (create_model("resnet20", shortcut=kind).state_dict() for kind in ("A", "B"))
    assert not [key for key in a if "downsample" in key]
    projections = {key for key in b if "downsample.0" in key}
    assert projections == {"layer2.0.downsample.0.weight", "layer3.0.downsample.0.weight"}


def test_a_seed_decides_the_weights_and_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (create_model("resnet8", seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(torch.rand(3), expected)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_whitening_makes_the_first_outputs_uncorrelated():
    rng = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(64, 3, 8, 8, generator=rng), 32, mode="bilinear")
    images = (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    model = create_model("resnet9", width=0.25, seed=0)
    mean = tuple((images.double() / 255).mean(dim=(0, 1, 2)).tolist())
    std = tuple((images.double() / 255).std(dim=(0, 1, 2)).tolist())
    whiten_stem(model, images.numpy(), mean, std)
    x = ((images / 255.0 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    y = model.conv1(x)[:, :8, 1:-1, 1:-1].transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(y)
    assert (correlation - torch.eye(8)).abs().max() < 0.05
    torch.testing.assert_close(model.conv1.weight[8:], -model.conv1.weight[:8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet21"}, "the models are .*resnet20.*plain56"),
        ({"name": "resnet20", "shortcut": "C"}, "'A' or 'B'"),
        ({"name": "resnet20", "width": 0.01}, "at least one filter"),
        ({"name": "resnet20", "num_classes": 0}, "at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        create_model(**arguments)
