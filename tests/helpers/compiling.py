"""Programs whose kernels are compiled: in the process of the tests they are interpreted.

They are forked from one server a test process, which has imported torch, Triton and the kernels.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


@functools.cache
def _server() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the server, which ends with this process: its end of the socket is closed then."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    with other:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.compile_server", str(other.fileno())],
            env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path},
            cwd=REPO,
            pass_fds=[other.fileno()],
        )
    return process, own


class Compiling:
    """A program that was started where Triton compiles; several run side by side."""

    def __init__(self, *argv: str, cwd: Path = REPO, **variables: str) -> None:
        """Start `python *argv`: a file or -m and a module, then its arguments."""
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 - see wait
        self._end, other = socket.socketpair()
        environment = os.environ | {"TRITON_INTERPRET": "0"} | variables
        with tempfile.TemporaryFile("w+") as request, other:
            json.dump([argv, str(cwd), environment], request)
            request.flush()
            fds = [file.fileno() for file in (other, request, *self._files)]
            socket.send_fds(_server()[1], [b"run"], fds)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """What became of it; a program that was killed has no code and counts as failed."""
        code = b"".join(iter(lambda: self._end.recv(16), b""))
        self._end.close()
        texts = []
        for file in self._files:
            with file:
                file.seek(0)
                texts.append(file.read())
        return subprocess.CompletedProcess([], int(code or b"-1"), *texts)

    def answer(self) -> Any:
        """The JSON that it printed."""
        done = self.wait()
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def run_compiling(*argv: str, **variables: str) -> Any:
    """Run a test file as a program where Triton compiles, and read the JSON that it prints."""
    return Compiling(*argv, **variables).answer()
