"""Named sets of hyper-parameters: what `--recipe` starts from."""

from typing import Any

from fastres.config import Config
from fastres.errors import UsageError

__all__ = ["RECIPES", "from_recipe"]

RECIPES: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores, seconds on a GPU; after that a narrow net gains little.
    "quick": {
        "model": "resnet9",
        "width": 0.25,
        "epochs": 12.0,
        "batch_size": 128,
        "lr": 0.25,
        "warmup": 0.2,
        "label_smoothing": 0.1,
        "whiten": True,
        # A short run needs less variety, and none of its images twice the same way.
        "crop_padding": 2,
        "flip": "alternating",
    },
    # A ResNet-20 close to the paper's accuracy in a fifth of the paper's time.
    "standard": {
        "model": "resnet20",
        "epochs": 30.0,
        "batch_size": 256,
        "lr": 0.4,
        "schedule": "one-cycle",
        "warmup": 0.2,
    },
    # He et al. 2015, section 4.2: 64,000 steps of 128 images, the rate divided by 10 at 32,000 and
    # 48,000. Two differences: the momentum is Nesterov's, and batch norm does not decay.
    "paper": {
        "model": "resnet20",
        "shortcut": "A",
        "epochs": 164.0,
        "batch_size": 128,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "schedule": "steps",
        "warmup": 0.0,
    },
    # The most accurate: a wide net, 200 epochs, cosine.
    "accurate": {
        "model": "resnet18",
        "epochs": 200.0,
        "batch_size": 128,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "warmup": 0.025,
        "cutout": 16,
    },
}


def from_recipe(name: str) -> Config:
    """Return the options that the recipe `name` stands for.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    return Config(recipe=name, **RECIPES[name])
