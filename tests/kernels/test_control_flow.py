"""Counting instructions along the control flow of SASS, on snippets of a few instructions."""

import re

import pytest

from fastres.kernels.tools.control_flow import count_program


def assembled(source):
    """SASS as cuobjdump prints it; a line may start with `label:`, and a jump name a label."""
    lines = [line.strip() for line in source.strip().splitlines()]
    labels = {}
    for i, line in enumerate(lines):
        label, colon, rest = line.partition(": ")
        if colon:
            labels[label], lines[i] = f"0x{16 * i:x}", rest
    text = "\n".join(
        f"        /*{16 * i:04x}*/   {line} ;   /* 0x00 */" for i, line in enumerate(lines)
    )
    return "\tFunction : _kernel\n" + re.sub(r"\b[a-z]+\b(?= ;)", lambda m: labels[m[0]], text)


PADDING = """
EXIT
end: BRA end
NOP
NOP
"""


def test_straight_line():
    count = count_program(assembled("MOV R1, R2\n@P0 LDG.E R3, [R4.64]\nNOP" + PADDING))
    # A false predicate costs its slot as well; what follows the end is never reached.
    assert count.by_depth == (4,)
    assert (count.last_by_depth, count.conditional, count.skipped) == ((), 0, 0)
    assert count.instructions((5.0,)) == 4


LOOP = """
MOV R1, R2
@P0 BRA after
loop: LDG.E R3, [R4.64]
FADD R5, R5, R3
@P1 BRA loop
after: STG.E [R4.64], R5
"""


def test_a_loop_counts_by_its_trips():
    count = count_program(assembled(LOOP + PADDING))
    assert count.by_depth == (4, 3)
    # Only the guard of the loop can avoid it, and a loop with declared trips is entered.
    assert count.conditional == 0
    assert count.instructions((10.0,)) == 4 + 30
    assert count.instructions(()) == 7


def test_a_loop_that_ends_in_its_middle():
    source = """
    MOV R1, R2
    loop: ISETP.GE.AND P0, PT, R1, R2, PT
    @P0 BRA after
    FADD R5, R5, R3
    BRA loop
    after: STG.E [R4.64], R5
    """
    assert count_program(assembled(source + PADDING)).by_depth == (3, 4)


def test_nested_loops_multiply():
    source = """
    MOV R1, R2
    outer: MOV R6, R2
    inner: FADD R5, R5, R3
    @P1 BRA inner
    STG.E [R4.64], R5
    @P2 BRA outer
    """
    count = count_program(assembled(source + PADDING))
    assert count.by_depth == (2, 3, 2)
    assert count.loop_depth == 2
    assert count.instructions((10.0, 7.0)) == 2 + 10 * (3 + 7 * 2)
    # A loop that nobody declared is passed once.
    assert count.instructions((10.0,)) == 2 + 10 * (3 + 2)


def test_loops_one_after_another_share_their_trips():
    source = """
    one: FADD R5, R5, R3
    @P1 BRA one
    two: FMUL R5, R5, R3
    FMUL R5, R5, R3
    @P2 BRA two
    """
    assert count_program(assembled(source + PADDING)).by_depth == (1, 5)


@pytest.mark.parametrize(
    "branch", ["@P0 BRA after", "@!P0 BRA after", "BRA.U UP0, after", "BRA !P1, after"]
)
def test_a_branch_over_instructions_is_said(branch):
    source = f"""
    MOV R1, R2
    {branch}
    FADD R5, R5, R3
    FADD R5, R5, R3
    after: STG.E [R4.64], R5
    """
    count = count_program(assembled(source + PADDING))
    assert count.by_depth == (6,)
    assert count.conditional == 2


def test_of_two_arms_the_longer_counts():
    source = """
    @P0 BRA other
    FADD R5, R5, R3
    BRA after
    other: FMUL R5, R5, R3
    FMUL R5, R5, R3
    FMUL R5, R5, R3
    after: STG.E [R4.64], R5
    """
    count = count_program(assembled(source + PADDING))
    assert count.by_depth == (6,)
    assert count.conditional == 3


def test_a_branch_inside_a_loop_is_said():
    source = """
    loop: LDG.E R3, [R4.64]
    @P0 BRA skip
    FADD R5, R5, R3
    skip: IADD3 R4, R4, R6, RZ
    @P1 BRA loop
    """
    count = count_program(assembled(source + PADDING))
    assert count.by_depth == (1, 5)
    assert count.conditional == 1


def test_the_loop_that_most_programs_skip():
    source = """
    MOV R1, R2
    @P0 BRA after
    FADD R5, R5, R3
    FADD R5, R5, R3
    after: STG.E [R4.64], R5
    """
    count = count_program(assembled(source + PADDING))
    assert count.is_one_trip((0.25,))
    assert count.instructions((0.25,)) == 4 + 0.25 * 2


