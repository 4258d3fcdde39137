"""The kernel of SGD against torch.optim.SGD in fp64 and fp32; what it leaves alone; its launch."""

import pytest
import torch

from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.sgd import BLOCK, SGDTensors, SGDUpdate
from tests.helpers.interpreter import DEVICE, strict_memory  # noqa: F401
from tests.helpers.numerics import assert_like_eager

pytestmark = pytest.mark.usefixtures("strict_memory")

BF16, FP16 = torch.bfloat16, torch.float16

# Tails of every kind, and whole chunks; filters lie channels_last.
SIZES = [(), (1,), (7,), (BLOCK,), (BLOCK + 1,), (2 * BLOCK,), (16, 3, 3, 3), (8, 16, 1, 1)]
RATE_FACTORS = [1.0 if len(size) > 1 else 0.5 for size in SIZES]
DECAYS = [0.05 if len(size) > 1 else 0.0 for size in SIZES]


def normal(size, seed=0):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return values.contiguous(memory_format=torch.channels_last) if len(size) == 4 else values


class Run:
    """Parameters, buffers and copies of the sizes above, moved by the kernel."""

    def __init__(self, momentum=0.9, nesterov=True, dtype=BF16):
        self.momentum, self.nesterov = momentum, nesterov
        self.params = [normal(size, i) for i, size in enumerate(SIZES)]
        self.buffers = [torch.zeros_like(p) if momentum else None for p in self.params]
        has_copy = [dtype is not None and p.dim() == 4 for p in self.params]
        self.copies = [
            torch.zeros_like(p, dtype=dtype) if has else None
            for p, has in zip(self.params, has_copy, strict=True)
        ]
        self.rates = [torch.zeros((), device=DEVICE) for _ in SIZES]
        self.update = SGDUpdate(self.params)

    def step(self, grads, lr=0.1, **scaling):
        for rate, factor in zip(self.rates, RATE_FACTORS, strict=True):
            rate.fill_(factor * lr)
        columns = (self.params, grads, self.buffers, self.copies, self.rates, DECAYS)
        tensors = [SGDTensors(*row) for row in zip(*columns, strict=True)]
        options = {"momentum": self.momentum, "nesterov": self.nesterov}
        self.update(tensors, **options, **scaling)

    def state(self):
        tensors = [*self.params, *self.buffers, *self.copies]
        return [t.clone() for t in tensors if t is not None]


class TorchRun:
    """The same parameters, moved by torch."""

    def __init__(self, dtype, momentum=0.9, nesterov=True):
        self.params = [normal(size, i).to(dtype).requires_grad_() for i, size in enumerate(SIZES)]
        groups = [
            {"params": [p], "weight_decay": decay}
            for p, decay in zip(self.params, DECAYS, strict=True)
        ]
        self.rule = torch.optim.SGD(groups, lr=0.1, momentum=momentum, nesterov=nesterov)

    def step(self, grads, lr=0.1):
        rows = zip(self.rule.param_groups, self.params, grads, RATE_FACTORS, strict=True)
        for group, param, grad, factor in rows:
            group["lr"] = factor * lr
            param.grad = None if grad is None else grad.to(param.dtype)
        self.rule.step()

    @property
    def buffers(self):
        return [self.rule.state[p].get("momentum_buffer") for p in self.params]


def grads_of(step):
    return [normal(size, 100 * (step + 1) + i) for i, size in enumerate(SIZES)]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_steps_at_changing_rates(momentum, nesterov):
    """A parameter may have no gradient in a step; then neither it nor its buffer moves."""
    run = Run(momentum, nesterov)
    eager, truth = (TorchRun(d, momentum, nesterov) for d in (torch.float32, torch.float64))
    for step, lr in enumerate((0.1, 0.3, 0.02)):
        grads = grads_of(step)
        grads[4 + step] = None
        for each in (run, eager, truth):
            each.step(grads, lr)
    for i, size in enumerate(SIZES):
        assert_like_eager(str(size), run.params[i], eager.params[i], truth.params[i].detach())
        if momentum:
            assert_like_eager(f"buffer {size}", run.buffers[i], eager.buffers[i], truth.buffers[i])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_copies_are_the_new_parameters_rounded(dtype):
    run = Run(dtype=dtype)
    run.step(grads_of(0))
    for param, copy in zip(run.params, run.copies, strict=True):
        assert (copy is None) == (param.dim() != 4)
        if copy is not None:
            assert torch.equal(copy, param.to(dtype))


