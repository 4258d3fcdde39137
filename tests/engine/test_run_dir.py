"""The run folder: killed at any step it is accepted again, and nothing of others is lost."""

import errno
import os
import re
import shutil
import signal
import sys
import time

import pytest
import torch

from fastres import evaluate
from fastres.config import Config
from fastres.engine import checkpoint
from fastres.engine.run_dir import _LITTER, _RESULTS, RunDir, default_folder
from fastres.errors import FailureError, UsageError
from tests.helpers.tiny_run import TINY_NET, run_train

TINY = (
    *(*TINY_NET, "--dataset", "synthetic", "--limit-train", "40"),
    *("--batch-size", "10", "--epochs", "1"),
)
NOTES = "notes.txt", "model.safetensors.txt", "curves.png.part", "last.safetensorsABCDEFGH.part"
LITTER = "config.jsonabcd_123.part", "last.safetensors00000000.part"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, for reading alone."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert run_train(*TINY, "--out", out) == 0
    return out


def killed_before(event, folder, act):
    """Fork, act, and die before the n-th thing done in `folder`; return whether it got there."""
    child = os.fork()
    if not child:
        left = event

        def count(name, arguments):
            nonlocal left
            # Killing is such an event too.
            left -= name != "os.kill" and any(str(folder) in str(word) for word in arguments)
            if name != "os.kill" and left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def start(folder):
    """What a new run does to its folder in its first epoch."""
    with folder.claimed():
        folder.begin(Config(seed=1).to_json(), overwrite=True)
        checkpoint.write(folder.file("last"), {"x": torch.ones(9)}, {"seed": 1})
        folder.write_metrics([{"epoch": 1}])


def can_be_resumed(folder):
    if not (folder.path / "config.json").exists():
        return False
    return folder.has_only_begun() or bool(checkpoint.read(folder.file("last")))


def accepts_a_new_run(folder):
    try:
        folder.check_free(overwrite=False)
    except UsageError:
        return False
    return True


BEFORE = {
    "no folder": lambda path, run: None,
    "an empty folder": lambda path, run: path.mkdir(),
    "litter": lambda path, run: [path.mkdir(), *((path / n).touch() for n in LITTER)],
    "a run": lambda path, run: shutil.copytree(run, path),
    "a run, notes and litter": lambda path, run: [
        shutil.copytree(run, path),
        *((path / name).write_text("mine") for name in (*NOTES, *LITTER)),
    ],
}


@pytest.mark.parametrize("before", BEFORE)
def test_a_kill_at_any_step_leaves_a_folder_that_is_accepted(before, run, tmp_path):
    event, died = 0, True
    while died:
        folder = RunDir(tmp_path / str(event))
        BEFORE[before](folder.path, run)
        died = killed_before(event, folder.path, lambda folder=folder: start(folder))
        # Either it is as good as new, or that of a run, which can be resumed.
        assert accepts_a_new_run(folder) != can_be_resumed(folder)
        folder.check_free(overwrite=True)
        start(folder)
        names = set(os.listdir(folder.path))
        notes = names & set(NOTES)
        assert {(folder.path / name).read_text() for name in notes} <= {"mine"}
        assert len(notes) == (len(NOTES) if "notes" in before else 0)
        made = {"config.json", "last.safetensors", "metrics.csv", "metrics.jsonl"}
        assert names - notes == made
        event += 1
    assert event > 15


