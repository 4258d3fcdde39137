"""Read the pickles of CIFAR's python version without executing them.

A pickle is a program for a stack machine, and an untrusted one may call `os.system`. The batches of
CIFAR need few of its opcodes. `pickletools.genops` parses the file and this module interprets those
opcodes, with a stack and a memo of its own. A few globals are known by name and stand for "an array
follows" or "a dtype follows". Nothing is imported or called for the file; any other global or
opcode is an error.

What NumPy has written over the years and this module reads:

    Python 2, protocol 2    numpy.core.multiarray._reconstruct, bytes as SHORT_BINSTRING, BINSTRING
    Python 3, protocol 0-2  the same, bytes as _codecs.encode(text, "latin1")
    Python 3, protocol 3-4  the same, bytes as BINBYTES; NumPy 2 says numpy._core.multiarray
    Python 3, protocol 5    numpy._core.numeric._frombuffer(BYTEARRAY8, dtype, shape, order)

Limits: memory is a small multiple of the file size, time is linear in it, and no more than
`_MAX_OPCODES` opcodes are read. Values are passed on, never compared, printed or copied, so lists
that hold each other exponentially often cost nothing.

Source: the opcode table in CPython's Lib/pickletools.py.
"""

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastres.errors import FailureError

__all__ = ["read_batch"]

# The largest, CIFAR-100's training batch rewritten by Python 3 in protocol 0, takes 700,000.
_MAX_OPCODES = 1_000_000
_MAX_DIMENSIONS = 4

