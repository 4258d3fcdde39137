"""How many instructions a warp of one program issues, read from machine code that is not run.

`count_program` cuts the SASS of a kernel into basic blocks and follows the longest way from its
entry to its end, a loop's body once:

    loops          counted by depth of nesting, to be multiplied by the trips of the loops around;
                   a wait for a barrier that is a loop of its own counts as passed at first try
    branches       the longest arm counts, and how much of it other ways avoid is said
    slow paths     a block that calls a subroutine and can be avoided (Triton inlines everything;
                   what remains is the division of denormal numbers) is left out, and said
    last program   what is reached only by a branch on the ticket of an integer atomic is executed
                   by the last program to draw one, and counted apart: of every such branch, as a
                   kernel that finishes two results has two

The first three make the count an estimate; without them it is exact. Instructions with a false
predicate count: they are issued. All blocks are numbers in order of address; sets of them are ints,
one bit a block.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import NamedTuple

__all__ = ["ProgramCount", "count_program"]

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
_REGISTER = re.compile(r"\bU?[RP]\d+\b")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*(?:\(|$)")

# A wait for a barrier is no longer than this.
_WAIT_INSTRUCTIONS = 16


class _Instruction(NamedTuple):
    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a jump or a call leads."""
        found = _TARGET.search(self.operands.strip()) if self.kind in ("BRA", "CALL") else None
        return int(found.group(1), 16) if found else None

    @property
    def is_conditional(self) -> bool:
        """Whether a jump or an end may be passed by."""
        return bool(self.guard) or bool(re.search(r"\bU?P\d\b|\bUR\d+\b", self.operands))


@dataclass(frozen=True)
class ProgramCount:
    """Instructions of one warp of one program.

    by_depth: outside of loops, in one trip of an outermost loop, in one trip of a loop inside it...
    last_by_depth: the same of the parts that the last program alone executes, together.
    conditional: those of by_depth that a branch can avoid, other than the guard of a loop.
    skipped: those that are not counted because they call a subroutine and can be avoided.
    """

    by_depth: tuple[int, ...]
    last_by_depth: tuple[int, ...] = ()
    conditional: int = 0
    skipped: int = 0

    @property
    def loop_depth(self) -> int:
        """How deep the loops of every program nest."""
        return len(self.by_depth) - 1

    def is_one_trip(self, trips: Sequence[float]) -> bool:
        """Whether what was a loop is a branch: of at most one trip, which not all programs make."""
        return self.loop_depth == 0 and trips[0] < 1

    def instructions(self, trips: Sequence[float]) -> float:
        """Those of a program whose loops make so many trips, the outermost first; else one."""
        if self.is_one_trip(trips):
            return self.by_depth[0] - self.conditional * (1 - trips[0])
        total, times = 0.0, 1.0
        for depth, count in enumerate(self.by_depth):
            if 0 < depth <= len(trips):
                times *= trips[depth - 1]
            total += count * times
        return total

    @property
    def last_instructions(self) -> int:
        """Those of the last program, each of its loops making one trip."""
        return sum(self.last_by_depth)


def count_program(sass: str) -> ProgramCount:
    """Count the instructions of the kernel in a disassembly of cuobjdump or nvdisasm.

    Raises: ValueError: when there is no instruction in it.
    """
    graph = _Graph(_parse(sass))
    body = graph.reachable(0, 0)
    skipped = graph.avoidable_calls(body)
    body &= graph.reachable(0, skipped)
    of_last = _last_program(graph, body)
    of_all = body
    for blocks in of_last.values():
        of_all &= ~blocks
    path = _longest_path(graph, of_all, 0)
    last_counts = [
        _by_depth(graph, _longest_path(graph, blocks, head), graph.loops(blocks, head))
        for head, blocks in of_last.items()
    ]
    return ProgramCount(
        by_depth=_by_depth(graph, path, graph.loops(of_all, 0)),
        last_by_depth=tuple(map(sum, zip_longest(*last_counts, fillvalue=0))),
        conditional=graph.size(_conditional(graph, path, of_all)),
        skipped=graph.size(skipped) + graph.callee_size(skipped),
    )


def _parse(sass: str) -> list[_Instruction]:
    found = [
        _Instruction(int(address, 16), guard or "", opcode, operands.strip())
        for address, guard, opcode, operands in _LINE.findall(sass)
    ]
    if not found:
        raise ValueError("no instruction in the disassembly")
    # Addresses start anew with the next function: what a kernel does not inline.
    ends = [i for i in range(1, len(found)) if found[i].address <= found[i - 1].address]
    return found[: ends[0]] if ends else found


def _bits(blocks: int) -> Iterator[int]:
    """The blocks of a set, in order of address."""
    while blocks:
        lowest = blocks & -blocks
        yield lowest.bit_length() - 1
        blocks ^= lowest


