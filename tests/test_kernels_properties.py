r"""Every registered op on drawn shapes, strides with gaps, routes and tiles; forward and backward.

A sample runs with every test run. The long run draws as many cases an op as asked, from a seed of
the clock that it prints, and refused cases do not end it:

    FASTRES_EXAMPLES=2000 pytest -m slow tests/test_kernels_properties.py \
        -o junit_family=xunit1 --junitxml run.xml
    python -m benchmarks.properties run.xml
"""

import os
import time

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from interpreter import HAS_GPU
from property_cases import Case, LayerSize, cases, judge

from fastres.kernels import chain_triton

EXAMPLES = int(os.environ.get("FASTRES_EXAMPLES", "2000"))
# A GPU compiles every drawn shape anew.
SAMPLE = 3 if HAS_GPU else 20

BLOCKS = [(depth, kind) for depth in (2, 3) for kind in ("none", "input", "given", "projected")]
OPS = {
    "conv_bn_relu": cases("conv_bn_relu"),
    "conv_bn_add_relu": cases("conv_bn_add_relu", 1, "given"),
    "conv_bn_folded": st.one_of(cases("conv_bn_folded"), cases("conv_bn_folded", 1, "given")),
    "residual_block": st.one_of(*(cases("residual_block", *block) for block in BLOCKS)),
}


@pytest.fixture
def check(monkeypatch):
    """Judge a case on the Triton steps with its own tiles and routes."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def judge_case(case: Case):
        monkeypatch.setattr(chain_triton, "conv_config", case.config)
        return judge(case)

    return judge_case


@pytest.mark.parametrize("op", OPS)
def test_sample(op, check):
    @settings(
        max_examples=SAMPLE,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(OPS[op])
    def run(case):
        assert check(case).refused() == []

    run()


def test_a_mask_that_rounding_flips_is_no_fault(check):
    """Found by a long run: in one draw a pre-activation is 0 within the rounding of fp16."""
    case = Case(
        op="conv_bn_add_relu",
        size=(6, 1, 2, 36),
        layers=(LayerSize(k=6, c=1, r=1, stride=2),),
        shortcut="given",
        projection=None,
        relu=True,
        dtype=torch.float16,
        gaps=(0, 2),
        tile=(16, 16, 32, 2),
        cudnn=frozenset(),
        zero_gamma=False,
        need_dx=True,
    )
    referee = check(case)
    assert referee.refused() == []
    assert referee.num_draws > 1


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_many(op, check, record_property):
    seed = time.time_ns() % 2**32
    print(f"{op}: seed {seed}")
    count = {"cases": 0, "draws": 0, "redrawn": 0}
    refused: list[tuple[Case, list[str]]] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(OPS[op])
    def run(case):
        referee = check(case)
        count["cases"] += 1
        count["draws"] += referee.num_draws
        count["redrawn"] += referee.num_draws > 1
        if referee.refused():
            refused.append((case, referee.refused()))
            print(case, referee.refused(), flush=True)

    run()
    record_property("op", op)
    record_property("seed", seed)
    record_property("refused", len(refused))
    for name, value in count.items():
        record_property(name, value)
    assert refused == []