_INTEGERS = frozenset({"INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1"})
_TEXTS = frozenset({"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"})
_BYTES = frozenset(
    {"SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_ARGUMENT_IS_VALUE = _INTEGERS | _TEXTS | _BYTES
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_WITHOUT_EFFECT = frozenset({"PROTO", "FRAME"})

_NAMES = {
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy.core.numeric _frombuffer": "frombuffer",
    "numpy._core.numeric _frombuffer": "frombuffer",
    "numpy.core.multiarray scalar": "scalar",
    "numpy._core.multiarray scalar": "scalar",
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}
_INTEGER_TYPES = frozenset({"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"})


class _RefusedError(Exception):
    """The file is not a CIFAR batch; the message completes the sentence 'FILE was refused: ...'."""


@dataclass(frozen=True)
class _Name:
    """A global that the file names: its meaning, not the object itself."""

    meaning: str


@dataclass
class _DType:
    """numpy.dtype(code); its byte order follows in a BUILD opcode."""

    code: str
    order: str = "|"


@dataclass
class _Array:
    """numpy.ndarray, whose content follows in a BUILD opcode."""

    value: np.ndarray | None = None


def read_batch(data: bytes, where: str) -> dict[str, Any]:
    """The dictionary that a pickled batch describes.

    Args:
        data: the whole file.
        where: the file's name in error messages.

    Returns:
        Its entries under text keys (Python 2 wrote bytes). Arrays are read-only views of integer
        dtype; the other values are as in the file: int, str, bytes, None, list, tuple, dict.

    Raises:
        FailureError: the bytes are not a pickle, or not that of a plain batch.
    """
    machine = _Machine()
    opcodes = pickletools.genops(io.BytesIO(data))
    try:
        for count, (opcode, argument, _) in enumerate(opcodes):
            if count == _MAX_OPCODES:
                raise _RefusedError(f"it holds more than {_MAX_OPCODES:,} opcodes")
            machine.step(opcode.name, argument)
        return machine.result()
    except _RefusedError as error:
        raise FailureError(
            f"{where} was refused: {error} (pickles are read as data here and never executed)"
        ) from error
    except (ValueError, Warning) as error:
        reason = str(error)[:100]
        raise FailureError(f"{where} is damaged or not a pickled batch: {reason}") from error


class _Machine:
    """The part of the pickle machine that builds dictionaries of lists, strings and arrays."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        if name in _ARGUMENT_IS_VALUE:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in _WITHOUT_EFFECT:
            raise _RefusedError(f"a CIFAR batch has no opcode {name}")

    def result(self) -> dict[str, Any]:
        """What STOP leaves on the stack."""
        batch = self._pop()
        if not isinstance(batch, dict):
            raise _RefusedError(f"it holds a {type(batch).__name__}, not a dictionary")
        return {
            key: _finished(value) if isinstance(value, _Array) else value
            for key, value in batch.items()
        }

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise _RefusedError("its stack runs empty")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise _RefusedError(f"an opcode finds no {kind.__name__} to work on")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise _RefusedError("an opcode finds no mark on the stack")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _put(self, index: int) -> None:
        self._memo[index] = self._top(object)

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._top(object)

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise _RefusedError("it asks for a memo entry that was never stored")
        self._stack.append(self._memo[index])

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _marked_tuple(self, _: None) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _marked_list(self, _: None) -> None:
        self._stack.append(self._pop_to_mark())

    def _marked_dict(self, _: None) -> None:
        items = self._pop_to_mark()
        self._stack.append({})
        self._set(items)

    def _append(self, _: None) -> None:
        item = self._pop()
        self._top(list).append(item)

    def _appends(self, _: None) -> None:
        items = self._pop_to_mark()
        self._top(list).extend(items)

    def _setitem(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _setitems(self, _: None) -> None:
        self._set(self._pop_to_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise _RefusedError("a dictionary key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Text and bytes have salted hashes; a file could choose integers that all collide.
            if not isinstance(key, str | bytes):
                raise _RefusedError(f"a dictionary key is a {type(key).__name__}, not a text")
            target[key.decode("latin-1") if isinstance(key, bytes) else key] = value

    def _global(self, name: str) -> None:
        if name not in _NAMES:
            raise _RefusedError(f"it wants to use {name[:80]!a}")
        self._stack.append(_Name(_NAMES[name]))

    def _stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _RefusedError("a global has no readable name")
        self._global(f"{module} {name}")

    def _reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise _RefusedError("it calls something that is not a name")
        self._stack.append(_call(function.meaning, arguments))

    def _build(self, _: None) -> None:
        state, target = self._pop(), self._pop()
        self._stack.append(_with_state(target, state))


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._mark,
    "PUT": _Machine._put,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": _Machine._memoize,
    "GET": _Machine._get,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "EMPTY_TUPLE": lambda machine, _: machine._tuple(0),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "TUPLE": _Machine._marked_tuple,
    "EMPTY_LIST": lambda machine, _: machine._stack.append([]),
    "LIST": _Machine._marked_list,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "EMPTY_DICT": lambda machine, _: machine._stack.append({}),
    "DICT": _Machine._marked_dict,
    "SETITEM": _Machine._setitem,
    "SETITEMS": _Machine._setitems,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
    "STOP": lambda machine, _: None,
}


def _call(meaning: str, arguments: tuple[Any, ...]) -> Any:
    """The result of one of the five calls that batches contain."""
    match meaning, arguments:
        case "reconstruct", (_Name("ndarray"), _, _):
            return _Array()
        case "dtype", (str(code), _, _) if code in _INTEGER_TYPES:
            return _DType(code)
        case "encode", (str(text), "latin1" | "latin-1"):
            return text.encode("latin-1")
        case "scalar", (_DType() as dtype, raw):
            return int(_array(raw, dtype, (1,), "C")[0])
        case "frombuffer", (raw, _DType() as dtype, shape, order):
            return _Array(_array(raw, dtype, shape, order))
    raise _RefusedError(f"it uses {meaning} in a way that no array of integers needs")


def _with_state(target: Any, state: Any) -> Any:
    match target, state:
        case _Array(), (int(), shape, _DType() as dtype, fortran, raw):
            target.value = _array(raw, dtype, shape, "F" if fortran is True else "C")
        case _DType(), (int(), "|" | "<" | ">" | "=" as order, None, None, None, *_):
            target.order = order
        case _:
            raise _RefusedError("it sets the state of something that is not an array of integers")
    return target


def _array(raw: Any, dtype: _DType, shape: Any, order: Any) -> np.ndarray:
    if isinstance(raw, str):  # a Python 2 string, which genops decodes as latin-1
        raw = raw.encode("latin-1")
    known_shape = isinstance(shape, tuple) and len(shape) <= _MAX_DIMENSIONS
    if not known_shape or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise _RefusedError("an array has no usable shape")
    if not isinstance(raw, bytes | bytearray) or order not in ("C", "F"):
        raise _RefusedError("an array has no usable content")
    if math.prod(shape) * int(dtype.code[1]) != len(raw):
        raise _RefusedError("the size of an array does not match its content")
    array = np.frombuffer(raw, dtype=dtype.order + dtype.code).reshape(shape, order=order)
    array.flags.writeable = False
    return array


def _finished(array: _Array) -> np.ndarray:
    if array.value is None:
        raise _RefusedError("an array has no content")
    return array.value
