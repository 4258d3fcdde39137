"""The pickle reader: reads every batch NumPy has written, refuses the rest, executes nothing."""

import contextlib
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastres.data.readers.cifar import find_cifar
from fastres.data.readers.cifar_pickle import read_batch
from fastres.errors import FailureError
from tests.helpers.data_fixtures import (
    CIFAR10_PYTHON,
    cifar_members,
    images,
    labels,
    pickled_batch,
    unpack,
)

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 12)


def python2_batch() -> bytes:
    """The opcodes of the published batches, as CPython 2's cPickle wrote them in 2009."""
    raw = PIXELS.tobytes()
    return (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04"
        b"K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02K\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", len(raw)) + raw + b"tbU\x06labelsq\x08]q\t(K\x06K\x09e"
        b"U\x0bbatch_labelq\nU\x15training batch 1 of 5u."
    )


def test_published_form() -> None:
    batch = read_batch(python2_batch(), "data_batch_1")
    np.testing.assert_array_equal(batch["data"], PIXELS)
    assert batch["labels"] == [6, 9]
    assert batch["batch_label"] == "training batch 1 of 5"
    # The bytes above are a real pickle: CPython reads the same from them.
    np.testing.assert_array_equal(pickle.loads(python2_batch(), encoding="bytes")[b"data"], PIXELS)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("old_numpy", [False, True])
def test_every_protocol(protocol: int, old_numpy: bool) -> None:
    written = {
        b"data": np.arange(600, dtype=np.uint8).reshape(2, 300),
        "fortran": np.asfortranarray(PIXELS),
        "strided": PIXELS[:, ::2],
        "labels": [0, 255, 65536, -1],
        "array": np.arange(3),
        "big_endian": np.arange(3, dtype=">i4"),
        "scalars": [np.int64(7), np.uint8(255), np.int16(-2)],
        "names": (b"a", "b", None, True, 2**40),
    }
    data = pickle.dumps(written, protocol=protocol)
    if old_numpy:
        # The shorter module name of NumPy 1 as a GLOBAL, or with its length before it.
        data = data.replace(b"cnumpy._core.", b"cnumpy.core.")
        data = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        data = data.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
        assert b"_core" not in data
    batch = read_batch(data, "batch")
    for key, value in written.items():
        name = key.decode() if isinstance(key, bytes) else key
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(batch[name], value)
            assert batch[name].dtype == value.dtype
        else:
            assert batch[name] == value


def test_array_used_twice() -> None:
    batch = read_batch(pickle.dumps({"a": PIXELS, "b": PIXELS}, protocol=2), "batch")
    np.testing.assert_array_equal(batch["a"], PIXELS)
    np.testing.assert_array_equal(batch["b"], PIXELS)


CALLS: dict[str, tuple[str, Callable[[str], tuple[str, ...]]]] = {
    "os.system": ("os system", lambda m: (f"touch {m}",)),
    "posix.system": ("posix system", lambda m: (f"touch {m}",)),
    "subprocess.getoutput": ("subprocess getoutput", lambda m: (f"touch {m}",)),
    "exec": ("builtins exec", lambda m: (f"open({m!r}, 'w').close()",)),
    "eval": ("builtins eval", lambda m: (f"open({m!r}, 'w').close()",)),
    "open": ("builtins open", lambda m: (m, "w")),
    "io.open": ("io open", lambda m: (m, "w")),
    "codecs.open": ("codecs open", lambda m: (m, "w")),
    "os.mkdir": ("os mkdir", lambda m: (m,)),
    "os.makedirs": ("os makedirs", lambda m: (m,)),
    "getstatusoutput": ("subprocess getstatusoutput", lambda m: (f"touch {m}",)),
    "tarfile.open": ("tarfile open", lambda m: (m, "w")),
    "gzip.open": ("gzip open", lambda m: (m, "w")),
}


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<i", len(value)) + value.encode()


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _stack_global(name: str) -> bytes:
    module, attribute = name.split(" ")
    return _text(module) + _text(attribute) + b"\x93"


STYLES: dict[str, Callable[[str, tuple[str, ...]], bytes]] = {
    "GLOBAL": lambda name, args: _global(name) + b"(" + b"".join(map(_text, args)) + b"tR",
    "STACK_GLOBAL": lambda name, args: (
        _stack_global(name) + b"(" + b"".join(map(_text, args)) + b"tR"
    ),
    "INST": lambda name, args: (
        b"(" + b"".join(map(_text, args)) + b"i" + name.replace(" ", "\n").encode() + b"\n"
    ),
    "OBJ": lambda name, args: b"(" + _global(name) + b"".join(map(_text, args)) + b"o",
}


