"""Weights of seven projects: names, wrappers, hidden layers, normalisation, and the way back.

The networks are rebuilt from their structure, or built by their packages; equality of the logits
is what shows that a conversion is right.
"""

import argparse
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.peers.community_nets import AkamasterResNet, KuangliuBasicBlock, KuangliuResNet
from fastres import convert, evaluate
from fastres.conversion.converter import from_state_dict, to_state_dict
from fastres.conversion.files import read_state_dict, write_state_dict
from fastres.conversion.sources import SOURCES
from fastres.data.dataset import CIFAR10_CLASSES
from fastres.data.synthetic import SYNTHETIC_CLASSES
from fastres.errors import FailureError, UsageError
from fastres.inference.trained import load
from tests.helpers.community_nets import (
    ChenyaofoResNet,
    KuangliuBottleneck,
    KuangliuPreActBlock,
    KuangliuPreActResNet,
    WeiaicunzaiBasicBlock,
    WeiaicunzaiBottleneck,
    WeiaicunzaiResNet,
    with_random_norms,
)

NARROW = (8, 16, 32, 64)
TWO, THREE = (2, 2, 2, 2), (3, 4, 6, 3)


# How the projects' own scripts save: the entry of the dict that holds the state_dict, the prefix of
# its keys, and whether batch norms have counters. The others save the bare state_dict.
SAVED_AS = {"kuangliu": ("net", "module.", True), "akamaster": ("state_dict", "module.", False)}


def of_torchvision(name, num_classes):
    models = pytest.importorskip("torchvision").models
    return getattr(models, name)(num_classes=num_classes)


def huyvnphan(num_classes=10):
    """torchvision's, with a 3x3 stem of stride 1 and the max pool behind it."""
    net = of_torchvision("resnet18", num_classes)
    net.conv1 = torch.nn.Conv2d(3, 64, 3, 1, padding=1, bias=False)
    return net


def of_timm(name):
    return pytest.importorskip("timm").create_model(name, num_classes=10)


NETS = {
    "kuangliu resnet18": ("kuangliu", lambda: KuangliuResNet(KuangliuBasicBlock, TWO, NARROW)),
    "kuangliu resnet50": ("kuangliu", lambda: KuangliuResNet(KuangliuBottleneck, THREE, NARROW)),
    "akamaster resnet20": ("akamaster", lambda: AkamasterResNet((3, 3, 3), option="A")),
    "akamaster resnet32 B": ("akamaster", lambda: AkamasterResNet((5, 5, 5), option="B")),
    "chenyaofo resnet20": ("chenyaofo", lambda: ChenyaofoResNet((3, 3, 3))),
    "chenyaofo resnet56": ("chenyaofo", lambda: ChenyaofoResNet((9, 9, 9), num_classes=100)),
    "huyvnphan resnet18": ("huyvnphan", huyvnphan),
    "weiaicunzai resnet18": (
        "weiaicunzai", lambda: WeiaicunzaiResNet(WeiaicunzaiBasicBlock, TWO, NARROW),
    ),
    "weiaicunzai resnet50": (
        "weiaicunzai", lambda: WeiaicunzaiResNet(WeiaicunzaiBottleneck, THREE, NARROW),
    ),
    "torchvision resnet18": ("torchvision", lambda: of_torchvision("resnet18", 7)),
    "torchvision resnet50": ("torchvision", lambda: of_torchvision("resnet50", 10)),
    "timm resnet34": ("timm", lambda: of_timm("resnet34")),
}  # fmt: skip


def build(name):
    """Return the project and its network, every number of it random."""
    source, make = NETS[name]
    torch.manual_seed(0)
    net = with_random_norms(make()).cpu().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            module.num_batches_tracked.fill_(7)
    return source, net


def saved(net, source, path):
    """Save as the project does."""
    entry, prefix, has_counters = SAVED_AS.get(source, (None, "", True))
    state = {
        prefix + key: value
        for key, value in net.state_dict().items()
        if has_counters or not key.endswith("num_batches_tracked")
    }
    torch.save(state if entry is None else {entry: state, "epoch": 3}, path)
    return path


