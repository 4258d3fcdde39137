"""Any network's convolutions, batch norms, ReLUs and sums, found in a graph and run fused.

Read operations.py first (what the nodes of a graph compute), then patterns.py (where they make a
layer or a block), with aliases.py (what may change in between) and layouts.py (who can tell NCHW
from channels_last). Two ways lead there and back:

    torch.compile(model, backend="fastres")   backend.py, functional.py; explain.py prints a table
    fastres.fuse(model)                       tracing.py (graphs of a module's forward), with
                                              traced_values.py, trace_refusals.py, norms.py;
                                              program.py, fused_module.py (what is run); fuse.py
"""