class _Graph:
    """Basic blocks: their instructions, and the sets of those before and behind each."""

    def __init__(self, instructions: Sequence[_Instruction]):
        ends = ("BRA", "EXIT", "RET", "BRX", "JMX", "CALL")
        starts = {instructions[0].address}
        for this, following in pairwise(instructions):
            if this.kind in ends:
                starts.add(following.address)
            if this.target is not None:
                starts.add(this.target)
        self.blocks: list[list[_Instruction]] = []
        for instruction in instructions:
            if instruction.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
        self.number = {block[0].address: i for i, block in enumerate(self.blocks)}
        self.after = [self._successors(i) for i in range(len(self.blocks))]
        self.before = [0] * len(self.blocks)
        for i, successors in enumerate(self.after):
            for j in _bits(successors):
                self.before[j] |= 1 << i

    def _successors(self, i: int) -> int:
        end = self.blocks[i][-1]
        found = 0
        if end.kind == "BRA" and end.target in self.number:
            found |= 1 << self.number[end.target]
        leaves = end.kind in ("BRA", "EXIT", "RET", "BRX", "JMX")
        if (not leaves or end.is_conditional) and i + 1 < len(self.blocks):
            found |= 1 << (i + 1)
        return found

    def size(self, blocks: int) -> int:
        """Instructions in a set of blocks."""
        return sum(len(self.blocks[i]) for i in _bits(blocks))

    def ends(self, i: int) -> bool:
        """Whether the program may end with block i."""
        return self.blocks[i][-1].kind in ("EXIT", "RET")

    def reachable(self, start: int, without: int, edge: tuple[int, int] | None = None) -> int:
        """Blocks that are reached from `start`, not entering `without`, not using `edge`."""
        found, waiting = 1 << start, 1 << start
        while waiting:
            i = waiting.bit_length() - 1
            waiting ^= 1 << i
            following = self.after[i]
            if edge is not None and i == edge[0]:
                following &= ~(1 << edge[1])
            new = following & ~found & ~without
            found |= new
            waiting |= new
        return found

    def avoidable_calls(self, body: int) -> int:
        """Blocks that call a subroutine and that a program can do without."""
        found = 0
        for i in _bits(body):
            if self.blocks[i][-1].kind == "CALL" and i:
                rest = self.reachable(0, found | 1 << i)
                if any(self.ends(j) for j in _bits(rest)):
                    found |= 1 << i
        return found

    def callee_size(self, calls: int) -> int:
        """Instructions of the subroutines that some blocks call."""
        starts = {self.number.get(self.blocks[i][-1].target or -1) for i in _bits(calls)}
        bodies = 0
        for start in starts - {None}:
            bodies |= self.reachable(start or 0, 0)
        return self.size(bodies)

    def dominators(self, body: int, start: int) -> dict[int, int]:
        """For each block of `body` those that every way to it from `start` passes; itself too."""
        found = dict.fromkeys(_bits(body), body)
        found[start] = 1 << start
        changed = True
        while changed:
            changed = False
            for i in found:
                if i == start:
                    continue
                common = body
                for j in _bits(self.before[i] & body):
                    common &= found[j]
                common |= 1 << i
                changed |= common != found[i]
                found[i] = common
        return found

    def loops(self, body: int, start: int) -> dict[int, int]:
        """{header: blocks} of every loop in `body`; waits for barriers are none."""
        dominators = self.dominators(body, start)
        found: dict[int, int] = {}
        for i, above in dominators.items():
            for header in _bits(self.after[i] & above):
                inside, waiting = 1 << header | 1 << i, 1 << i & ~(1 << header)
                while waiting:
                    j = waiting.bit_length() - 1
                    waiting ^= 1 << j
                    new = self.before[j] & body & ~inside
                    inside |= new
                    waiting |= new
                found[header] = found.get(header, 0) | inside
        return {
            header: blocks
            for header, blocks in found.items()
            if not self._tries_a_barrier(blocks)
            or any(blocks >> other & 1 for other in found if other != header)
        }

    def _tries_a_barrier(self, blocks: int) -> bool:
        """Whether an innermost loop of these blocks tries a barrier again until it is passed."""
        tries = any("TRYWAIT" in x.opcode for i in _bits(blocks) for x in self.blocks[i])
        return tries and self.size(blocks) <= _WAIT_INSTRUCTIONS


