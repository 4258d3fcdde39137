"""Running statistics of modules: moved in one launch where kernels run, else by torch's calls."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastres.kernels.dispatch import force_backend
from fastres.kernels.gpu.launch import recording
from fastres.kernels.ops import BatchStats
from fastres.kernels.reference import backend as reference_backend
from fastres.model.running_stats import batched_running_stats, update_running_stats
from tests.helpers.interpreter import DEVICE

WIDTHS = (4, 16, 8)


def layers(dtype=torch.float32, **options):
    norms = [nn.BatchNorm2d(width, **options).to(DEVICE, dtype) for width in WIDTHS]
    generator = torch.Generator().manual_seed(0)
    stats = [torch.rand((2, width), generator=generator).to(DEVICE) for width in WIDTHS]
    return norms, [BatchStats.of(of_layer) for of_layer in stats]


def buffers(norms):
    return [dict(bn.named_buffers()) for bn in norms]


def change_nothing(norms):
    pass


def forget_a_momentum(norms):
    norms[1].momentum = None


def give_another_momentum(norms):
    norms[1].momentum = 0.7


def drop_a_count(norms):
    norms[0].num_batches_tracked = None


def freeze_one(norms):
    norms[2].track_running_stats = False


def share_statistics(norms):
    norms.append(nn.BatchNorm2d(WIDTHS[0]).to(DEVICE))
    for name, value in norms[0].named_buffers():
        setattr(norms[-1], name, value)


def repeat_one(norms):
    norms.append(norms[0])


# How a list of norms is changed, and the launches that then move their statistics.
CHANGES = {
    change_nothing: 1,
    forget_a_momentum: 2,
    give_another_momentum: 3,
    drop_a_count: 1,
    freeze_one: 1,
    share_statistics: 4,
    repeat_one: 4,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_the_kernel_does_what_the_calls_of_torch_do(change, dtype):
    norms, stats = layers(dtype)
    change(norms)
    stats += [stats[0]] * (len(norms) - len(stats))
    others = copy.deepcopy(norms)
    with recording() as launches:
        update_running_stats(norms, stats)
    assert [launch.name for launch in launches] == ["running_stats_kernel"] * CHANGES[change]
    with force_backend(reference_backend), recording() as launches:
        update_running_stats(others, stats)
    assert launches == []
    rtol = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(buffers(norms), buffers(others), rtol=rtol, atol=1e-7)
    assert not torch.equal(norms[0].running_mean, torch.zeros_like(norms[0].running_mean))


def test_fp64_statistics_are_moved_by_torch():
    norms, stats = layers(torch.float64)
    with recording() as launches:
        update_running_stats(norms, stats)
    assert launches == []
    wanted = 0.1 * stats[0].mean.double()
    torch.testing.assert_close(norms[0].running_mean, wanted)


def test_all_that_a_step_has_seen_moves_in_one_launch():
    norms, stats = layers()
    with recording() as launches, batched_running_stats():
        for bn, of_layer in zip(norms, stats, strict=True):
            update_running_stats([bn], [of_layer])
        assert launches == []
        assert norms[0].num_batches_tracked == 0
    assert [launch.name for launch in launches] == ["running_stats_kernel"]
    assert all(bn.num_batches_tracked == 1 for bn in norms)


def test_autograd_knows_of_the_counts_alone():
    """As of torch's batch norm: an evaluation that awaits its backward has saved the others."""
    norms, stats = layers()
    before = [{k: b._version for k, b in of_norm.items()} for of_norm in buffers(norms)]
    update_running_stats(norms, stats)
    for old, new in zip(before, buffers(norms), strict=True):
        moved = {name for name, buffer in new.items() if buffer._version != old[name]}
        assert moved == {"num_batches_tracked"}


def test_a_traced_program_has_the_updates_in_it():
    """The statistics move when the program runs, not while it is made."""
    norms, stats = layers()

    def update(mean, var):
        update_running_stats(norms[:1], [BatchStats(mean, var)])
        return norms[0].running_mean + 0

    with recording() as launches:
        program = make_fx(update)(*stats[0])
    assert launches == []
    called = {str(node.target) for node in program.graph.nodes}
    assert "aten._foreach_lerp_.Scalar" in called