def test_the_slow_path_of_a_division_is_left_out():
    source = """
    FCHK P0, R2, R3
    @!P0 BRA fast
    MOV R8, R9
    CALL.REL.NOINC slow
    fast: STG.E [R4.64], R5
    EXIT
    slow: FMUL R5, R5, R3
    @P1 BRA back
    FMUL R5, R5, R3
    back: RET.REL.NODEC R8 0x0
    """
    count = count_program(assembled(source + PADDING))
    assert count.by_depth == (4,)
    assert count.skipped == 2 + 4


def test_a_wait_for_a_barrier_is_no_loop():
    source = """
    loop: SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
    wait: SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2
    @!P0 BRA wait
    FADD R5, R5, R3
    @P1 BRA loop
    """
    count = count_program(assembled(source + PADDING))
    assert count.by_depth == (1, 5)


# Thread 0 draws a ticket and tells it to the others through shared memory.
TICKET = """
FADD R5, R5, R3
MEMBAR.SC.GPU
@!P0 ATOMG.E.ADD.STRONG.GPU PT, R0, [R2.64], R7
@!P0 STS [UR4], R0
BAR.SYNC.DEFER_BLOCKING 0x0
LDS R9, [UR4]
ISETP.NE.AND P1, PT, R9, R10, PT
"""
LAST = """
LDG.E R3, [R4.64]
loop: FADD R5, R5, R3
FADD R5, R5, R3
@P2 BRA loop
STG.E [R4.64], R5
"""


def test_what_follows_the_end_of_all_but_the_last_program():
    count = count_program(assembled(TICKET + "@P1 EXIT" + LAST + PADDING))
    assert count.by_depth == (8,)
    assert count.last_by_depth == (3, 3)
    assert count.last_instructions == 6


def test_a_region_that_the_last_program_alone_enters():
    source = TICKET + "@P1 BRA after" + LAST + "after: MOV R1, R2" + PADDING
    count = count_program(assembled(source))
    assert count.by_depth == (10,)
    assert count.last_by_depth == (2, 3)


def test_a_region_apart_that_the_last_program_alone_enters():
    source = TICKET.replace("NE", "EQ") + "@P1 BRA last\nMOV R1, R2\nEXIT\nlast: MOV R3, R4" + LAST
    count = count_program(assembled(source + PADDING))
    assert count.by_depth == (10,)
    assert count.last_by_depth == (4, 3)


def test_a_ticket_in_uniform_registers():
    draw = TICKET.replace("ISETP.NE.AND P1, PT, R9, R10, PT", "R2UR UR6, R9")
    source = draw + "UISETP.NE.AND UP0, UPT, UR6, UR7, UPT\nBRA.U UP0, after" + LAST
    count = count_program(assembled(source + "after: MOV R1, R2" + PADDING))
    assert count.by_depth == (11,)
    assert count.last_by_depth == (2, 3)


def test_a_ticket_that_one_lane_draws_for_all():
    drawn = "@!P0 ATOMG.E.ADD.STRONG.GPU PT, R0, [R2.64], R7\n"
    by_lane = "ATOMG.E.ADD.STRONG.GPU PT, R5, [R2.64], R7\nSHFL.IDX PT, R0, R5, R6, 0x1f\n"
    source = TICKET.replace(drawn, by_lane) + "@P1 EXIT" + LAST + PADDING
    assert count_program(assembled(source)).last_by_depth == (3, 3)


def test_the_last_of_a_persistent_program():
    source = "tile: FMUL R5, R5, R3\n@P3 BRA tile" + TICKET + "@P1 EXIT" + LAST + PADDING
    count = count_program(assembled(source))
    assert count.by_depth == (8, 2)
    assert count.last_by_depth == (3, 3)


def test_each_of_two_results_is_finished_by_a_last_program():
    """One after the other; in the first, a second level draws a ticket of its own."""
    level = TICKET + "@P1 BRA joined\nIADD3 R4, R4, R6, RZ\njoined: NOP"
    first = TICKET + "@P1 BRA next" + LAST + level.strip() + "\nnext: MOV R1, R2"
    second = TICKET + "@P1 BRA after" + LAST.replace("loop", "again") + "after: MOV R1, R2"
    source = first + second
    count = count_program(assembled(source + PADDING))
    # Twice a ticket, its branch and what follows it.
    assert count.by_depth == (2 * 9 + 1,)
    # In both: a load, a store, a loop of three; in the second level a ticket and what it decides.
    assert count.last_by_depth == (2 + 7 + 3 + 2, 2 * 3)
    assert count.conditional == 0


@pytest.mark.parametrize(
    "changed",
    [
        # Nobody reads the ticket; the branch reads something else; the register is used anew.
        ("ATOMG.E.ADD.STRONG.GPU PT, R0", "RED.E.ADD.STRONG.GPU [R2.64]"),
        ("PT, R9, R10", "PT, R8, R10"),
        ("LDS R9, [UR4]", "MOV R9, R8"),
    ],
)
def test_a_branch_on_anything_else_is_taken_by_all(changed):
    count = count_program(assembled(TICKET.replace(*changed) + "@P1 EXIT" + LAST + PADDING))
    assert count.last_by_depth == ()
    assert count.by_depth == (11, 3)


def test_no_code_is_refused():
    with pytest.raises(ValueError, match="no instruction"):
        count_program("\tFunction : _kernel\n")
