"""Networks: the reference, and that a fused net computes the same in every mode.

test_resnet.py is about the reference; test_fuse.py, test_fuse_edges.py and test_fuse_changed.py
about fused nets; test_fused_nets.py about whole steps and trainings; test_any_network.py and
test_any_network_rounding.py about nets that others wrote, compiled too.
"""
