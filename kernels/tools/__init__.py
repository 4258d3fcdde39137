"""Two commands around the Triton kernels; nothing here runs in training.

tune.py measures this GPU and writes its launch table: tuner.py chooses, tune_workloads.py says what
is measured, candidates.py what is tried, compile_ahead.py compiles it, graph_timer.py takes the
time. codegen.py reports what the kernels compile to, for GPUs that need not be here:
codegen_report.py plans and checks, machine_code.py compiles and counts, describe.py names. Both
learn from networks.py which convolutions the real networks have.
"""
