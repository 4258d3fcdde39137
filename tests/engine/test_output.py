"""Commands whose output nobody reads, or nobody can store; errors of the system in one sentence."""

import errno
import os
import sys
import threading

import pytest
import torch

from fastres.errors import FailureError, UsageError, sentence_for
from fastres.output import _LossyFile, reader_may_leave
from tests.helpers.tiny_run import TINY, start

FULL = "error: cannot write to stdout: No space left on device\n"


def closed_pipe():
    """Return the end to write to of a pipe that nobody reads."""
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


def run(command, **streams):
    """Run to the end and return the exit code and what was written to stderr, where it is read."""
    with start(command, **streams) as child:
        return child.communicate(timeout=120)[1], child.returncode


def close_all_streams():
    for descriptor in range(3):
        os.close(descriptor)


SINKS = {
    "closed pipe": (lambda: {"stdout": closed_pipe()}, ""),
    "closed pipes": (lambda: {"stdout": closed_pipe(), "stderr": closed_pipe()}, None),
    "full disk": (lambda: {"stdout": os.open("/dev/full", os.O_WRONLY)}, FULL),
    "no streams": (lambda: {"preexec_fn": close_all_streams}, ""),
}


@pytest.mark.parametrize("sink", SINKS)
def test_a_run_goes_on_without_its_readers(sink, tmp_path):
    streams, expected = SINKS[sink]
    out = tmp_path / "run"
    ended = run(["-m", "fastres.train", *TINY, "--epochs", "2", "--out", out], **streams())
    assert ended == (expected, 0)
    assert (out / "summary.json").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


COMMANDS = {
    "fastres": ["fastres"],
    "train --help": ["fastres.train", "--help"],
    "train --dry-run": ["fastres.train", *TINY, "--dry-run"],
    "tune --help": ["fastres", "tune", "--help"],
    "codegen --help": ["fastres.kernels.tools.codegen", "--help"],
    "parity --help": ["fastres", "parity", "--help"],
    "evaluate --help": ["fastres.evaluate", "--help"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_may_lose_its_reader(command):
    assert run(["-m", *command], stdout=closed_pipe()) == ("", 0)


def test_a_result_that_was_not_stored_is_a_failure():
    assert run(["-m", "fastres"], stdout=os.open("/dev/full", os.O_WRONLY)) == (FULL, 1)


def test_a_pipe_that_takes_no_more_for_now_is_waited_for():
    """Another process that shares it may have made it non-blocking."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    text, received = os.urandom(1 << 20), []
    with open(ours, "rb") as reader:
        thread = threading.Thread(target=lambda: received.append(reader.read()))
        thread.start()
        file, written = _LossyFile(theirs), 0
        while written < len(text):
            written += file.write(text[written:])
        os.close(theirs)
        thread.join()
    assert received == [text]


def test_streams_of_a_caller_are_left_to_it(capsys):
    before = sys.stdout
    with reader_may_leave():
        print("\udcff is no character")
        assert sys.stdout is before
    assert capsys.readouterr().out == "\\udcff is no character\n"


def test_what_a_caller_printed_before_comes_before():
    code = (
        "from fastres.output import reader_may_leave\n"
        "print(1)\nwith reader_may_leave(): print(2)\nprint(3)"
    )
    with start(["-c", code]) as child:
        assert child.stdout.read() == "1\n2\n3\n"


CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"
)
SENTENCES = [
    (UsageError("--lr is too odd"), "--lr is too odd"),
    (FailureError("no worker is left"), "no worker is left"),
    (OSError(errno.ENOSPC, "No space left on device", "run/x"), "run/x: No space left on device"),
    (MemoryError(), "out of memory; a smaller --batch-size"),
    (
        RuntimeError(CPU_ALLOCATOR),
        "out of memory (2,048 MiB more were asked for); a small",
    ),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
        "out of memory (20.00 GiB more were asked for); a smaller --batch-size",
    ),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "out of memory; a smaller --batch-si"),
    (RuntimeError("std::bad_alloc"), "out of memory; a smaller --batch-size"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; a smaller --batch-size"),
]


@pytest.mark.parametrize(("error", "sentence"), SENTENCES)
def test_what_a_user_can_mend_is_one_sentence(error, sentence):
    found = sentence_for(error)
    assert found is not None
    assert found.startswith(sentence)
    assert "\n" not in found


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes differ"), ValueError("x")])
def test_a_bug_keeps_its_traceback(error):
    assert sentence_for(error) is None


def test_a_run_without_enough_memory_ends_in_one_sentence(tmp_path):
    """The limit is what the process has when torch is loaded, and 256 MiB more."""
    code = (
        "import resource, sys; import fastres.engine.trainer; from fastres import train\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 28),) * 2)\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    options = ["--limit-train", "9000", "--batch-size", "8192", "--width", "2", "--epochs", "1"]
    error, exit_code = run(["-c", code, *TINY, *options, "--out", tmp_path / "run"])
    assert exit_code == 1
    assert error.startswith("error: out of memory (")
    assert "a smaller --batch-size needs less" in error
    assert error.count("\n") == 1
