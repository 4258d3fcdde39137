"""What tests share: where kernels run, tolerances, seeded inputs, networks, fake datasets.

Read numerics.py first: every tolerance comes from its error bounds. interpreter.py says where the
kernels run; kernel_cases.py, head_cases.py, cpu_cases.py and property_cases.py draw their inputs;
community_nets.py builds the networks that others wrote, net_steps.py trains them, recorded_ops.py
tells what ran fused; kernel_forms.py launches every kernel; ptx.py executes their inline assembly;
compiling.py compiles. data_fixtures.py writes small datasets; stop_one_process.py is a script that
a test starts.
"""
