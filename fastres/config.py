"""The options of a run: one typed dataclass that the command line, files and the API share.

`Config` is flat; the classes that it is made of are the groups of `--help`.

A run's values come from, in rising order: the defaults here, the recipe or a `--config` file, the
command line. What results is written to the run folder as config.json and reads back unchanged.
"""

import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from fastres.errors import UsageError
from fastres.option_files import parse_table

__all__ = [
    "NOT_OF_A_RECIPE",
    "RECIPE_NAME",
    "Config",
    "DataOptions",
    "DatasetKind",
    "LoaderName",
    "MachineOptions",
    "NetworkOptions",
    "OptimisationOptions",
    "PrecisionName",
    "RouteName",
    "RunOptions",
    "StemName",
    "Switch",
    "TrackerName",
    "ViewsName",
    "changed_options",
    "checked_options",
    "from_json",
    "replaced",
    "validate",
]

Switch = Literal["auto", "on", "off"]
RouteName = Literal["eager", "compile", "fused"]
LoaderName = Literal["dali", "resident", "torch"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
ViewsName = Literal["none", "flip", "multi"]
StemName = Literal["cifar", "pool", "imagenet"]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
DatasetKind = Literal["cifar10", "cifar100", "folder", "synthetic"]
# That of a recipe or of its file. It names run folders and rows of results, too.
RECIPE_NAME = re.compile(r"[\w.+-]{1,64}")


@dataclass(frozen=True)
class RunOptions:
    """What is run."""

    fast: bool = False
    """Train by the fastest route of this machine; without it, the eager fp32 reference."""
    recipe: str = "quick"
    """Hyper-parameters: quick, speed, standard, paper, accurate, or your own file (.toml, .json);
    sets the defaults shown here."""
    seed: int = 0
    """Decides initial weights, order and augmentation of the images."""
    deterministic: bool = False
    """Make two runs on one machine equal bit for bit, at some cost in speed."""


@dataclass(frozen=True)
class DataOptions:
    """What it is trained on."""

    dataset: Literal["auto", DatasetKind] = "auto"
    """auto: what is in the data folder, else download CIFAR-10, else synthetic pictures."""
    data_dir: str | None = None
    """Folder of CIFAR archives or of train/<class>/*; default: $FASTRES_DATA, user cache."""
    limit_train: int | None = None
    """Use only this many training images, the same share of every class."""
    val: bool = False
    """Hold out a tenth of the training images and keep the checkpoint best on them."""
    crop_padding: int = 4
    """Black pixels around each training image before a random 32x32 crop."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirror training images at random, or each in every other epoch."""
    cutout: int = 0
    """Side in pixels of a square painted over each training image; 0: none."""
    trivial_augment: bool = False
    """Change each training image by one random operation of a random magnitude, before the crop."""
    mixup: float = 0.0
    """Blend training images in pairs, by a weight of Beta(mixup, mixup); 0: none."""
    cutmix: float = 0.0
    """Swap a box within pairs of training images, of a size by Beta(cutmix, cutmix); 0: none. With
    mixup too, each batch takes one of the two at random."""


@dataclass(frozen=True)
class NetworkOptions:
    """Which network."""

    model: str = "resnet20"
    """Network: resnet9, resnet9_small, resnet11, resnet8/14/20/32/44/56/110, resnet10/18/34/50,
    plain8 to plain110."""
    width: float = 1.0
    """Multiplies the number of filters of every layer."""
    shortcut: Literal["A", "B"] = "B"
    """Where a block changes the shape: B projects with a 1x1 convolution, A pads with zeros."""
    stem: StemName = "cifar"
    """First layers of resnet10/18/34/50: cifar, a 3x3 convolution; pool, a max pool behind it;
    imagenet, a 7x7 convolution of stride 2 and a max pool."""
    whiten: bool = False
    """Start the first convolution from the principal components of training patches."""
    freeze_stem: bool = False
    """Leave the first convolution as it starts."""


@dataclass(frozen=True)
class OptimisationOptions:
    """How its weights are found."""

    epochs: float = 30.0
    """Passes over the training set; a fraction ends within an epoch."""
    batch_size: int = 128
    """Images a training step."""
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """sgd with momentum, adamw, or muon for filters and sgd for the rest."""
    lr: float = 0.1
    """Peak learning rate; of muon's filters: --muon-lr."""
    momentum: float = 0.9
    """Momentum of sgd, beta1 of adamw."""
    weight_decay: float = 5e-4
    """Weight decay of what --decay names; filters that muon moves keep their norm instead."""
    schedule: Literal["one-cycle", "cosine", "steps", "constant"] = "one-cycle"
    """Fall of the learning rate: linear, half a cosine, or divided by 10 at 1/2 and 3/4."""
    warmup: float = 0.2
    """Share of the run in which the learning rate is still below its peak."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""
    ema: float = 0.0
    """Decay a step of a moving average of the weights, used to evaluate; 0: none."""
    bias_lr_scale: float = 1.0
    """Multiplies the rate of all biases and of batch norm's scales."""
    muon_lr: float = 0.08
    """Peak rate of muon: a step as a share of a layer's norm."""
    muon_momentum: float = 0.6
    """Momentum of muon."""
    low_res: int = 32
    """Side in pixels to which training images are shrunk at first; 32: none."""
    low_res_share: float = 0.4
    """Share of the run in which they are."""
    tta: ViewsName = "none"
    """Test-time augmentation: also the mirror image (flip), or six views where in doubt (multi)."""
    steps: int | None = None
    """Training steps, an exact number, in place of --epochs."""
    nesterov: bool = True
    """Nesterov's momentum; without it, sgd moves by its momentum alone."""
    decay: Literal["filters", "all"] = "filters"
    """What decays: filters and the classifier's matrix, or batch norm and biases too."""
    warmup_shape: Literal["linear", "constant"] = "linear"
    """Meanwhile it rises from zero in a line, or is a tenth of the peak."""


@dataclass(frozen=True)
class MachineOptions:
    """Where and how it is computed; a resumed run may change these."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU where there is one."""
    threads: int | None = None
    """CPU threads of torch; default: all cores."""
    loader: Literal["auto", LoaderName] = "auto"
    """Who prepares batches: NVIDIA DALI, the set resident on the device, torch's DataLoader; auto
    takes the resident one with --fast, else torch's."""
    workers: int | None = None
    """Processes of the torch loader, threads of DALI; default: what suits the machine."""
    eval_batch_size: int = 1000
    """Images an evaluation step."""
    channels_last: Switch = "auto"
    """Keep weights and activations in NHWC order."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision: the type of activations and filters in the forward and backward pass."""
    route: Literal["auto", RouteName] = "auto"
    """How the network is computed: eager torch, torch.compile, or the fused kernels."""
    compile: Switch = "auto"
    """Put torch.compile around the network: the route compile, or around the fused kernels."""
    graph: Switch = "auto"
    """Replay the whole training step as one CUDA graph."""


# What a resumed run may change: where and how it computes, not what.
_MACHINE_OPTIONS = {"fast", "data_dir", *(f.name for f in dataclasses.fields(MachineOptions))}


# What a recipe does not hold: it says how a network is trained, whatever on and wherever.
NOT_OF_A_RECIPE = {
    *_MACHINE_OPTIONS,
    *(field.name for field in dataclasses.fields(RunOptions)),
    *("dataset", "limit_train"),
}


# A dataclass takes the fields of its last base first.
@dataclass(frozen=True)
class Config(MachineOptions, OptimisationOptions, DataOptions, NetworkOptions, RunOptions):
    """Everything that decides what a run computes and how."""

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some options changed."""
        return dataclasses.replace(self, **changes)


_HINTS = get_type_hints(Config)


@dataclass(frozen=True)
class _Range:
    """The numbers that an option may be, each end included or not."""

    low: float
    high: float = math.inf
    with_low: bool = True
    with_high: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.with_low else value > self.low
        below = value <= self.high if self.with_high else value < self.high
        return above and below and value != math.inf

    def __str__(self) -> str:
        if self.with_low and self.with_high and self.high != math.inf:
            return f"between {self.low} and {self.high}"
        low = f"{'at least' if self.with_low else 'more than'} {self.low}"
        if self.high == math.inf:
            return low
        return f"{low} and {'at most' if self.with_high else 'less than'} {self.high}"


# Rates and decays are float32 on the device.
_FLOAT32 = 3.4e38
_RANGES = {
    "epochs": _Range(0, 10**6, with_low=False),
    "batch_size": _Range(1, 2**20),
    "eval_batch_size": _Range(1, 2**20),
    "lr": _Range(0, _FLOAT32),
    "momentum": _Range(0, 1),
    "bias_lr_scale": _Range(0, 10**6),
    "muon_lr": _Range(0, _FLOAT32),
    "low_res": _Range(8, 32),
    "low_res_share": _Range(0, 1),
    "muon_momentum": _Range(0, 1, with_high=False),
    "weight_decay": _Range(0, _FLOAT32),
    "warmup": _Range(0, 1),
    "label_smoothing": _Range(0, 1),
    # At 1 the average never moves.
    "ema": _Range(0, 1, with_high=False),
    "crop_padding": _Range(0, 32),
    "cutout": _Range(0, 32),
    "mixup": _Range(0, 1000),
    "cutmix": _Range(0, 1000),
    "width": _Range(0, 64, with_low=False),
    "seed": _Range(0, 2**63 - 1),
    "threads": _Range(1, 4096),
    "workers": _Range(0, 256),
    "limit_train": _Range(1),
    "steps": _Range(1, 10**9),
}


def _checked(name: str, value: Any, option: str) -> Any:
    """Return `value` in the type of option `name`, from wherever it came.

    Raises:
        UsageError: naming `option`, what it must be and what was given, where it is not that.
    """
    hint = _HINTS[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    kind = kinds[0]
    if get_origin(kind) is Literal:
        fits, wanted = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
    elif kind in (int, float):
        accepted = (int, float) if kind is float else int
        fits = isinstance(value, accepted) and not isinstance(value, bool)
        # Without a range an option would take NaN; every number has one.
        allowed = _RANGES[name]
        wanted = f"{allowed}" if fits else "a number" if kind is float else "a whole number"
        fits = fits and value in allowed
    elif name == "recipe":
        fits = isinstance(value, str) and RECIPE_NAME.fullmatch(value) is not None
        wanted = "1 to 64 letters, digits, '.', '_', '+' or '-'"
    else:
        fits = isinstance(value, kind)
        wanted = "true or false" if kind is bool else "text"
    if not fits:
        given = repr(value)
        given = given if len(given) <= 60 else f"{given[:50]} ... ({len(given)} characters)"
        raise UsageError(f"{option} must be {wanted}, got {given}")
    return float(value) if kind is float else value


def changed_options(before: Mapping[str, Any], after: Config) -> list[str]:
    """Name the options in which two runs differ that decide what is computed, not where or how."""
    return [
        name
        for name, value in before.items()
        if name not in _MACHINE_OPTIONS and getattr(after, name, value) != value
    ]


def replaced(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` with `changes` made; a length in epochs takes the place of one in steps."""
    before = dict(options)
    if "epochs" in changes and "steps" not in changes:
        before.pop("steps", None)
    return before | dict(changes)


def _advice(name: str) -> str:
    """Return what to read in place of an option that there is not."""
    near = difflib.get_close_matches(name, _HINTS)
    return f"similar: {', '.join(near)}" if near else "python -m fastres.train --help lists them"


def checked_options(values: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """Return the options in `values`, each in its own type.

    Raises:
        UsageError: naming `source`, for an unknown option or a value of a wrong type or out of its
            range.
    """
    for name in values:
        if name not in _HINTS:
            raise UsageError(f"{source}: unknown option {name!r}; {_advice(name)}")
    return {k: _checked(k, v, f"{source}: option {k!r}") for k, v in values.items()}


def from_json(text: bytes, source: str | Path, only: Collection[str] | None = None) -> Config:
    """Read options that `Config.to_json` wrote; options it does not name keep their defaults.

    Args:
        text: of the file.
        source: its name, for errors.
        only: the options that are wanted; whatever else is in the file is not looked at.

    Raises:
        UsageError: for text that is no JSON object, an unknown option, or a value of a wrong type
            or out of its range.
    """
    values = parse_table(text, source)
    if only is not None:
        values = {name: value for name, value in values.items() if name in only}
    return Config(**checked_options(values, source))


def validate(config: Config, renamed: Mapping[str, str] | None = None) -> Config:
    """Return `config`, its data folder as an absolute path, if every option has a value it may.

    Args:
        config: the options.
        renamed: fields that the command at hand calls by another name.

    Raises:
        UsageError: naming the first option that has not, what it must be and what it is.
    """
    for name, value in config.to_json().items():
        option = "--" + (renamed or {}).get(name, name).replace("_", "-")
        _checked(name, value, option)
    if config.optimizer == "adamw" and config.momentum == 1:
        raise UsageError("--momentum must be less than 1 with --optimizer adamw")
    if (config.compile, config.route) in (("on", "eager"), ("off", "compile")):
        raise UsageError(
            f"--compile {config.compile} contradicts --route {config.route}; give one of them"
        )
    if config.data_dir is None:
        return config
    if not config.data_dir:
        raise UsageError("--data-dir is empty; name a folder or leave the option out")
    try:
        # A run is resumed from other working directories too.
        return config.replace(data_dir=os.path.abspath(os.path.expanduser(config.data_dir)))
    except ValueError:  # a null character, or half of a surrogate pair
        raise UsageError(f"--data-dir {config.data_dir!r} is no path") from None