def _longest_path(graph: _Graph, body: int, start: int) -> int:
    """The blocks of the longest way through `body` from `start`, each loop passed once."""
    loops = graph.loops(body, start)
    loops.pop(start, None)
    # The outermost loops stand for all their blocks.
    stands_for = {
        header: blocks
        for header, blocks in loops.items()
        if not any(blocks & ~other == 0 and other != blocks for other in loops.values())
    }
    owner = {i: header for header, blocks in stands_for.items() for i in _bits(blocks)}
    paths = {header: _longest_path(graph, blocks, header) for header, blocks in stands_for.items()}
    best: dict[int, int] = {}
    open_nodes: set[int] = set()

    def longest_from(node: int) -> int:
        """The longest way from `node` to where nothing follows."""
        if node not in best:
            open_nodes.add(node)
            blocks = stands_for.get(node, 1 << node)
            following = 0
            for i in _bits(blocks):
                following |= graph.after[i] & body & ~blocks & ~(1 << start)
            nodes = {owner.get(i, i) for i in _bits(following)} - open_nodes
            ways = [longest_from(i) for i in sorted(nodes)]
            rest = max(ways, key=graph.size, default=0)
            best[node] = paths.get(node, 1 << node) | rest
            open_nodes.remove(node)
        return best[node]

    return longest_from(start)


def _by_depth(graph: _Graph, path: int, loops: dict[int, int]) -> tuple[int, ...]:
    """Instructions of a path by the number of loops around them."""
    counts: list[int] = []
    for i in _bits(path):
        depth = sum(blocks >> i & 1 for blocks in loops.values())
        counts += [0] * (depth + 1 - len(counts))
        counts[depth] += len(graph.blocks[i])
    return tuple(counts)


def _conditional(graph: _Graph, path: int, body: int) -> int:
    """The blocks of a path that other ways through `body` avoid, unless they avoid a loop too."""
    dominators, loops = graph.dominators(body, 0), graph.loops(body, 0)
    found = 0
    for i in _bits(path & ~1):
        if found >> i & 1 or not _is_avoidable(graph, body, loops, i):
            continue
        region = sum(1 << j for j, above in dominators.items() if above >> i & 1)
        if not any(region >> header & 1 for header in loops):
            found |= region & path
    return found


def _is_avoidable(graph: _Graph, body: int, loops: dict[int, int], i: int) -> bool:
    """Whether the program can end, or the loop around block i go on, without passing the block."""
    around = [(blocks, header) for header, blocks in loops.items() if blocks >> i & 1]
    if not around:
        return any(graph.ends(j) for j in _bits(graph.reachable(0, 1 << i | ~body)))
    blocks, header = min(around, key=lambda loop: loop[0].bit_count())
    if header == i:
        return False
    rest = graph.reachable(header, 1 << i | ~blocks)
    return any(graph.after[j] >> header & 1 for j in _bits(rest))


def _last_program(graph: _Graph, body: int) -> dict[int, int]:
    """{first block: blocks} of each part that only the last program to draw a ticket executes.

    A ticket that is drawn inside such a part, as the second level of a merge does, divides it no
    further.
    """
    found: dict[int, int] = {}
    for i in _ticket_branches(graph, body):
        sides = [
            (j, body & ~graph.reachable(0, ~body, edge=(i, j)))
            for j in _bits(graph.after[i] & body)
        ]
        head, blocks = max(sides, key=lambda side: graph.size(side[1]), default=(0, 0))
        if blocks and not any(blocks & other for other in found.values()):
            found[head] = blocks
    return found


def _ticket_branches(graph: _Graph, body: int) -> Iterator[int]:
    """Blocks that end with a branch on what an integer atomic returned.

    The value is followed through registers, predicates and shared memory, by which the thread that
    drew the ticket tells it to all others.
    """
    tainted_after: dict[int, frozenset[str]] = {}
    for i in _bits(body):
        tainted: set[str] = set()
        for j in _bits(graph.before[i] & body):
            tainted |= tainted_after.get(j, frozenset())
        for instruction in graph.blocks[i]:
            _follow(instruction, tainted)
        tainted_after[i] = frozenset(tainted)
        end = graph.blocks[i][-1]
        used = {end.guard.lstrip("!"), *_REGISTER.findall(end.operands)}
        if end.kind in ("BRA", "EXIT") and used & tainted:
            yield i


def _follow(instruction: _Instruction, tainted: set[str]) -> None:
    """Bring `tainted`, the registers that depend on a ticket, behind one instruction."""
    operands = [operand.strip() for operand in instruction.operands.split(",")]
    kind = instruction.kind
    if kind in ("ATOM", "ATOMG") and ".F" not in instruction.opcode:
        tainted.update(x for x in operands[:2] if re.fullmatch(r"R\d+", x))
        return
    if kind in ("STS", "ST", "STG", "RED", "REDG", "BRA", "EXIT"):
        if kind == "STS" and set(_REGISTER.findall(operands[-1])) & tainted:
            tainted.add("shared")
        return
    num_results = 2 if kind.endswith("SETP") or kind in ("PLOP3", "UPLOP3", "SHFL") else 1
    results = {x for operand in operands[:num_results] for x in _REGISTER.findall(operand)[:1]}
    sources = set(_REGISTER.findall(",".join(operands[num_results:])))
    reads_ticket = bool(sources & tainted) or (kind == "LDS" and "shared" in tainted)
    if reads_ticket:
        tainted |= results
    elif not instruction.guard:
        tainted -= results
