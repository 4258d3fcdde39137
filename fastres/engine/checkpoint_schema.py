"""What a run's checkpoints say of themselves, field by field: the one place that judges it.

A hash proves that a file is as it was written, not that a run wrote it. `read_weights` and
`read_training` return only what the rest of the program can use without looking again; whatever
else a file holds is one sentence that names the field, what it must be and what it is.
"""

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor

from fastres import strict_json
from fastres.config import Config, from_json
from fastres.engine import checkpoint
from fastres.engine.checkpoint import take_section
from fastres.engine.summary import ExecutionMode, MetricsRow
from fastres.errors import FailureError, UsageError

__all__ = ["check_identity", "check_progress", "check_values", "read_training", "read_weights"]

# Takes the name of a field and its value.
Check = Callable[[str, Any], None]

# Above every count and every number of seconds; JSON knows larger numbers than a float.
_LARGE = 1e15
_SHOWN_CHARACTERS = 40
_NEVER_NEGATIVE = (".step", ".exp_avg_sq", ".running_var", ".values", ".scale")
_SECTIONS = ("model", "optimizer", "average", "totals", "scaler")


class _UnexpectedError(Exception):
    """A field is not what a run writes; the message names it."""


def _unexpected(name: str, wanted: str, value: Any) -> _UnexpectedError:
    shown = textwrap.shorten(repr(value), _SHOWN_CHARACTERS, placeholder=" ...")
    return _UnexpectedError(f"{name} must be {wanted}, got {shown}")


def _number(low: float = -_LARGE, high: float = _LARGE, *, kind: type = float) -> Check:
    """Accept a number from `low` to `high`, so neither NaN nor infinity."""
    wanted = f"a {'whole number' if kind is int else 'number'} from {low:g} to {high:g}"
    kinds = int if kind is int else int | float

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise _unexpected(name, wanted, value)

    return check


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _unexpected(name, "a string", value)


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _unexpected(name, "true or false", value)


def _list(item: Check, length: int | None = None, *, empty: bool = True) -> Check:
    """Accept a list of `length` items, or of any length; of none only where it may be empty."""
    wanted = f"a list{f' of {length}' if length else '' if empty else ' that is not empty'}"

    def check(name: str, value: Any) -> None:
        right = isinstance(value, list) and length in (None, len(value)) and (value or empty)
        if not right:
            raise _unexpected(name, wanted, value)
        for position, entry in enumerate(value):
            item(f"{name}[{position}]", entry)

    return check


