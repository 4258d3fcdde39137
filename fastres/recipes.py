"""Named sets of hyper-parameters: what `--recipe` starts from, and where each value came from.

A user's own are files: see recipe_file.py.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fastres.config import Config, changed_options, replaced
from fastres.errors import UsageError

__all__ = [
    "FAMILIES",
    "RECIPES",
    "Family",
    "Origins",
    "Recipe",
    "built_in",
    "from_recipe",
    "origins",
    "resolve",
]

Family = Literal["resnet9", "resnet11", "thin", "deep", "wide", "bottleneck"]
FAMILIES: tuple[Family, ...] = get_args(Family)

# Where the values of a run came from, later sources before earlier: {source: {option: value}}.
Origins = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """Options for every network, and further ones that suit a family of networks.

    thin: the CIFAR nets of 16, 32 and 64 filters, deep: ResNet-110 among them; wide: the ImageNet
    nets of 64 to 512, bottleneck: ResNet-50 among them.

    Attributes:
        common: options for every network; its `model` is the one that is trained by default.
        by_family: those that a family has beside or instead of them.
        base: a name in RECIPES, of the recipe that all of them change; or None.
    """

    common: dict[str, Any]
    by_family: dict[Family, dict[str, Any]] = field(default_factory=dict)
    base: str | None = None

    def for_model(self, model: str) -> dict[str, Any]:
        """Return what `model` has beside the common options."""
        options: dict[str, Any] = {}
        for family in _families(model):
            options = replaced(options, self.by_family.get(family, {}))
        return options


# Rates are of SGD with Nesterov momentum. They grow with the batch: twice the images a step, twice
# the rate (Goyal et al. 2017, https://arxiv.org/abs/1706.02677).
RECIPES: dict[str, Recipe] = {
    # Minutes on two CPU cores, seconds on a GPU; after that a small net gains little.
    "quick": Recipe(
        {
            "model": "resnet11",
            "epochs": 12.0,
            "batch_size": 128,
            "warmup": 0.2,
            "label_smoothing": 0.1,
            # A short run needs less variety, and none of its images twice the same way.
            "crop_padding": 2,
            "flip": "alternating",
        },
        {
            # Found together: this net divides its logits by eight, which a high rate makes up for,
            # and whitening has been measured on it alone.
            "resnet9": {"lr": 0.25, "whiten": True},
            # Muon needs fewer epochs, and these values were found together, its momentum later.
            "resnet11": {
                "epochs": 9.0,
                "batch_size": 256,
                "optimizer": "muon",
                "muon_lr": 0.05,
                "muon_momentum": 0.8,
                "lr": 0.15,
                "bias_lr_scale": 7.0,
                "warmup": 0.1,
                "label_smoothing": 0.2,
                "whiten": True,
                "freeze_stem": True,
                "low_res": 24,
                "low_res_share": 0.4,
                "tta": "multi",
            },
            # The rates of `standard`, at half its batch.
            "thin": {"lr": 0.2},
            "deep": {"lr": 0.1},
            "wide": {"lr": 0.1},
        },
    ),
    # Built for the time to an accuracy on CIFAR-10 alone, 90.5 % of the JPEG copy: 14 epochs fell
    # short of it, three seeds of 18 did not. Other networks get what `quick` has.
    # In runs of three epochs its larger batches cost no accuracy that one seed could show, and a
    # GPU needs them: docs/performance-log.md.
    "speed": Recipe(
        {},
        {"resnet11": {"epochs": 18.0, "batch_size": 512, "muon_lr": 0.08, "lr": 0.3}},
        base="quick",
    ),
    # What a network is known to reach in 200 epochs, in a third of them: by a rate that is at its
    # peak for a step and falls to zero. Its accuracies are not measured yet. The thin nets have no
    # capacity to spare, and get crops and flips alone.
    "standard": Recipe(
        {
            "model": "resnet20",
            "epochs": 65.0,
            "batch_size": 256,
            "schedule": "one-cycle",
            "warmup": 0.2,
        },
        {
            # That of `quick`, at twice its batch.
            "resnet9": {"lr": 0.5},
            "resnet11": {"lr": 0.4},
            # The paper's 0.1, at twice its batch, and doubled: one-cycle is at its peak for a step.
            "thin": {"lr": 0.4},
            # Not doubled: the paper found its rate slightly too high for the start of this net.
            "deep": {"lr": 0.2},
            # 0.1 for 128 images is what ResNet-18 is commonly trained with on CIFAR. The cutout is
            # that of airbench96, a wide net for 37 epochs (Jordan 2024,
            # https://arxiv.org/abs/2404.00498).
            "wide": {"lr": 0.2, "cutout": 12, "label_smoothing": 0.1},
        },
    ),
    # He et al. 2015, section 4.2; what it leaves open and what differs: docs/recipes.md.
    "paper": Recipe(
        {
            "model": "resnet20",
            "shortcut": "A",
            # The rate is divided by 10 at 32,000 and 48,000.
            "steps": 64_000,
            "batch_size": 128,
            "lr": 0.1,
            "nesterov": False,
            "weight_decay": 1e-4,
            "decay": "all",
            "schedule": "steps",
            "warmup": 0.0,
        },
        {
            # 0.1 is slightly too high to start ResNet-110 with: it takes about 400 steps at 0.01
            # until the training error is below 80 %.
            "deep": {"warmup": 400 / 64_000, "warmup_shape": "constant"},
            # Section 4.1: zero padding is for basic blocks, ResNet-50 and deeper nets project.
            "bottleneck": {"shortcut": "B"},
        },
    ),
    # The most accurate: a wide net, 200 epochs, cosine. CutMix with its paper's alpha (Yun et al.
    # 2019, https://arxiv.org/abs/1905.04899) in every batch, in the place of cutout (DeVries and
    # Taylor 2017, https://arxiv.org/abs/1708.04552). No accuracy of this recipe is measured yet.
    # The average forgets in a thousand steps, less than three epochs.
    "accurate": Recipe(
        {
            "model": "resnet18",
            "epochs": 200.0,
            "batch_size": 128,
            "lr": 0.1,
            "weight_decay": 5e-4,
            "schedule": "cosine",
            "warmup": 0.025,
            "cutmix": 1.0,
            "ema": 0.999,
        }
    ),
}


def _families(model: str) -> list[Family]:
    """The families of a network, the narrower ones last."""
    if model == "resnet11":
        return ["resnet11"]
    if model.startswith("resnet9"):
        return ["resnet9"]
    if model in ("resnet10", "resnet18", "resnet34", "resnet50"):
        return ["wide", "bottleneck"] if model == "resnet50" else ["wide"]
    return ["thin", "deep"] if model == "resnet110" else ["thin"]


def resolve(name: str, recipe: Recipe, model: str | None = None) -> tuple[Config, Origins]:
    """Return the options that `recipe` stands for, and the layers that they came from.

    Args:
        name: of the recipe.
        recipe: what it says.
        model: the network, for the options that go by it; None takes the recipe's own.
    """
    stack = [(name, recipe)]
    while (base := stack[0][1].base) is not None:
        stack.insert(0, (base, RECIPES[base]))
    common: dict[str, Any] = {}
    for _, part in stack:
        common = replaced(common, part.common)
    chosen = common.get("model", Config.model) if model is None else model
    layers: Origins = {}
    for source, part in stack:
        layers[f"recipe {source}"] = part.common
        layers[f"recipe {source} for {chosen}"] = part.for_model(chosen)
    options: dict[str, Any] = {}
    for layer in layers.values():
        options = replaced(options, layer)
    return Config(**options | {"recipe": name, "model": chosen}), layers


def from_recipe(name: str, model: str | None = None) -> Config:
    """Return the options that the recipe `name` of fastres stands for.

    Args:
        name: of the recipe.
        model: the network, for the options that go by it; None takes the recipe's own.

    Raises:
        UsageError: for an unknown name.
    """
    return resolve(name, built_in(name), model)[0]


def built_in(name: str) -> Recipe:
    """Return the recipe `name` of fastres.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in RECIPES:
        raise UsageError(
            f"unknown recipe {name!r}; the recipes are {', '.join(RECIPES)}, and files of your own "
            "that end in .toml or .json"
        )
    return RECIPES[name]


def origins(config: Config, base: Config, layers: Origins) -> Origins:
    """Say where the values of a run came from, plain defaults left out.

    Args:
        config: the options of the run.
        base: those that the command line started from.
        layers: where those came from, later sources before earlier.
    """
    given = changed_options(base.to_json(), config)
    known = {name: value for name, value in base.to_json().items() if name not in given}
    found: Origins = {"the command line": {name: getattr(config, name) for name in given}}
    for source, options in reversed(layers.items()):
        found[source] = {
            name: value
            for name, value in options.items()
            # What a later source has replaced, a length in steps among it, is not told.
            if name not in ("model", "recipe") and name in known and known.pop(name) == value
        }
    return {source: options for source, options in reversed(found.items()) if options}
