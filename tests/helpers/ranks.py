"""The processes of one run without torchrun: forked from a server that has imported torch.

For tests of what the processes compute together. How they begin, end and report under torchrun is
tested with it, at the price of importing torch in the launcher and in every process.
"""

import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from fastres import train


@dataclass(frozen=True)
class Ended:
    """Exit codes of the processes, and what all of them wrote."""

    codes: list[int]
    stdout: str
    stderr: str


def by_ranks(count, folder, *arguments, program=train.main):
    """Call `program(arguments)` in `count` processes, which write their streams into `folder`."""
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fastres.engine.trainer"])
    # The one that starts them holds the store they meet in, as torchrun does.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = list(map(str, arguments))
    ranks = [
        context.Process(target=_act, args=(rank, count, store.port, folder, program, words))
        for rank in range(count)
    ]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(300)
        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    texts = ["".join(f.read_text() for f in sorted(folder.glob(f"*{n}"))) for n in (1, 2)]
    return Ended(codes, *texts)


def _act(rank: int, count: int, port: int, folder: Path, program, arguments):
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    }
    for stream in (1, 2):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
    sys.exit(program(arguments))