def _record(required: Mapping[str, Check], optional: Mapping[str, Check]) -> Check:
    """Accept an object with all fields of `required`, any of `optional` and no others."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _unexpected(name, "an object", value)
        if missing := [field for field in required if field not in value]:
            raise _UnexpectedError(f"{name} lacks {', '.join(missing)}")
        known = {**required, **optional}
        for field, entry in value.items():
            if field not in known:
                raise _unexpected(f"a field of {name}", f"one of {', '.join(known)}", field)
            known[field](f"{name}.{field}", entry)

    return check


def _nullable(inner: Check) -> Check:
    def check(name: str, value: Any) -> None:
        if value is not None:
            inner(name, value)

    return check


def _mixable(inner: Check) -> Check:
    """Accept how steps were computed; "mixed" says that the run went on in another way."""

    def check(name: str, value: Any) -> None:
        if value != "mixed":
            inner(name, value)

    return check


def _options(name: str, value: Any) -> None:
    try:
        from_json(strict_json.dumps(value).encode(), name)
    except (UsageError, FailureError) as error:
        raise _unexpected(name, f"the options of a run ({error})", value) from None


_SECONDS = _number(0)
_PERCENT = _number(0, 100)
_ROW_FIELDS = {
    name: _PERCENT if name.endswith("accuracy") else _number() if "loss" in name else _number(0)
    for name in get_type_hints(MetricsRow)
}
_KINDS: dict[Any, Check] = {bool: _flag, int: _number(1, kind=int)}
_MODE = {
    name: _mixable(_KINDS.get(hint, _text)) for name, hint in get_type_hints(ExecutionMode).items()
}
_IDENTITY = {
    "config": _options,
    "classes": _list(_text, empty=False),
    "dataset": _text,
    "dataset_fingerprint": _text,
    "mean": _list(_number(0, 1), 3),
    "std": _list(_number(1e-4, 1), 3),
}


def _progress(*, validated: bool) -> Check:
    """Describe `TrainingState.to_json`; the rows of a run under --val have two fields more."""
    optional = {"first_layer_gradient": _ROW_FIELDS["first_layer_gradient"]}
    columns = {
        name: check
        for name, check in _ROW_FIELDS.items()
        if name not in optional and (validated or not name.startswith("val_"))
    }
    measured = {
        "compile_seconds": _SECONDS,
        "epoch_seconds": _SECONDS,
        "first_step_seconds": _nullable(_SECONDS),
        "evaluation_rate": _number(0),
        "best_val_accuracy": _number(-1, 100),
        "way": _record({}, _MODE),
    }
    needed = {
        "step": _number(0, kind=int),
        "train_seconds": _SECONDS,
        "rows": _list(_record(columns, optional)),
    }
    return _record(needed, measured)


@contextmanager
def _refusing(source: Path) -> Iterator[None]:
    try:
        yield
    except _UnexpectedError as error:
        raise FailureError(f"{source} holds what no run writes: {error}") from None


def _check_meta(meta: Any, source: Path) -> dict[str, Any]:
    """Return the JSON of a checkpoint if it is what a run writes."""
    with _refusing(source):
        _record(_IDENTITY, {"progress": lambda name, value: None})("meta", meta)
        if "progress" in meta:
            validated = bool(meta["config"].get("val", Config.val))
            _progress(validated=validated)("progress", meta["progress"])
    return meta


def check_identity(meta: Any, source: Path) -> dict[str, Any]:
    """Return what comes with weights that are shared if a run says the same of its own.

    Raises:
        FailureError: naming the first field that is missing, unknown or no such value.
    """
    with _refusing(source):
        _record(_IDENTITY, {})("meta", meta)
    return meta


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state_dict to evaluate, and where it comes from, of any checkpoint of a run.

    The moving average takes the place of the weights where a training checkpoint holds one. Whether
    they fit a model is for `checkpoint.load_weights` to say.

    Raises:
        FailureError: when the file cannot be read, or is not what a run writes.
    """
    tensors, found = checkpoint.read(path)
    meta = _check_meta(found, path)
    if "progress" not in meta:
        check_values(tensors, path)
        return tensors, meta
    _check_sections(tensors, path)
    weights, average = take_section(tensors, "model"), take_section(tensors, "average")
    if bool(average) != bool(meta["config"].get("ema", Config.ema)):
        raise FailureError(f"{path} holds what no run writes: its --ema and its average disagree")
    if average:
        averaged = {k: v for k, v in weights.items() if v.is_floating_point()}
        checkpoint.check_tensors(average, averaged, path)
    check_values(weights, path)
    return weights | average, meta


def read_training(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON of a training checkpoint.

    Whether they fit the run is for `check_progress` and `TrainStep.load_state_dict` to say.

    Raises:
        FailureError: when the file cannot be read, or is not what a run writes.
    """
    tensors, found = checkpoint.read(path)
    meta = _check_meta(found, path)
    if "progress" not in meta:
        raise FailureError(f"{path} holds weights alone, from which no run can be resumed")
    _check_sections(tensors, path)
    return tensors, meta


def check_progress(
    progress: Mapping[str, Any], steps_per_epoch: int, total_steps: int, source: Path
) -> None:
    """Compare how far a checkpoint says to be with the length of its run.

    Raises:
        FailureError: when it is beyond the end, or its rows are not those of its epochs.
    """
    step, rows, seconds = (progress[name] for name in ("step", "rows", "train_seconds"))
    recorded = min(len(rows) * steps_per_epoch, total_steps)
    fits = recorded <= step <= min(recorded + steps_per_epoch, total_steps)
    too_many = len(rows) > -(-total_steps // steps_per_epoch)
    if not fits or too_many or (rows and not seconds):
        raise FailureError(
            f"{source} holds what no run writes: {step} of {total_steps} steps with {len(rows)} "
            f"rows in {seconds} s, at {steps_per_epoch} steps an epoch"
        )


def _check_sections(tensors: Mapping[str, Tensor], source: Path) -> None:
    for name in tensors:
        if name.partition(".")[0] not in _SECTIONS:
            raise FailureError(f"{source} holds what no run writes: a tensor named {name!r}")


def check_values(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Look for negative numbers where training never has any, in tensors of the right dtypes.

    Raises:
        FailureError: naming the first.
    """
    for name, tensor in tensors.items():
        if name.endswith(_NEVER_NEGATIVE) and (tensor < 0).any():
            value = tensor[tensor < 0][0].item()
            raise FailureError(f"{source} holds what no run writes: a {value} in {name}")
