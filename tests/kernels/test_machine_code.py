"""Reading machine code: what is counted in it, and which operand a load belongs to."""

import pytest
import torch

from fastres.kernels.conv_types import BatchNorm
from fastres.kernels.gpu import primitives
from fastres.kernels.gpu.batchnorm_fwd import bn_stats
from fastres.kernels.gpu.launch import recording
from fastres.kernels.tools import machine_code
from fastres.kernels.tools.machine_code import compile_launch
from tests.helpers.interpreter import HAS_GPU

SOURCE = """import triton.language as tl

def kernel(x_ptr, w_ptr, offs):
    x = tl.load(x_ptr + offs[:, None] + 1, mask=offs < 9, other=0.0)
    w = tl.load(
        w_ptr + offs,
        mask=offs < 9,
    )
    return x + w
"""

# A masked load of x, whose assembly LLVM gives the lines from 4 on; two of w, one asynchronous.
PTX = """
	.loc	1 4 9
	// begin inline asm
	.loc	1 4 9
	mov.u32 %r1, %r9;
	.loc	1 5 9
	mov.u32 %r2, %r9;
	@%p1 ld.global.L1::evict_last.b32 { %r1 }, [ %rd1 + 0 ];
	// end inline asm
	// begin inline asm
	.loc	1 4 9
	@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
	// end inline asm
	.loc	1 5 9, function_name $L__info_string0, inlined_at 1 9 9
	// begin inline asm
	cp.async.cg.shared.global.L2::128B [ %r5 + 0 ], [ %rd2 + 0 ], 0x10, %r6;
	// end inline asm
	// begin inline asm
	@%p2 ld.global.b16 { %rs1 }, [ %rd3 + 0 ];
	// end inline asm
	ld.shared.b16 %rs2, [%r7];
	.file	1 "FILE"
"""


def test_loads_are_told_apart_by_their_source_lines(tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)
    bits = machine_code._load_bits(PTX.replace("FILE", str(path)))
    assert bits == {"x_ptr": 32, "w_ptr": 16}
    wide = PTX
    for narrow in (".L1::evict_last.b32 { %r1 }", ".v2.b32 { %r1, %r2 }", ".b16 { %rs1 }"):
        wide = wide.replace(f"ld.global{narrow}", "ld.global.v4.b32 { }")
    assert machine_code._load_bits(wide.replace("FILE", str(path))) == {"x_ptr": 128, "w_ptr": 128}


def test_instructions_are_counted_by_kind_and_width():
    sass = """
        LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64] ;
        LDGSTS.E.LTC128B.64 [R1], [R2.64] ;
        LDG.E.128 R4, [R2.64] ;
        LDG.E.U16 R4, [R2.64] ;
        STG.E.128 [R2.64], R4 ;
        STG.E [R2.64], R4 ;
        STL [R1], R4 ;
        LDL.LU R4, [R1] ;
        HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
        UTMALDG.4D [UR8], [UR6] ;
        LDS.128 R4, [R1] ;
    """
    code = machine_code.count_instructions(sass)
    assert code == {
        "spills": 2,
        "hgmma": 1,
        "hmma": 1,
        "tcgen05": 1,
        "tma_loads": 1,
        "wide_loads": 2,
        "narrow_loads": 2,
        "wide_stores": 1,
        "narrow_stores": 1,
    }


@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted where there is a GPU")
def test_interpreted_kernels_are_refused():
    with recording() as launches:
        y = torch.empty(1, 16, 2, 2, device="meta", memory_format=torch.channels_last)
        bn_stats(y, BatchNorm(torch.empty(16, device="meta"), torch.empty(16, device="meta")))
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
        compile_launch(launches[0], 90)


def test_loads_are_found_wherever_the_kernels_were_compiled():
    here = machine_code._loads_of_source(primitives.__file__)
    assert here
    assert machine_code._loads_of_source("/gone/fastres/kernels/gpu/primitives.py") == here
    assert machine_code._loads_of_source("/gone/triton/language/standard.py") == []
