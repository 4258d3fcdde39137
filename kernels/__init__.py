"""Fused convolution, batch norm, ReLU and shortcut, in training and inference; head and loss.

Read ops.py first: what torch sees. block.py is the residual block, autograd.py joins both, and
dispatch.py chooses a back end: reference/ in plain torch, gpu/ in Triton, cpu/ in C++.
conv_types.py, conv_shape.py and layout.py hold what these share, ops_head.py head and loss. tools/
has the tuner of the launch table and the report on compiled kernels.

Imported as `fastres.kernels` and under no other name: a top-level package called `kernels`
belongs to Hugging Face, and two copies of one module would register every operator twice.
"""

if __name__ != "fastres.kernels":
    raise ImportError(f"import this package as fastres.kernels, not as {__name__}")