def assert_same(computed, expected):
    """Only the last pool and the classifier may add in another order."""
    allowed = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(computed, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", NETS)
def test_a_converted_network_computes_the_same(name, tmp_path):
    source, net = build(name)
    file = saved(net, source, tmp_path / "theirs.pth")
    found = from_state_dict(read_state_dict(file), source, file)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected, computed = net(x), found.model(x)
    assert_same(computed, expected)


@pytest.mark.parametrize("name", NETS)
def test_the_way_back_is_the_same_file(name, tmp_path):
    source, net = build(name)
    file = saved(net, source, tmp_path / "theirs.pth")
    found = from_state_dict(read_state_dict(file), source, file)
    write_state_dict(tmp_path / "ours.pth", to_state_dict(found, source), SOURCES[source])
    entry = SAVED_AS.get(source, (None,))[0]
    theirs, ours = (torch.load(path, weights_only=True) for path in (file, tmp_path / "ours.pth"))
    if entry is not None:
        theirs, ours = theirs[entry], ours[entry]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    net.load_state_dict(to_state_dict(found, source))


def test_the_hidden_pool_is_not_forgotten(tmp_path):
    """kuangliu's and huyvnphan's ResNet-18 have the same shapes, and compute different things."""
    _, net = build("huyvnphan resnet18")
    file = saved(net, "huyvnphan", tmp_path / "theirs.pt")
    state = read_state_dict(file)
    right = from_state_dict(state, "huyvnphan", file).model
    wrong = from_state_dict(
        {
            k.replace("fc.", "linear.").replace("downsample", "shortcut"): v
            for k, v in state.items()
        },
        "kuangliu",
        file,
    ).model
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_same(right(x), net(x))
        assert (wrong(x) - net(x)).abs().max() > 0.01 * net(x).abs().max()


@pytest.mark.parametrize("prefixes", ["module.", "_orig_mod.module.", "model._orig_mod.", "model."])
def test_prefixes_come_off(prefixes, tmp_path):
    _, net = build("chenyaofo resnet20")
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {prefixes + k: v for k, v in net.state_dict().items()}}, path)
    assert read_state_dict(path).keys() == net.state_dict().keys()


def test_averaged_weights_are_taken_when_asked_for(tmp_path):
    _, net = build("chenyaofo resnet20")
    plain = net.state_dict()
    average = {k: v + 1 for k, v in plain.items()}
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": plain, "state_dict_ema": average, "epoch": 1, "arch": "x"}, path)
    assert torch.equal(read_state_dict(path)["fc.bias"], plain["fc.bias"])
    assert torch.equal(read_state_dict(path, ema=True)["fc.bias"], plain["fc.bias"] + 1)
    torch.save(plain, path)
    with pytest.raises(FailureError, match="holds no averaged weights"):
        read_state_dict(path, ema=True)


def test_a_training_checkpoint_of_timm_is_read(tmp_path):
    """It holds its options in a Namespace, which torch refuses unless told that it is harmless."""
    _, net = build("chenyaofo resnet20")
    path = tmp_path / "last.pth.tar"
    options = argparse.Namespace(model="resnet18", lr=0.1)
    torch.save({"state_dict": net.state_dict(), "args": options, "version": 2}, path)
    assert read_state_dict(path).keys() == net.state_dict().keys()


def test_half_precision_and_safetensors_are_read(tmp_path):
    _, net = build("chenyaofo resnet20")
    path = tmp_path / "x.safetensors"
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, path
    )
    state = read_state_dict(path)
    assert state["fc.weight"].dtype == torch.float32
    from_state_dict(state, "chenyaofo", path)


class Trap:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    path = tmp_path / "trap.pth"
    torch.save({"net": {}, "x": Trap()}, path)
    assert convert.main([str(path), "--from", "kuangliu", "--out", str(tmp_path / "net")]) == 1
    printed = capsys.readouterr()
    assert "code of a stranger" not in printed.out
    assert "to load its print could run code of its author" in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "net").exists()


