"""Statistics of a convolution whose outputs lie far from 0 and close together, in every form."""

from dataclasses import replace

import pytest
import torch

from fastres.kernels.gpu.launch import recording
from tests.helpers.interpreter import DEVICE, strict_memory  # noqa: F401
from tests.helpers.kernel_cases import make_tensors
from tests.helpers.kernel_forms import FORMS
from tests.helpers.numerics import assert_keeps_small_spread

pytestmark = pytest.mark.usefixtures("strict_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("name", "dtype", "spread"),
    [
        ("strip fprop", FP16, 1.0),
        ("strip fprop", BF16, 8.0),
        ("pixel fprop", FP16, 1.0),
        ("pixel fprop", BF16, 8.0),
        ("im2col fprop", FP16, 1.0),
        # What half precision stores beside 1000 is so coarse that its sums are exact.
        ("im2col fprop", FP32, 1e-3),
    ],
)
def test_a_small_spread_beside_a_large_mean_is_kept(name, dtype, spread):
    form = FORMS[name]
    # Strips merge the tiles of a program themselves.
    config = replace(form.config, grid_size=1) if form.config.grid_size else form.config
    t = make_tensors(form.shape, dtype)
    # The filters pass the pixels on as they are, and so does the prologue.
    t.x.copy_(1000 + spread * t.x.float())
    t.w.zero_()[range(16), range(16), 1, 1] = 1
    ab = torch.stack([torch.ones(16), torch.zeros(16)]).to(DEVICE)
    with recording() as launches:
        y, stats = form.run(t._replace(scale_shift=ab), form.shape, config)
    assert launches[0].name == form.kernel
    torch.testing.assert_close(y, t.x, rtol=0, atol=0)
    rows = y.double().permute(0, 2, 3, 1).reshape(-1, 16)
    var = stats[1].double() * (len(rows) - 1) / len(rows)
    # At most four tiles are merged, by programs or by the last of them.
    assert_keeps_small_spread(stats[0], var, rows, num_merges=4)