def _in_batch(value: bytes) -> bytes:
    """A batch whose 'data' is what `value` leaves on the stack."""
    return b"\x80\x04}(" + _text("data") + value + b"u."


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("style", STYLES)
def test_nothing_is_called(call: str, style: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    name, arguments = CALLS[call]
    data = _in_batch(STYLES[style](name, arguments(str(marker))))
    with pytest.raises(FailureError, match="was refused"):
        read_batch(data, "data_batch_1")
    assert not marker.exists()
    # The attack is a real one: the ordinary reader falls for it.
    pickle.loads(data)
    assert marker.exists()


_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
_U1 = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"


def _array(shape: bytes, dtype: bytes = _U1, raw: bytes = b"U\x04abcd") -> bytes:
    return _ARRAY + b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb"


def _nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    return opening * depth + closing * depth


def _doubling(levels: int) -> bytes:
    """A list of 2**levels elements, as the memo sees it: each level holds the last one twice."""
    steps = b"".join(
        b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1])
        for i in range(levels)
    )
    return b"]q\x00" + steps


# What the refusal says -> the files that must be refused so.
HOSTILE: dict[str, dict[str, bytes]] = {
    "not a pickled batch": {
        "empty file": b"",
        "web page": b"<!DOCTYPE html><html>503</html>",
        "no STOP": b"\x80\x02}",
        "unknown opcode": b"\x80\x02}\xff.",
        "long integer": _in_batch(b"\x8b\xff\xff\xff\x7f"),
        "negative long integer": _in_batch(b"\x8b\xff\xff\xff\xff"),
        "decimal integer": _in_batch(b"I" + b"9" * 5000 + b"\n"),
        "huge bytes": _in_batch(b"\x8e" + struct.pack("<Q", 2**62) + b"x"),
        "huger bytes": _in_batch(b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"x"),
        "huge bytearray": _in_batch(b"\x96" + struct.pack("<Q", 2**40) + b"x"),
        "huge text": _in_batch(b"\x8d" + struct.pack("<Q", 2**40) + b"x"),
        "negative string": _in_batch(b"T\xff\xff\xff\xff"),
        "broken text": _in_batch(b"X\x01\x00\x00\x00\xff"),
        "broken escape": _in_batch(b"S'\\x'\n"),
        "codec cannot encode": _in_batch(
            _global("_codecs encode")
            + b"X\x03\x00\x00\x00\xe2\x82\xac"
            + _text("latin1")
            + b"\x86R"
        ),
    },
    "its stack runs empty": {
        "STOP alone": b".",
        "stack runs empty": b"\x80\x02}\x87.",
        "marks alone": b"\x80\x02" + b"(" * 100_000 + b".",
        "tuple across a mark": b"\x80\x02}K\x01(\x85.",
    },
    "not a dictionary": {
        "a list": b"\x80\x02].",
        "a text": _text("data") + b".",
    },
    "a CIFAR batch has no opcode": {
        "PERSID": _in_batch(b"Pos.system\n"),
        "BINPERSID": _in_batch(_text("x") + b"Q"),
        "EXT1": _in_batch(b"\x82\x01"),
        "EXT2": _in_batch(b"\x83\x01\x00"),
        "EXT4": _in_batch(b"\x84\x01\x00\x00\x00"),
        "NEWOBJ": _in_batch(_global("numpy ndarray") + b")\x81"),
        "NEWOBJ_EX": _in_batch(_global("numpy ndarray") + b")}\x92"),
        "NEXT_BUFFER": _in_batch(b"\x97"),
        "READONLY_BUFFER": _in_batch(b"C\x01a\x98"),
        "set": _in_batch(b"\x8f"),
        "frozenset": _in_batch(b"(\x91"),
        "POP": _in_batch(b"K\x010"),
        "DUP": _in_batch(b"K\x012"),
        "float": _in_batch(b"G" + struct.pack(">d", 1.0)),
    },
    "no 'data' array or no list": {
        "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}.",
        "nested lists": _in_batch(_nested(b"](", b"e", 20_000)),
        "nested tuples": _in_batch(b")" + b"\x85" * 200_000),
        "a list that holds itself": _in_batch(b"]q\x00h\x00a"),
        "doubling lists": _in_batch(b"(" + _doubling(200) + b"t"),
        "wrong type of data": _in_batch(_array(b"K\x04\x85")),
        "labels are texts": b"\x80\x02}("
        + _text("data")
        + _array(b"K\x04\x85")
        + _text("labels")
        + b"]("
        + _text("x")
        + b"eu.",
    },
    "more than 1,000,000 opcodes": {
        "a million opcodes": _in_batch(b"K\x01" * 1_000_000),
    },
    "no mark on the stack": {
        "no mark": b"\x80\x02}u.",
    },
    "never stored": {
        "memo never stored": b"\x80\x02h\x07.",
    },
    "to work on": {
        "memo of nothing": b"\x80\x02q\x00.",
        "append to a text": b"\x80\x02}" + _text("x") + b"K\x01a.",
    },
    "has no value": {
        "key without value": b"\x80\x02}(" + _text("x") + b"u.",
    },
    "not a text": {
        "integer key": b"\x80\x02}K\x01K\x01s.",
        "tuple key": b"\x80\x02})K\x01s.",
    },
    "it wants to use": {
        "numpy.load": _in_batch(_global("numpy load") + _text("x") + b"\x85R"),
        "a dotted name": _in_batch(_text("numpy") + _text("ndarray.__reduce__") + b"\x93"),
    },
    "no readable name": {
        "a name made of bytes": _in_batch(b"C\x05numpyC\x07ndarray\x93"),
    },
    "something that is not a name": {
        "calling a text": _in_batch(_text("os.system") + b")R"),
        "calling without a tuple": _in_batch(_global("numpy dtype") + _text("u1") + b"R"),
    },
    "in a way that no array of integers needs": {
        "numpy scalar of nothing": _in_batch(_global("numpy.core.multiarray scalar") + b")R"),
        "dtype of objects": _in_batch(_global("numpy dtype") + b"U\x02O8K\x00K\x01\x87R"),
        "dtype of records": _in_batch(_global("numpy dtype") + b"U\x02V8K\x00K\x01\x87R"),
        "dtype from a global": _in_batch(
            _global("numpy dtype") + _global("numpy dtype") + b"\x85R"
        ),
        "reconstruct another class": _in_batch(
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R"
        ),
        "another codec": _in_batch(
            _global("_codecs encode") + _text("x") + _text("hex") + b"\x86R"
        ),
    },
    "sets the state of something": {
        "dtype with fields": _in_batch(_U1 + b"(K\x03U\x01|N(U\x01at}J\x00\x00\x00\x00tb"),
        "state of a dictionary": _in_batch(b"}}b"),
        "state of a list": _in_batch(b"]" + _text("x") + b"b"),
        "array with a name for a dtype": _in_batch(
            _array(b"K\x04\x85", dtype=_global("numpy dtype"))
        ),
    },
    "no usable content": {
        "array of a list": _in_batch(_array(b"K\x04\x85", raw=b"]")),
    },
    "does not match its content": {
        "array too long": _in_batch(_array(b"K\x05\x85")),
        "array too short": _in_batch(_array(b"K\x03\x85")),
    },
    "no usable shape": {
        "negative shape": _in_batch(_array(b"J\xff\xff\xff\xffJ\xfc\xff\xff\xff\x86")),
        "empty array of huge shape": _in_batch(
            _array(b"K\x00\x8a\x09" + b"\xff" * 8 + b"\x00\x86", raw=b"U\x00")
        ),
        "shape is a list": _in_batch(_array(b"]")),
        "shape of texts": _in_batch(_array(_text("4") + b"\x85")),
        "five dimensions": _in_batch(_array(b"(K\x01K\x01K\x01K\x01K\x04t")),
    },
    "an array has no content": {
        "array without content": _in_batch(_ARRAY),
    },
    "beyond 64 bits": {
        "labels beyond 64 bits": b"\x80\x02}("
        + _text("data")
        + _array(b"K\x04\x85")
        + _text("labels")
        + b"](\x8a\x09"
        + b"\xff" * 8
        + b"\x7feu.",
    },
}


