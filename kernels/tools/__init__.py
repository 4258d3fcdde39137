"""Two commands around the Triton kernels; nothing here runs in training.

tune.py measures this GPU and writes its launch table: tuner.py chooses, tune_workloads.py says what
is measured, candidates.py what is tried, compile_ahead.py compiles it, graph_timer.py takes the
time; tune_pdl.py chooses the one switch for all kernels, by whole steps; table_writer.py writes.
Without a GPU estimate.py takes counts for times. codegen.py reports what
the kernels compile to, for GPUs that need not be here: codegen_report.py plans and checks,
step_report.py adds up a whole step, machine_code.py compiles under stand_in_driver.py and counts,
control_flow.py counts what a warp issues, peak_rates.py has the cards, describe.py names. Both
learn from networks.py which convolutions the real networks have, and from network_launches.py and
torch_launches.py what they launch.
"""
