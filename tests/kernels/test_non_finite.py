"""NaN and inf in the forms of patches: what becomes of one pixel's, exactly.

Whatever is not finite in eager is not finite here. What else is not finite is as strips.py and
conv_pixel.py say: the other pixel of an output's pair in a strip, and taps of a filter gradient
that meet an output beyond the border. The rest is right.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastres.kernels.conv_shape import ConvShape
from fastres.kernels.gpu.conv_backward import conv_gradients
from fastres.kernels.gpu.conv_dgrad import conv_dgrad
from fastres.kernels.gpu.conv_fprop import conv_fprop
from fastres.kernels.gpu.conv_wgrad import conv_wgrad
from fastres.kernels.gpu.launch import recording
from fastres.kernels.gpu.launch_config import ConvConfig
from tests.helpers.interpreter import strict_memory  # noqa: F401
from tests.helpers.kernel_cases import dgrad, fprop, make_tensors, wgrad
from tests.helpers.numerics import assert_like_eager

pytestmark = [
    pytest.mark.usefixtures("strict_memory"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

BF16 = torch.bfloat16
STRIP = ConvConfig(16, 16, 16, 4, 1, form="strip", patch_h=4, ahead=6, split_k=2)
PIXEL = ConvConfig(16, 16, 16, 4, 1, form="pixel", ahead=2, split_k=2)
FLAT = replace(PIXEL, patch_h=1, patch_w=8)
FUSED = replace(STRIP, form="fused", patch_h=2, split_k=1)

WHOLE, ODD, STEM = ConvShape(2, 8, 8, 16, 16), ConvShape(2, 5, 7, 16, 16), ConvShape(2, 5, 7, 3, 16)

# Shape, row and column of the pixel: inside, at the border, where patches hang over it.
PLACES = [(WHOLE, 4, 2), (WHOLE, 0, 7), (ODD, 2, 3), (ODD, 4, 6)]


def cases(*configs, stem):
    """Every configuration with every place, and strips with a stem."""
    found = [(config, *place) for config in configs for place in PLACES]
    return found + ([(STRIP, STEM, 4, 6)] if stem else [])


def poisoned(shape, poison, h, w, operand):
    """One number of x or of g, of the second image, is not finite."""
    t = make_tensors(shape, BF16)
    t = t._replace(scale_shift=torch.ones_like(t.scale_shift))
    (t.x if operand == "x" else t.dy.g)[1, 2, h, w] = poison
    return t


def both_of_a_pair(bad):
    """What is bad, and its neighbours among columns 0 and 1, 2 and 3, ..."""
    width = bad.shape[3]
    pairs = F.pad(bad, (0, width % 2)).unflatten(3, (-1, 2)).any(4)
    return pairs.repeat_interleave(2, dim=3)[..., :width]


def bad_taps(window, outputs, config):
    """Bad [outputs' channels, R, S, window's channels] of a filter gradient in patches.

    A tap is when it joins a bad window pixel with an output of any patch, there or beyond the
    border, or any window pixel with a bad output.
    """
    patch_w = 2 if config.form != "pixel" else config.patch_w
    over = [-size % p for size, p in zip(window.shape[2:], (config.patch_h, patch_w), strict=True)]
    rows, columns = (size + o for size, o in zip(window.shape[2:], over, strict=True))
    window = F.pad(window.any(0), (1, 1 + over[1], 1, 1 + over[0]))
    met = [[window[:, r : r + rows, s : s + columns] for s in range(3)] for r in range(3)]
    taps = torch.stack([torch.stack([tap.any(2).any(1) for tap in row]) for row in met])
    return taps | outputs.any(3).any(2).any(0)[:, None, None, None]


def check(name, found, eager, truth, expected):
    bad = ~found.isfinite()
    assert bad.equal(expected)
    assert_like_eager(name, found, eager, truth, keep=~bad & (eager + truth).isfinite())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(("config", "shape", "h", "w"), cases(STRIP, PIXEL, stem=True))
def test_fprop(config, shape, h, w, poison):
    t = poisoned(shape, poison, h, w, "x")
    options = {"scale_shift": t.scale_shift, "batch_norm": t.batch_norm, "config": config}
    with recording() as launches:
        y, stats = conv_fprop(t.x, t.w, padding=1, **options)
    assert config.form in launches[0].name
    eager = fprop(t, shape, True)
    bad = ~eager.isfinite()
    expected = both_of_a_pair(bad) if config.form == "strip" else bad
    check("y", y, eager, fprop(t.double(), shape, True), expected)
    assert not stats[:2].isfinite().any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(("config", "shape", "h", "w"), cases(STRIP, PIXEL, FUSED, stem=False))
def test_dgrad(config, shape, h, w, poison):
    t = poisoned(shape, poison, h, w, "g")
    if config is FUSED:
        dx, dw, _ = conv_gradients(t.dy, t.x, t.w, padding=1, config=config)
        eager, truth = (wgrad(v, shape, False, True) for v in (t, t.double()))
        taps = bad_taps(~t.dy.g.isfinite(), torch.zeros_like(t.x, dtype=torch.bool), config)
        # The window is that of dy, and its taps run the other way. Eager multiplies the padding of
        # x by it too: a tap that meets a bad dy with nothing of x is bad there, and finite here.
        check("dw", dw, eager, truth, taps.flip(1, 2).permute(3, 0, 1, 2))
    else:
        dx, _ = conv_dgrad(t.dy, t.w, (shape.H, shape.W), padding=1, config=config)
    eager = dgrad(t, shape, True, False)
    bad = ~eager.isfinite()
    expected = bad if config is PIXEL else both_of_a_pair(bad)
    check("dx", dx, eager, dgrad(t.double(), shape, True, False), expected)


@pytest.mark.parametrize("operand", ["x", "g"])
@pytest.mark.parametrize(("config", "shape", "h", "w"), cases(STRIP, PIXEL, FLAT, stem=True))
def test_wgrad(config, shape, h, w, operand):
    t = poisoned(shape, torch.inf, h, w, operand)
    options = {"scale_shift": t.scale_shift, "config": config}
    with recording() as launches:
        dw = conv_wgrad(t.x, t.dy, (3, 3), padding=1, **options)
    assert config.form in launches[0].name
    # Padding is multiplied by a bad dy, as in eager.
    expected = bad_taps(~t.x.isfinite(), ~t.dy.g.isfinite(), config).permute(0, 3, 1, 2)
    eager, truth = (wgrad(v, shape, True, True) for v in (t, t.double()))
    assert (expected >= ~eager.isfinite()).all()
    check("dw", dw, eager, truth, expected)
