"""Triton kernels for NVIDIA GPUs, and what launches them.

Read backend.py first: the steps of a fused block. Then conv_fprop.py, conv_dgrad.py, conv_wgrad.py
(conv_tma.py: the same by TMA; conv_pixel.py: in patches of pixels; epilogue.py: their common ends)
and batchnorm_fwd.py, _bwd.py.
pool_linear.py, cross_entropy.py and augment.py stand alone. primitives.py holds the jit helpers,
last_program.py those by which the last program of a kernel merges what all left in parts
(counters.py finds it), checks.py those of the launchers; launch.py starts and records every kernel;
launch_config.py chooses its tiles, from the launch table where it was measured, else by rules.
"""
