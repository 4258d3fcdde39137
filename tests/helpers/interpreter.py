"""Where kernel tests run: on the GPU if there is one, else on CPU tensors in Triton's interpreter.

Triton chooses when it is imported and torch does not import it, so conftest.py imports this module
before anything else. A subprocess that compiles kernels is started with TRITON_INTERPRET=0.
"""

import dataclasses
import importlib.util
import inspect
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The baseline in float32 must not round to TF32 behind its back; tests of TF32 turn it on.
torch.backends.cudnn.allow_tf32 = False
# What is compared bit for bit may contain convolutions of cuDNN, some of which add in any order.
torch.backends.cudnn.deterministic = True


def _replace_language_once():
    """Make Triton's interpreter replace the functions of its language once, not in every call.

    It looks through whole modules whenever one device function calls another, a quarter of a
    test's time, and finds something to replace in the first call alone.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        modules = [value for value in self.fn.__globals__.values() if inspect.ismodule(value)]
        if any(m in (tl, tl.core) and tl.core.is_builtin(m.load) for m in modules):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _leave_out_unread_checks():
    """Make Triton's interpreter look for no overflow of integers where it would not report one.

    It repeats every sum and product of them in 64 bits, half of a test's time, for an assertion
    that exists in debug mode alone.
    """
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    if not options.debug:
        interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


if not HAS_GPU and importlib.util.find_spec("triton"):
    _replace_language_once()
    _leave_out_unread_checks()


def needs_gpu(test):
    """Mark a test `gpu` and skip it, with its reason, on machines without one."""
    skip = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
    return pytest.mark.gpu(skip(test))


@pytest.fixture
def strict_memory(monkeypatch):
    """Fill every torch.empty with NaN, so that an element which no kernel writes shows.

    Eager convolutions, the baseline in fp32, must not round to TF32 behind its back.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(was_on)


@pytest.fixture
def fused_multiply_add(monkeypatch):
    """Have the interpreter round `tl.fma` once, as hardware does; by itself it rounds twice."""
    if HAS_GPU:
        return
    import numpy as np
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        # Products of fp32 are exact in it, and sums as good as: 64 bits of mantissa or more.
        with np.errstate(invalid="ignore"):
            exact = x.data.astype(np.longdouble) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
