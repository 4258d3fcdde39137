"""The tickets of the last program in machine code: what orders them with all that they stand for.

Weaker semantics, or a barrier left out, give the same results in the interpreter, and on a GPU
nearly always. Kernels are compiled in another process, which this file is the program of.
"""

import json
import re
import sys

import pytest
import torch

from fastres.kernels.gpu.launch import recording
from fastres.kernels.tools.machine_code import to_build
from tests.helpers.compiling import run_compiling
from tests.helpers.kernel_cases import make_tensors
from tests.helpers.kernel_forms import FORMS, map_tensors

# Each way to finish: statistics, gradient sums, the tiles of a filter gradient and all of it.
NAMES = ["bn_stats", "bn_backward_reduce", "im2col wgrad", "strip wgrad"]

EVENT = re.compile(
    r"^\s*(?:@!?%p\d+ )?((?:st\.global|ld\.global|atom|bar\.sync|bra)[\w.]*|\$L__BB\w+)"
)


def events(name):
    """What the PTX of a kernel does with global memory, barriers and jumps, in its order."""
    form = FORMS[name]
    t = make_tensors(form.shape, torch.bfloat16)
    with recording() as launches:
        form.run(map_tensors(lambda _, v: v.to("meta"), t), form.shape, form.config)
    ptx = to_build(launches[0], 90).run_launcher().asm["ptx"]
    return [found.group(1) for found in map(EVENT.match, ptx.splitlines()) if found]


def main() -> int:
    print(json.dumps({name: events(name) for name in NAMES}))
    return 0


@pytest.fixture(scope="module")
def codes():
    return run_compiling(__file__)


@pytest.mark.parametrize("name", NAMES)
def test_a_ticket_is_drawn_between_all_stores_and_all_loads(name, codes):
    """Barriers are what makes the order of one thread, which draws, that of all of a program."""
    code = codes[name]
    tickets = [i for i, event in enumerate(code) if event.startswith("atom")]
    assert len(tickets) == 2  # of a group, and of all groups
    for start, ticket in zip((0, tickets[0] + 1), tickets, strict=True):
        # Released to and acquired from programs of the whole GPU.
        assert re.fullmatch(r"atom\.global\.gpu\.acq_rel\.add\.[us]32", code[ticket])
        assert code[ticket - 1] == "bar.sync"
        assert code[ticket + 1] == "bar.sync"
        # The partial that it stands for, and only behind it the zero of its counter.
        assert any(event.startswith("st.global") for event in code[start:ticket])
        assert any(event.startswith("ld.global") for event in code[ticket:])


if __name__ == "__main__":
    sys.exit(main())
