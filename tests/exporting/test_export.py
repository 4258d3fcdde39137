"""Exported files compute what the network computes, for any batch; the Hub's folder reads back."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastres
import fastres.errors
from fastres import export
from fastres.exporting.folded import Deployed, fold_batch_norm
from fastres.exporting.graphs import open_onnx, open_torch_export
from fastres.inference.trained import load
from tests.helpers.community_nets import with_random_norms
from tests.helpers.data_fixtures import image_folder
from tests.helpers.tiny_run import TINY_NET, run_train

CLASSES = ("cat", "dog", "eel")
# Options of `create_model`, and how many batch norms stand behind a max pool.
NETS = {
    "resnet8 A": ({"name": "resnet8", "shortcut": "A"}, 0),
    "resnet8 B": ({"name": "resnet8"}, 0),
    "plain8": ({"name": "plain8"}, 0),
    "resnet9_small": ({"name": "resnet9_small"}, 3),
    "resnet11": ({"name": "resnet11"}, 3),
    "resnet18 pool": ({"name": "resnet18", "stem": "pool"}, 0),
    "resnet50": ({"name": "resnet50"}, 0),
    "resnet50 imagenet A": ({"name": "resnet50", "stem": "imagenet", "shortcut": "A"}, 0),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data") / "mine", CLASSES, per_class=12)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Three seeds of one recipe."""
    folder = tmp_path_factory.mktemp("runs")
    words = (*TINY_NET, "--batch-size", "10", "--epochs", "1", "--data-dir", data)
    for seed in range(3):
        assert run_train(*words, "--seed", seed, "--out", folder / str(seed)) == 0
    return [str(folder / str(seed)) for seed in range(3)]


@pytest.mark.parametrize("name", NETS)
def test_folded_batch_norm_computes_the_same(name):
    options, behind_pools = NETS[name]
    model = fastres.create_model(num_classes=10, width=0.25, seed=0, **options)
    model = with_random_norms(model).cpu().eval()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            # A negative scale is where folding past a max pool would be wrong.
            module.weight.data[::2] *= -1
    model.get_parameter("conv1.weight").requires_grad_(False)  # as --freeze-stem leaves it
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norm(model)
    left = sum(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert left == behind_pools
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model(x)
        allowed = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(folded(x), wanted, rtol=0, atol=allowed)


def test_normalisation_is_inside():
    deployed = Deployed(torch.nn.Identity(), (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    found = deployed(torch.ones(1, 3, 2, 2))[0, :, 0, 0]
    assert found.tolist() == [1.0, 3.0, 1.0]


@pytest.mark.parametrize(("kind", "suffix"), [("onnx", ".onnx"), ("torch-export", ".pt2")])
def test_a_file_computes_what_the_network_computes(kind, suffix, runs, tmp_path, capsys):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    out = tmp_path / f"net{suffix}"
    assert export.main([runs[0], "--format", kind, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checked_images"] == found["same_class"] == 36
    assert found["bytes"] == out.stat().st_size
    if kind == "onnx":
        import onnx

        graph = onnx.load(out).graph
        assert "BatchNormalization" not in {node.op_type for node in graph.node}
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
    run = open_onnx(out) if kind == "onnx" else open_torch_export(out)
    network = load(runs[0])
    for count in (1, 2, 7):
        images = np.random.default_rng(count).random((count, 3, 32, 32), dtype=np.float32)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (network.mean, network.std))
        with torch.no_grad():
            wanted = network((torch.from_numpy(images) - mean) / std).numpy()
        np.testing.assert_allclose(run(images), wanted, rtol=1e-4, atol=1e-4)


def test_int8_says_what_it_costs(runs, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "net.onnx"
    words = [runs[0], "--format", "onnx", "--out", str(out), "--int8", "--json"]
    assert export.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "net.int8.onnx").stat().st_size == found["int8_bytes"]
    assert found["calibrated_on"].endswith("training images")
    for what in ("float32", "int8"):
        assert 0 <= found[what]["accuracy"] <= 100
        assert found[what]["images_per_second"] > 0
    import onnx

    kinds = {
        weights.data_type for weights in onnx.load(tmp_path / "net.int8.onnx").graph.initializer
    }
    assert onnx.TensorProto.INT8 in kinds
    images = np.random.default_rng(0).random((20, 3, 32, 32), dtype=np.float32)
    plain, small = (open_onnx(tmp_path / name)(images) for name in ("net.onnx", "net.int8.onnx"))
    assert 0 < np.abs(small - plain).max() < 0.5 * np.abs(plain).max()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_file_that_computes_something_else_fails(value, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "fastres.exporting.graphs.open_torch_export",
        lambda path: lambda images: np.full((len(images), 3), value, np.float32),
    )
    out = tmp_path / "x.pt2"
    assert export.main([runs[0], "--format", "torch-export", "--out", str(out)]) == 1
    assert "does not compute what the network does" in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_package_is_named_before_anything_is_written(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export.main([runs[0], "--format", "onnx", "--out", str(tmp_path / "x.onnx")]) == 2
    assert "--format onnx needs onnx: pip install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_safetensors_is_the_plain_state_dict(runs, tmp_path):
    out = tmp_path / "net.safetensors"
    assert export.main([runs[0], "--format", "safetensors", "--out", str(out)]) == 0
    state = load_file(out)
    model = fastres.create_model("resnet8", 3, width=0.25, shortcut="A")
    model.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), load(runs[0])(x))


def hub(runs, out, *words):
    return export.main([*runs, "--format", "hub", "--out", str(out), "--license", "mit", *words])


def test_a_hub_folder_reads_back(runs, tmp_path, data):
    assert hub(runs, tmp_path / "hub") == 0
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md"}
    network = fastres.load(tmp_path / "hub")
    assert network.classes == CLASSES
    image = next((data / "test" / "cat").iterdir())
    assert fastres.predict(tmp_path / "hub", image) == fastres.predict(runs[0], image)


def test_the_card_has_seeds_mean_and_spread(runs, tmp_path):
    assert hub(runs, tmp_path / "hub") == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\n')
    assert "Over 3 seeds (0, 1, 2):" in card
    for word in ("standard deviation", "recipe `quick`", "| commit of fastres |", "fastres.load"):
        assert word in card
    assert hub(runs[:1], tmp_path / "one") == 0
    assert "One run; how far seeds spread" in (tmp_path / "one" / "README.md").read_text()


def test_what_a_summary_says_is_text_in_the_card(runs, tmp_path):
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    summary = json.loads((run / "summary.json").read_text())
    summary["command"] = "fastres.train --data-dir /home/me/my/data `x`|y\n\n# <b>Not a heading</b>"
    (run / "summary.json").write_text(json.dumps(summary))
    assert hub([str(run)], tmp_path / "hub") == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    [line] = [line for line in card.splitlines() if line.startswith("| command |")]
    assert ".../data" in line
    assert "/home/me" not in card
    assert "\\`x\\`\\|y" in line
    assert line.endswith(" |")
    assert "\n# \\<" not in card
    assert "<b>" not in card.replace("\\<b\\>", "")


def test_the_card_names_the_views_of_its_accuracy(runs, tmp_path):
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"tta": "flip"}))
    assert hub([str(run)], tmp_path / "hub") == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "(seed 0), with test-time augmentation (flip): " in card


