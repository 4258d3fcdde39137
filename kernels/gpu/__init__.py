"""Triton kernels for NVIDIA GPUs, and what launches them.

Read backend.py first: the steps of a fused block. Then conv_fprop.py, conv_dgrad.py, conv_wgrad.py:
what each product is given, and the im2col form of it. Other forms of the same: conv_tma.py by TMA,
conv_strip.py and conv_strip_wgrad.py in strips (strips.py), conv_pixel.py in pixels of patches
(patches.py), conv_backward.py with both gradients in one launch. prologue.py and epilogue.py are
their common beginnings and ends, batchnorm_fwd.py and batchnorm_bwd.py what has passes of its own.
sgd.py, running_stats.py and totals.py are the rest of a training step.
pool_linear.py, cross_entropy.py and augment.py stand alone. primitives.py holds the jit helpers,
last_program.py those by which the last program of a kernel merges what all left in parts
(counters.py finds it), checks.py those of the launchers. launch.py starts and records every kernel;
its tiles are a launch_config.py, which launch_table.py looks up: in the table (table_file.py) where
it was measured or estimated, else by launch_rules.py.
"""
