"""The kernels: against the reference in fp64, and what they compile to.

test_reference.py shows that the reference is right, test_block.py that every step of a fused block
is, test_ops.py that the registered ops are, test_properties.py on drawn shapes. The others take one
kernel or tool each.
"""
