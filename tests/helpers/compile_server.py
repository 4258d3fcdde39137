"""The server of compiling.py: imports once, then forks a process for each program to run.

    python -m tests.helpers.compile_server FD

What a disassembly says is kept in Triton's cache beside the code, by the bytes of that code, the
tool and the function that calls it: half a second of the disassembler's start for each kernel.
"""

import functools
import hashlib
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest  # noqa: F401 - of the test files, which are the programs
import triton
from triton.runtime.cache import get_cache_manager, triton_key

from fastres.kernels.tools import machine_code

# What most programs import; none of it compiles anything.
PRELOADED = ("fastres.kernels.tools.step_report", "fastres.kernels.tools.command_line")


def kept(disassemble: Callable[[bytes], tuple[str, int]]) -> Callable[[bytes], tuple[str, int]]:
    """The same function, which looks into Triton's cache first."""
    tools = Path(triton.knobs.nvidia.cuobjdump.path).parent
    stats = [(tools / name).stat() for name in ("cuobjdump", "nvdisasm")]
    made_by = [inspect.getsource(disassemble), [(s.st_size, s.st_mtime_ns) for s in stats]]

    @functools.wraps(disassemble)
    def look_up(cubin: bytes) -> tuple[str, int]:
        key = hashlib.sha256(json.dumps(made_by).encode() + cubin).hexdigest()
        cache = get_cache_manager(key)
        path = cache.get_file("disassembly.json")
        if path is None:
            found = disassemble(cubin)
            cache.put(json.dumps(found), "disassembly.json", binary=False)
            return found
        sass, registers = json.loads(Path(path).read_text())
        return sass, registers

    return look_up


def run(argv: list[str], cwd: str, environment: dict[str, str]) -> int:
    """What `python *argv` does, and its exit code."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(argv)
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve(requests: socket.socket) -> None:
    """Fork for each request until nobody can send one any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        _, fds, _, _ = socket.recv_fds(requests, 16, 4)
        if not fds:
            return
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            end, request, out, err = fds
            os.dup2(out, 1)
            os.dup2(err, 2)
            with open(request) as file:
                file.seek(0)
                code = run(*json.load(file))
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(end, str(code).encode())
            os._exit(code)
        for fd in fds:
            os.close(fd)


def main() -> None:
    machine_code.disassemble = kept(machine_code.disassemble)
    for name in PRELOADED:
        importlib.import_module(name)
    triton_key()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
