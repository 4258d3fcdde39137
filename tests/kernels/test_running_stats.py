"""The kernel of running statistics against torch's foreach calls, bit for bit; what it refuses."""

import pytest
import torch

from fastres.kernels.gpu import running_stats
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.running_stats import MAX_BLOCK, move_running_stats
from tests.helpers.interpreter import DEVICE, fused_multiply_add, strict_memory  # noqa: F401

pytestmark = pytest.mark.usefixtures("strict_memory", "fused_multiply_add")

BF16, FP16, FP64, INT64 = torch.bfloat16, torch.float16, torch.float64, torch.int64

# One number, tails, more than one program.
SIZES = [16, 1, 7, 64, MAX_BLOCK + 3]


def normals(seed, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(k, generator=generator)).to(DEVICE, dtype) for k in SIZES]


def zeros(number):
    return [torch.zeros((), dtype=INT64, device=DEVICE) for _ in range(number)]


def moved_by_torch(averages, values, momentum):
    """The averages after torch's call, each a part of a vector of whole words.

    On a CPU torch rounds a multiply-add once, as GPUs do, but in a tail twice.
    """

    def padded(t):
        return torch.nn.functional.pad(t, (0, -len(t) % 64))

    whole = [padded(t) for t in averages]
    seen = [padded(v.to(t.dtype)) for v, t in zip(values, averages, strict=True)]
    torch._foreach_lerp_(whole, seen, momentum)
    return [t[: len(average)] for t, average in zip(whole, averages, strict=True)]


def assert_equal(tensors, wanted):
    for t, other in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(t, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
@pytest.mark.parametrize("momentum", [0, 0.1, 0.499, 0.5, 0.9, 1, -0.7, 1.7])
def test_averages_move_as_torch_moves_them(momentum, dtype):
    averages, values, counts = normals(0, dtype), normals(1), zeros(len(SIZES))
    wanted = moved_by_torch(averages, values, momentum)
    with recording() as launches:
        assert move_running_stats(averages, values, counts, momentum)
    assert [launch.name for launch in launches] == ["running_stats_kernel"]
    assert_equal(averages, wanted)
    assert [int(count) for count in counts] == [1] * len(SIZES)


def test_nan_and_inf_come_through():
    averages, values = normals(0), normals(1)
    averages[0][:3] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    values[0][2:5] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    for momentum in (0.0, 0.1, 1.0):
        wanted = moved_by_torch(averages, values, momentum)
        assert wanted[0].isnan().any()
        assert move_running_stats(averages, values, [], momentum)
        assert_equal(averages, wanted)


@pytest.mark.parametrize("number", [0, 2, len(SIZES)])
def test_there_may_be_fewer_counts_and_more_averages_than_a_launch_takes(number, monkeypatch):
    monkeypatch.setattr(running_stats, "MAX_AVERAGES", 2)
    averages, values, counts = normals(0), normals(1), zeros(number)
    wanted = moved_by_torch(averages, values, 0.1)
    with recording() as launches:
        assert move_running_stats(averages, values, counts, 0.1)
    assert [launch.grid for launch in launches] == [(2, 1), (2, 1), (1, 2)]
    assert_equal(averages, wanted)
    assert [int(count) for count in counts] == [1] * number
    # Each number once: 4 bytes of average and of value read, 4 written; 8 and 8 of a count.
    assert sum(launch.traffic.bytes for launch in launches) == 12 * sum(SIZES) + 16 * number


def test_nothing_else_is_written():
    """Every vector and every count a piece of a larger one, off 16 bytes too."""
    wide = torch.full((64,), 7.0, device=DEVICE)
    count = torch.full((3,), 7, device=DEVICE)
    averages = [wide[8:15], wide[21:32]]
    values = [torch.zeros(7, device=DEVICE), torch.zeros(11, device=DEVICE)]
    assert move_running_stats(averages, values, [count[1]], 0.5)
    assert all((t == 3.5).all() for t in averages)
    for rest in (wide[:8], wide[15:21], wide[32:]):
        assert (rest == 7).all()
    assert count.tolist() == [7, 8, 7]


def of_class(t):
    class Subclass(torch.Tensor):
        pass

    return t.as_subclass(Subclass)


REFUSED = {
    "fp64": lambda a, v, c: (normals(0, FP64), v, c),
    "two dtypes": lambda a, v, c: ([*a[:-1], a[-1].bfloat16()], v, c),
    "values in bf16": lambda a, v, c: (a, [t.bfloat16() for t in v], c),
    "counts in fp32": lambda a, v, c: (a, v, [*c[:-1], torch.zeros((), device=DEVICE)]),
    "another size": lambda a, v, c: (a, [*v[:-1], v[0]], c),
    "more counts": lambda a, v, c: (a, v, [*c, *zeros(1)]),
    "one twice": lambda a, v, c: ([*a, a[0]], [*v, v[0]], c),
    "overlapping": lambda a, v, c: ([a[-1][:16], a[-1][15:22]], [v[0], v[2]], c[:2]),
    "a count twice": lambda a, v, c: (a, v, [*c[:-1], c[0]]),
    "strided": lambda a, v, c: ([a[-1][::2]], [v[-1][::2].contiguous()], c[:1]),
    "a subclass": lambda a, v, c: ([of_class(a[0]), *a[1:]], v, c),
    "two devices": lambda a, v, c: (a, [*v[:-1], v[-1].to("meta")], c),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_take_stays_as_it_is(case):
    averages, values, counts = REFUSED[case](normals(0), normals(1), zeros(len(SIZES)))
    before = [t.clone() for t in averages]
    with recording() as launches:
        assert not move_running_stats(averages, values, counts, 0.1)
    assert launches == []
    assert_equal(averages, before)
