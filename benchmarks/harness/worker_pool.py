"""A provider in a process of its own that trains a few steps whenever it is told to.

Memory settings, thread settings and compiled code belong to a process, so providers that differ in
them can be compared only between processes. All of them are started, and import and read their
data side by side; then each is told to get ready, when nothing else runs, and they take turns:
a line with a number on stdin asks for that many steps, a JSON line on stdout answers.
"""

import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks.harness.records import FinalStats, WorkerReady
from fastres import strict_json
from fastres.engine import machine

__all__ = ["Worker", "WorkerPool", "serve", "wait_for_start"]

_ROOT = Path(__file__).resolve().parents[2]


def wait_for_start() -> None:
    """Wait until the parent wants this process to get ready, or has gone."""
    sys.stdin.readline()


def serve(run: Callable[[int], int], hello: WorkerReady) -> None:
    """Answer requests until stdin ends; the far side is `Worker`.

    Args:
        run: trains the given number of steps, waits for the device and returns how many images
            these were.
        hello: said once, when everything is ready.
    """
    _say(hello)
    for line in sys.stdin:
        started = time.perf_counter()
        images = run(int(line))
        _say({"seconds": time.perf_counter() - started, "images": images})
    _say({"resident_bytes": machine.peak_memory_mib() * 2**20})


def _say(message: Mapping[str, object]) -> None:
    print(strict_json.dumps(message), flush=True)


class Worker:
    """The parent's end: starts a module as `python -m MODULE ARGUMENTS`.

    Args:
        module: one whose command line ends in `serve`.
        arguments: of its command line.
        steps: in a round.
        env: the whole environment of the process; None passes this one's on.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        steps: int,
        env: dict[str, str] | None = None,
    ):
        self.name, self.steps = module, steps
        self._is_told = False
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=_ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    @functools.cached_property
    def hello(self) -> WorkerReady:
        """What the process says when it is ready: it is told to get so, and waited for.

        Raises:
            RuntimeError: when it ends before, with the end of what it wrote to stderr.
        """
        self.get_ready()
        return cast(WorkerReady, self._hear())

    def get_ready(self) -> None:
        """Tell the process to get ready, once, and do not wait for it."""
        if not self._is_told:
            self._is_told = True
            self._ask("start")

    def sample(self) -> float:
        """Have one round trained and return the seconds of one step."""
        self._ask(str(self.steps))
        return self._hear()["seconds"] / self.steps

    def close(self) -> FinalStats:
        """End the process and return its final statistics: {"resident_bytes": ...}."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            last = self._hear()
            # An interrupted round is still answered first.
            while "resident_bytes" not in last:
                last = self._hear()
            self._process.wait(timeout=30)
        finally:
            self.kill()
        return cast(FinalStats, last)

    def kill(self) -> None:
        """End the process whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def _ask(self, line: str) -> None:
        """Send a line; a process that has ended is found out by `_hear`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        """Return the next JSON line; other lines are the program's own talk."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read().strip().splitlines()[-8:]
        raise RuntimeError(f"{self.name} ended with {code}: " + "\n".join(tail))


class WorkerPool:
    """The workers of a group: they start side by side and are waited for one by one.

    Args:
        command: module and arguments of a provider's worker; may raise, for `worker` to pass on.
        steps: in a round.
        at_once: have all get ready side by side. Beside a GPU that is compiling, for which there
            are cores; on a CPU it would be training, for which there are not.
    """

    def __init__(
        self,
        command: Callable[[str], tuple[str, list[str]]],
        steps: int,
        *,
        at_once: bool = False,
    ):
        self._command, self._steps, self._at_once = command, steps, at_once
        self._started: dict[str, Worker | Exception] = {}

    @contextlib.contextmanager
    def started(self, providers: Sequence[str]) -> Iterator[None]:
        """Start all providers; at the end of the context none of them is left."""
        for name in providers:
            try:
                self._started[name] = started = Worker(*self._command(name), self._steps)
                if self._at_once:
                    started.get_ready()
            except Exception as error:
                self._started[name] = error
        try:
            yield
        finally:
            for worker in self._started.values():
                if isinstance(worker, Worker):
                    worker.kill()

    def worker(self, provider: str) -> Worker:
        """Return the worker of a provider once it is ready."""
        worker = self._started[provider]
        if isinstance(worker, Exception):
            raise worker
        assert worker.hello
        return worker