def test_a_parameter_without_gradient_stays():
    run = Run()
    before = run.state()
    run.step([None] * len(SIZES))
    assert all(map(torch.equal, before, run.state()))


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_loss_scaling(found):
    """Scaled gradients are divided; one that is not finite anywhere leaves everything alone."""
    scale, found_inf = torch.tensor(1024.0, device=DEVICE), torch.tensor(found, device=DEVICE)
    run, plain = Run(), Run()
    before = run.state()
    run.step([1024 * g for g in grads_of(0)], grad_scale=scale, found_inf=found_inf)
    plain.step(grads_of(0))
    wanted = before if found else plain.state()
    assert all(map(torch.equal, wanted, run.state()))


def test_gradients_of_another_layout_or_dtype():
    """They are brought into the memory order of their parameter, not read as if they had it."""
    run, plain = Run(), Run()
    odd = [g.contiguous(memory_format=torch.contiguous_format) for g in grads_of(0)]
    assert odd[6].stride() != run.params[6].stride()
    odd[4] = odd[4].to(BF16)
    wanted = grads_of(0)
    wanted[4] = wanted[4].to(BF16).float()
    run.step(odd)
    plain.step(wanted)
    assert all(map(torch.equal, plain.state(), run.state()))


def test_addresses_off_16_bytes():
    run, plain = Run(), Run()
    flat = torch.zeros(1 + SIZES[4][0], device=DEVICE)
    grads = grads_of(0)
    flat[1:] = grads[4]
    with recording() as launches:
        run.step([*grads[:4], flat[1:], *grads[5:]])
        plain.step(grads)
    assert [launch.args["ALIGNMENT"] for launch in launches] == [4, 16]
    assert all(map(torch.equal, plain.state(), run.state()))


def test_nothing_is_written_beyond_a_parameter():
    """Every tensor a piece of a larger one, whose other elements stay as they are."""
    size = BLOCK + 5
    wide = [torch.full((size + 8,), 7.0, device=DEVICE) for _ in range(3)]
    wide.append(torch.full((size + 8,), 7.0, device=DEVICE, dtype=BF16))
    p, g, buffer, copy = (t[:size] for t in wide)
    lr = torch.full((), 0.1, device=DEVICE)
    SGDUpdate([p])([SGDTensors(p, g, buffer, copy, lr, 0.0)], momentum=0.9, nesterov=True)
    for t in (wide[0], wide[2], wide[3]):
        assert (t[:size] != 7).all()
        assert (t[size:] == 7).all()


def test_nan_and_inf_come_through():
    """An infinite parameter that does not decay is multiplied by no zero."""
    run = Run()
    run.params[2][:3] = torch.tensor([torch.inf, 1.0, 1.0])
    grads = grads_of(0)
    grads[2][1:3] = torch.tensor([torch.nan, torch.inf])
    run.step(grads)
    moved = run.params[2]
    assert moved[0] == torch.inf
    assert moved[1].isnan()
    assert moved[2] == -torch.inf
    assert moved[3:].isfinite().all()


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="strides"):
        SGDUpdate([torch.zeros(4, 4, device=DEVICE)[:, :2]])
    with pytest.raises(ValueError, match="float32"):
        SGDUpdate([torch.zeros(4, device=DEVICE, dtype=BF16)])
    p, lr = normal((2, 8, 3, 3)), torch.zeros((), device=DEVICE)
    options = {"momentum": 0.9, "nesterov": True}
    update = SGDUpdate([p])
    nchw = torch.zeros(p.shape, device=DEVICE)
    with pytest.raises(ValueError, match="momentum_buffer"):
        update([SGDTensors(p, p, nchw, None, lr, 0.0)], **options)
    with pytest.raises(ValueError, match="copy"):
        update([SGDTensors(p, p, p, nchw.to(BF16), lr, 0.0)], **options)
    with pytest.raises(ValueError, match="sizes"):
        update([SGDTensors(normal((5,)), p, p, None, lr, 0.0)], **options)
    copies = [torch.zeros_like(p, dtype=dtype) for dtype in (BF16, FP16)]
    with pytest.raises(ValueError, match="one dtype"):
        SGDUpdate([p, p])([SGDTensors(p, p, p, copy, lr, 0.0) for copy in copies], **options)


def test_one_launch_on_meta_tensors():
    """Recorded with its bytes; addresses, which meta tensors lack, do not matter."""
    sizes = [(64, 32, 3, 3), (64,), (10, 64)]
    params = [torch.empty(size, device="meta") for size in sizes]
    copy = torch.empty(sizes[0], device="meta", dtype=BF16)
    lr = torch.empty((), device="meta")
    tensors = [SGDTensors(p, p, p, copy if p.dim() == 4 else None, lr, 0.0) for p in params]
    with recording() as launches:
        update = SGDUpdate(params)
        update(tensors, momentum=0.9, nesterov=True)
    (launch,) = launches
    assert launch.grid == (18 + 1 + 1,)
    elements = sum(p.numel() for p in params)
    assert launch.traffic.bytes == 20 * elements + 2 * copy.numel()