def test_a_card_says_nothing_that_is_not_known(runs, tmp_path, capsys):
    """A folder of the Hub has no run, and weights by themselves no recipe."""
    assert hub(runs[:1], tmp_path / "hub") == 0
    assert hub([str(tmp_path / "hub")], tmp_path / "again") == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "The test accuracy is not known" in card
    assert "trained with fastres" not in card
    assert "| seed |" not in card
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    summary = json.loads((run / "summary.json").read_text())
    del summary["epochs"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert hub([str(run)], tmp_path / "other") == 1
    assert "is not what a run writes" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_folder_of_something_else_is_never_overwritten(runs, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    for folder in (mine, Path(runs[1])):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert hub(runs[:1], folder, "--overwrite") == 2
        assert "holds files of something else" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert hub(runs[:1], tmp_path / "hub") == 0
    assert hub(runs[:1], tmp_path / "hub") == 2
    assert "is there already" in capsys.readouterr().err
    assert hub(runs[:1], tmp_path / "hub", "--overwrite") == 0


def test_the_mixin_of_the_hub_reads_it(runs, tmp_path):
    pytest.importorskip("huggingface_hub")
    from fastres.hub import HubNetwork

    assert hub(runs[:1], tmp_path / "hub") == 0
    found = HubNetwork.from_pretrained(tmp_path / "hub")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found(x), load(runs[0])(x))
    found.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").exists()
    with torch.no_grad():
        assert torch.equal(fastres.load(tmp_path / "again")(x), found(x))
    # The mixin itself would leave what is missing as it was drawn.
    path = tmp_path / "again" / "model.safetensors"
    state = load_file(path)
    del state["fc.bias"]
    save_file(state, path)
    with pytest.raises(fastres.errors.FailureError, match=r"lacks fc\.bias"):
        HubNetwork.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["R", "--format", "hub", "--out", "O"], "needs --license"),
        (["R", "--format", "onnx", "--out", "O", "--license", "mit"], "--license is for"),
        (["R", "--format", "hub", "--out", "O", "--license", "mit", "--int8"], "--int8 is for"),
        (["R", "--format", "hub", "--out", "O", "--license", ""], "must be a licence"),
        (["R", "--format", "hub", "--out", "O", "--license", "mit\nx: y"], "must be a licence"),
        (
            ["R", "--format", "onnx", "--out", "/no/folder/net.onnx"],
            "there is no folder /no/folder",
        ),
        (["R", "R", "--format", "onnx", "--out", "O"], "several runs are for"),
        (["R", "--format", "onnx", "--out", "O", "--check-images", "0"], "at least 1"),
        (["R", "--format", "safetensors", "--out", "O", "--data-dir", "."], "--data-dir and"),
        (
            ["R", "--format", "hub", "--out", "O", "--license", "mit", "--checkpoint", "last"],
            "about a run's result",
        ),
        (["R", "R", "--format", "hub", "--out", "O", "--license", "mit"], "the same seed"),
        (["nowhere", "--format", "onnx", "--out", "O"], "there is no run"),
    ],
)
def test_wrong_use_is_one_sentence(words, message, runs, tmp_path, capsys):
    known = {"R": runs[0], "O": str(tmp_path / "out")}
    assert export.main([known.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_nothing_is_overwritten_unasked(runs, tmp_path, capsys):
    out = tmp_path / "net.safetensors"
    out.write_text("mine")
    words = [runs[0], "--format", "safetensors", "--out", str(out)]
    assert export.main(words) == 2
    assert "is there already" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert export.main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize("change", [{"model": "resnet999"}, {"classes": "cat"}, {"extra": 1}])
def test_a_strangers_hub_folder_is_checked(change, runs, tmp_path):
    assert hub(runs[:1], tmp_path / "hub") == 0
    path = tmp_path / "hub" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(fastres.errors.FastresError):
        fastres.load(tmp_path / "hub")
