"""The rebuilt nets have the published sizes, and their convolutions are counted rightly."""

import pytest
import torch
from torch import nn

from tests.helpers.community_nets import FULL_NETS, NETS, convs_before_norms
from tests.helpers.interpreter import DEVICE

# As their repositories give them; kuangliu's and weiaicunzai's are those of the same structure.
PUBLISHED = {
    "kuangliu/resnet18": 11_173_962,
    "akamaster/resnet20": 269_722,
    "akamaster/resnet56": 853_018,
    "weiaicunzai/resnet18": 11_220_132,
    "chenyaofo/resnet20": 272_474,
    "chenyaofo/vgg11_bn": 9_756_426,
}


@pytest.mark.parametrize(("name", "params"), PUBLISHED.items())
def test_full_nets_have_the_published_size(name, params):
    assert sum(p.numel() for p in FULL_NETS[name]().parameters()) == params


class OneOfEach(nn.Module):
    """Convolutions that a norm follows, and all that only look so."""

    def __init__(self):
        super().__init__()
        self.counted = nn.Conv2d(3, 4, 3, padding=1)
        self.counted_1x1 = nn.Conv2d(4, 4, 1, stride=2, bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.large = nn.Conv2d(4, 4, 5, padding=2)
        self.before_relu = nn.Conv2d(4, 4, 1)
        self.before_sum = nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        for conv in (self.counted, self.counted_1x1, self.grouped, self.dilated, self.large):
            x = self.norm(conv(x))
        x = self.norm(torch.relu(self.before_relu(x)))
        out = self.before_sum(x)
        out += x
        return self.norm(out)


def test_convolutions_before_a_norm_are_found_by_their_tensors():
    model = OneOfEach().to(DEVICE)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    assert convs_before_norms(model, x) == ["counted", "counted_1x1"]
    assert model.training
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    (*convs, _) = model.children()
    assert not any(module._forward_hooks for module in convs)


@pytest.mark.parametrize(
    ("name", "count"),
    # Of a block with the norms first, the sum changes the last convolution's output in place.
    {"kuangliu/preact": 3, "akamaster/A": 5, "weiaicunzai/bottleneck": 12}.items(),
)
def test_counts_of_tiny_nets(name, count):
    x = torch.randn(1, 3, 8, 8, device=DEVICE)
    assert len(convs_before_norms(NETS[name](), x)) == count