@pytest.mark.parametrize(
    ("reason", "case"), [(reason, case) for reason, cases in HOSTILE.items() for case in cases]
)
def test_hostile_file_is_refused(reason: str, case: str, tmp_path: Path) -> None:
    """Through the whole reader, so that what is a legal pickle and no batch is refused too."""
    members = cifar_members(CIFAR10_PYTHON) | {"data_batch_2": HOSTILE[reason][case]}
    unpack(tmp_path / "cifar-10-batches-py", members)
    found = find_cifar(tmp_path, "cifar10")
    assert found is not None
    start = time.process_time()
    with pytest.raises(FailureError, match=f"data_batch_2 .*{reason}") as caught:
        found.read()
    assert time.process_time() - start < 10
    assert len(str(caught.value)) < 500


def test_every_truncation_is_noticed() -> None:
    data = pickled_batch(images(1)[:, :2, :2], labels(1))
    for length in range(len(data)):
        with pytest.raises(FailureError):
            read_batch(data[:length], "data_batch_1")


def test_every_flipped_byte_is_refused_or_harmless() -> None:
    data = python2_batch()
    for position in range(len(data)):
        for flip in (0x01, 0x20, 0x80, 0xFF):
            broken = bytearray(data)
            broken[position] ^= flip
            _refused_or_read(bytes(broken))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    _refused_or_read(data)


OPCODES = b"()]}NKMJUTXCcRbtaeus.012hqrjgpIS\x80\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95\x96"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(list(OPCODES)), max_size=100).map(bytes))
def test_random_opcodes(data: bytes) -> None:
    _refused_or_read(b"\x80\x04}" + data + b".")


def _refused_or_read(data: bytes) -> None:
    with contextlib.suppress(FailureError):
        assert isinstance(read_batch(data, "batch"), dict)
