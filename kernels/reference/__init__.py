"""The fused ops in plain torch: what they mean, and how far a kernel may be from it.

Read block.py first: one function a formula. backend.py makes the steps of a fused block of them,
for machines without kernels and for float64. head.py has head and loss. In fp64 all of these are
the truth that tests compare with; error_bound.py says how near a result must be.
"""