def test_a_run_killed_before_its_first_checkpoint_is_resumed_from_the_start(run, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(run / "config.json", out)
    (out / LITTER[1]).write_bytes(b"half")
    assert run_train("--resume", "--out", out) == 0
    assert "has no checkpoint yet: from the start" in capsys.readouterr().out
    one, other = (checkpoint.read(path / "model.safetensors")[0] for path in (run, out))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert {path.name for path in out.iterdir()} == {path.name for path in run.iterdir()}


@pytest.mark.parametrize("left", ["model.safetensors", "summary.json", "metrics.jsonl"])
def test_a_run_that_lost_its_checkpoint_is_not_begun_again(left, run, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(run / "config.json", out)
    shutil.copy(run / left, out)
    before = (out / left).read_bytes()
    assert run_train("--resume", "--out", out) == 1
    assert f"there is no checkpoint at {out / 'last.safetensors'}" in capsys.readouterr().err
    assert (out / left).read_bytes() == before


@pytest.mark.parametrize("config", [None, '{"architectures": ["ResNet"]}', "no json"])
def test_a_strangers_folder_is_refused_and_left_alone(config, tmp_path, capsys):
    """Other programs write a config.json and a model.safetensors too."""
    if config:
        (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_text("mine")
    (tmp_path / LITTER[0]).write_text("perhaps mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for mode in ((), ("--overwrite",)):
        assert run_train(*TINY, *mode, "--out", tmp_path) == 2
        assert "holds files of something else" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_litter_is_what_the_writer_leaves(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)
    for name in ("config.json", *_RESULTS):
        with pytest.raises(KeyboardInterrupt):
            checkpoint.replace_file(tmp_path / name, b"x")
    names = os.listdir(tmp_path)
    assert len(names) == 1 + len(_RESULTS)
    assert all(_LITTER.fullmatch(name) for name in names)
    assert not any(_LITTER.fullmatch(name) for name in NOTES)


def test_runs_of_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [default_folder(Config()) for _ in range(4)]
    for folder in folders:
        folder.path = folders[0].path  # as of the same second
    go, started = os.pipe()
    children = []
    for folder in folders:
        child = os.fork()
        if not child:
            os.close(started)
            os.read(go, 1)
            code = 1
            try:
                with folder.claimed():
                    folder.begin(Config().to_json(), overwrite=False)
                    (folder.path / str(os.getpid())).touch()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    os.close(started)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    first = folders[0].path.name
    expected = {first, *(f"{first}-{count}" for count in (2, 3, 4))}
    assert set(os.listdir("runs")) == expected
    owners = [(set(os.listdir(f"runs/{name}")) - {"config.json"}) for name in expected]
    assert sorted(owner for (owner,) in owners) == sorted(map(str, children))


def test_the_lock_of_a_killed_run_is_free_at_once(tmp_path):
    """Workers that the run has forked live on for seconds."""
    out = tmp_path / "run"
    reader, writer = os.pipe()
    holder = os.fork()
    if not holder:
        with RunDir(out).claimed():
            worker = os.fork()
            if worker:
                os.write(writer, str(worker).encode())
            time.sleep(60)
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(UsageError, match="another process"), RunDir(out).claimed():
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(worker, 0)  # still there
        with RunDir(out).claimed():
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_fork_leaves_the_lock_to_its_parent(tmp_path):
    folder = RunDir(tmp_path)
    with folder.claimed():
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(UsageError, match="another process"), RunDir(tmp_path).claimed():
            pass
    with RunDir(tmp_path).claimed():
        pass


def loop(path):
    path.symlink_to(path)


UNUSABLE = {
    "Too many levels of symbolic links": lambda tmp: [loop(tmp / "x"), tmp / "x"][1],
    "No such file or directory": lambda tmp: [(tmp / "x").symlink_to("none/y"), tmp / "x"][1],
    "Not a directory": lambda tmp: [(tmp / "x").touch(), tmp / "x" / "run"][1],
    "File name too long": lambda tmp: tmp / (300 * "a"),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_folder_that_cannot_be_used_says_why(reason, tmp_path, capsys):
    out = UNUSABLE[reason](tmp_path)
    assert run_train(*TINY, "--out", out) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert str(out) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_says_why(number, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    sentence = re.escape(f"cannot write into {tmp_path}: {os.strerror(number)}")
    with pytest.raises(FailureError, match=f"^{sentence}$"):
        RunDir(tmp_path / "run").check_free(overwrite=False)


def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path):
    RunDir(tmp_path).check_free(overwrite=False)
    RunDir(tmp_path / "a" / "b").check_free(overwrite=False)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "last.safetensors", "model.safetensors"])
def test_an_unreadable_file_of_a_run_is_not_called_missing(name, run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / name).unlink()
    loop(out / name)
    options = ["--checkpoint", "last"] if name.startswith("last") else []
    codes = [evaluate.main([str(out), *options])]
    if name != "model.safetensors":
        codes.append(run_train("--resume", "--out", out))
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(codes)
    assert all(codes)
    for line in printed:
        assert str(out / name) in line
        assert line.endswith(": Too many levels of symbolic links")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_checkpoint_of_another_user_is_not_called_missing(run, tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(run / "model.safetensors", path)
    path.chmod(0o600)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setuid(54321)
            checkpoint.read(path)
        except FailureError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert os.read(reader, 1000).decode() == f"cannot read {path}: Permission denied"


def test_a_row_that_was_not_written_is_written_by_the_resumed_run(run, tmp_path):
    """A run may be killed between its last checkpoint and its table."""
    out = shutil.copytree(run, tmp_path / "run")
    (out / "summary.json").unlink()
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    assert run_train("--resume", "--out", out) == 0
    assert (out / "metrics.jsonl").read_bytes() == whole