def test_a_pre_activation_network_is_named(tmp_path):
    net = KuangliuPreActResNet(KuangliuPreActBlock, (2, 2, 2, 2), NARROW)
    file = saved(net, "kuangliu", tmp_path / "x.pth")
    with pytest.raises(FailureError, match="pre-activation networks are not read"):
        from_state_dict(read_state_dict(file), "kuangliu", file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer2.0.bn1.weight"), "lacks layer2.0.bn1.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "has besides extra"),
        (lambda s: s.update({"bn1.weight": torch.zeros(3)}), "another shape bn1.weight"),
        (lambda s: s.pop("fc.weight"), "lacks the classifier, fc.weight"),
        (lambda s: s.pop("conv1.weight"), "lacks the first convolution of chenyaofo's ResNets"),
        (lambda s: s.pop("layer3.2.conv1.weight"), "stages of 3, 3, 2 blocks"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    _, net = build("chenyaofo resnet20")
    state = dict(net.state_dict())
    change(state)
    with pytest.raises(FailureError, match=message):
        from_state_dict(state, "chenyaofo", tmp_path / "x.pt")


@pytest.mark.parametrize("source", ["kuangliu", "huyvnphan", "weiaicunzai", "timm"])
def test_another_project_is_no_silent_success(source, tmp_path):
    """huyvnphan's names are chenyaofo's, too: what differs is the number of stages."""
    _, net = build("chenyaofo resnet20")
    with pytest.raises(FailureError, match=r"stages of 3, 3, 3|lacks"):
        from_state_dict(net.state_dict(), source, tmp_path / "x.pt")
    _, net = build("huyvnphan resnet18")
    with pytest.raises(FailureError, match="stages of 2, 2, 2, 2 blocks"):
        from_state_dict(net.state_dict(), "chenyaofo", tmp_path / "x.pt")


def truncated(path):
    torch.save({"conv1.weight": torch.zeros(16, 3, 3, 3)}, path)
    return path.read_bytes()[:-200]


def truncated_pickle(path):
    state = {"conv1.weight": torch.zeros(16, 3, 3, 3)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()[:-200]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda path: b"", "is no file of torch.save: it is empty"),
        (lambda path: b"<html>not found</html>", "it starts with '<html>not found</html>'"),
        (lambda path: pickle.dumps({"a": 1}, protocol=4), "a pickle that torch.save did not write"),
        (truncated, "is damaged, or no file of torch.save"),
        (truncated_pickle, "is damaged, or no file of torch.save"),
    ],
    ids=["empty", "html", "pickle", "truncated", "truncated pickle"],
)
def test_a_file_of_something_else_is_one_sentence(content, message, tmp_path, capsys):
    path = tmp_path / "x.pth"
    path.write_bytes(content(path))
    assert convert.main([str(path), "--from", "timm", "--out", str(tmp_path / "net")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def endless():
    found = {}
    found["net"] = found
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no state_dict"),
        ({}, "holds no state_dict"),
        ({"epoch": 3}, "'epoch' is no plain tensor"),
        (endless(), "'net' is no plain tensor"),
        ({"w": torch.eye(2).to_sparse()}, "'w' is no plain tensor"),
        ({"w": torch.tensor([float("nan")])}, "w is not finite"),
    ],
    ids=["list", "empty", "number", "endless", "sparse", "nan"],
)
def test_what_is_no_state_dict_is_named(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(FailureError, match=message):
        read_state_dict(tmp_path / "x.pth")


# The command


def test_a_converted_folder_is_a_run(tmp_path, capsys):
    source, net = build("akamaster resnet20")
    file = saved(net, source, tmp_path / "resnet20.th")
    out = tmp_path / "net"
    assert convert.main([str(file), "--from", source, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "resnet20 of width 1, 269,722 parameters, 10 classes, shortcut A" in printed
    assert "classes taken to be airplane, automobile, bird, ..." in printed
    network = load(out)
    assert network.mean == (0.485, 0.456, 0.406)
    assert (network.classes, network.dataset) == (CIFAR10_CLASSES, "cifar10")
    assert network.config.recipe == "converted-akamaster"
    named = ["--classes", *SYNTHETIC_CLASSES, "--overwrite"]
    assert convert.main([str(file), "--from", source, "--out", str(out), *named]) == 0
    assert "taken to be" not in capsys.readouterr().out
    assert load(out).dataset == "folder"
    assert evaluate.main([str(out), "--dataset", "synthetic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] > 0
    back = tmp_path / "back.th"
    assert convert.main([str(out), "--to", source, "--out", str(back)]) == 0
    found = torch.load(back, weights_only=True)
    theirs = torch.load(file, weights_only=True)
    assert found["state_dict"].keys() == theirs["state_dict"].keys()
    assert convert.main([str(out), "--to", source, "--out", str(back)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_wrong_use_is_one_sentence(tmp_path, capsys):
    for words, message in (
        (["x.pth", "--out", "y"], "give one of --from and --to"),
        (["x.pth", "--from", "timm"], "name with --out"),
        (["x.pth", "--from", "timm", "--out", str(tmp_path / "y")], "there is no file at x.pth"),
    ):
        assert convert.main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_project_without_such_a_network_says_so(tmp_path):
    source, net = build("akamaster resnet20")
    file = saved(net, source, tmp_path / "x.th")
    network = from_state_dict(read_state_dict(file), source, file)
    with pytest.raises(UsageError, match="chenyaofo has no network whose shortcuts pad"):
        to_state_dict(network, "chenyaofo")
    with pytest.raises(UsageError, match="torchvision has no resnet20"):
        to_state_dict(network, "torchvision")
    with pytest.raises(UsageError, match="akamaster has no resnet8"):
        to_state_dict(replace(network, config=network.config.replace(model="resnet8")), "akamaster")
    source, net = build("kuangliu resnet18")
    network = from_state_dict(net.state_dict(), source, file)
    with pytest.raises(UsageError, match="start with the stem imagenet, and this one with cifar"):
        to_state_dict(network, "torchvision")


@pytest.mark.parametrize(("source", "count", "mean"), [
    ("kuangliu", 10, (0.4914, 0.4822, 0.4465)),
    ("chenyaofo", 100, (0.5070, 0.4865, 0.4409)),
    ("weiaicunzai", 100, (0.5071, 0.4865, 0.4409)),
    ("akamaster", 10, (0.485, 0.456, 0.406)),
])  # fmt: skip
def test_normalisation_travels(source, count, mean):
    about = SOURCES[source]
    assert about.normalisation.get(count, about.otherwise).mean == mean
