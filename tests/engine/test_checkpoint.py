"""Checkpoints: whole or refused, atomic, safe, and free of route-specific names."""

import errno
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from fastres import create_model
from fastres.engine import checkpoint
from fastres.errors import FailureError

TENSORS = {
    "model.weight": torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "model.steps": torch.tensor(7),
    "optimizer.weight.momentum_buffer": torch.full((2,), 0.5, dtype=torch.bfloat16),
}
META = {"progress": {"step": 3, "rows": [{"loss": 1.25}]}, "name": "ü"}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.safetensors"
    checkpoint.write(path, TENSORS, META)
    return path


def test_what_is_written_comes_back(saved):
    tensors, meta = checkpoint.read(saved)
    assert meta == META
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
    assert os.listdir(saved.parent) == ["last.safetensors"]


def test_no_single_changed_byte_goes_unnoticed(saved):
    content = bytearray(saved.read_bytes())
    for position in range(len(content)):
        content[position] ^= 0x10
        saved.write_bytes(content)
        content[position] ^= 0x10
        with pytest.raises(FailureError, match=r"last\.safetensors"):
            checkpoint.read(saved)


def test_no_truncation_goes_unnoticed(saved):
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        with pytest.raises(FailureError, match=r"last\.safetensors"):
            checkpoint.read(saved)


def test_a_pickle_is_refused_unopened(tmp_path):
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"model": Payload()}))
    with pytest.raises(FailureError, match="no readable checkpoint"):
        checkpoint.read(path)
    torch.save({"x": Payload()}, path)
    with pytest.raises(FailureError, match="no readable checkpoint"):
        checkpoint.read(path)
    assert not marker.exists()


def test_foreign_safetensors_are_named_as_such(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(FailureError, match="not written by fastres"):
        checkpoint.read(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FailureError, match="no checkpoint at"):
        checkpoint.read(tmp_path / "none.safetensors")


UNREADABLE = {
    "Too many levels of symbolic links": lambda path: path.symlink_to(path),
    "Is a directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_what_the_system_says_is_passed_on(reason, tmp_path):
    path = tmp_path / "last.safetensors"
    UNREADABLE[reason](path)
    with pytest.raises(FailureError, match=re.escape(f"cannot read {path}: {reason}")):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("last.safetensors/x", "Not a directory"), (300 * "a", "File name too long")],
)
def test_a_path_that_leads_nowhere(name, reason, saved):
    with pytest.raises(FailureError, match=f"cannot read .*: {reason}"):
        checkpoint.read(saved.parent / name)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE])
def test_a_file_that_may_not_be_read(number, saved, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    # Root may read everything, so that the system's answer is made up here.
    monkeypatch.setattr("pathlib.Path.open", refuse)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(
        FailureError, match=re.escape(f"cannot read {saved}: {os.strerror(number)}")
    ):
        checkpoint.read(saved)


def test_a_reader_during_a_save_sees_the_old_file_or_the_new_one(saved, monkeypatch):
    """Every name that the reader opens is replaced right after: it must need no second look."""
    opened = io.open

    def replaced_meanwhile(file, *arguments, **options):
        stream = opened(file, *arguments, **options)
        if str(file) == str(saved) and not META.get("new"):
            checkpoint.write(saved, {"model.weight": torch.ones(1)}, {"new": True})
        return stream

    monkeypatch.setattr("io.open", replaced_meanwhile)
    assert checkpoint.read(saved)[1] == META
    assert checkpoint.read(saved)[1] == {"new": True}


def test_a_reader_beside_a_busy_writer(saved):
    """Two processes: none of many reads meets a file that is not whole."""
    code = f"""
import torch
from pathlib import Path
from fastres.engine import checkpoint
checkpoint.os.fsync = lambda _: None
for step in range(10**9):
    tensors = {{str(i): torch.full((20_000,), step) for i in range(8)}}
    checkpoint.write(Path({str(saved)!r}), tensors, {{"step": step}})
    print(flush=True) if step == 0 else None
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        steps = set()
        try:
            while len(steps) < 200:
                tensors, meta = checkpoint.read(saved)
                assert all((value == meta["step"]).all() for value in tensors.values())
                steps.add(meta["step"])
        finally:
            writer.kill()


def test_a_full_disk_leaves_the_old_file(saved):
    """RLIMIT_FSIZE makes every longer write fail, as a full disk does."""
    before = saved.read_bytes()
    code = f"""
import resource, signal, torch
from pathlib import Path
from fastres.engine import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.write(Path({str(saved)!r}), {{"x": torch.zeros(10000)}}, {{}})
except checkpoint.FailureError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot write" in result.stdout, result.stderr
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["last.safetensors"]


def write_without_end(path, written):
    tensors = {str(i): torch.zeros(50_000) for i in range(8)}
    for step in itertools.count():
        checkpoint.write(path, tensors, {"step": step})
        written.set()


def test_kills_while_saving_leave_a_whole_file(tmp_path):
    path = tmp_path / "last.safetensors"
    # Its server imports torch once, for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for attempt in range(6):
        written = context.Event()
        child = context.Process(target=write_without_end, args=(path, written))
        child.start()
        assert written.wait(60)
        time.sleep(0.003 * attempt)
        child.kill()
        child.join()
        _, meta = checkpoint.read(path)
        assert meta["step"] >= 0


def test_another_models_weights_are_refused_by_name():
    model = create_model("resnet8")
    other = create_model("resnet8", width=2).state_dict()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FailureError, match=r"another model.*another shape bn1\.bias"):
        checkpoint.load_weights(model, other, "x")
    deeper = create_model("resnet14", shortcut="A").state_dict()
    with pytest.raises(FailureError, match=r"lacks .*layer2.*has besides layer1\.1"):
        checkpoint.load_weights(model, deeper, "x")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_header_is_plain_json(saved):
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"]["format"] == checkpoint.FORMAT
