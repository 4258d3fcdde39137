"""Four commands around the Triton kernels; nothing here runs in training.

parity.py says which kernel is right on this machine, which is wrong and which crashes, before
anything is measured: parity_plan.py puts the checks in order, parity_convs.py and parity_kernels.py
make them, parity_check.py runs them, error_check.py decides. tune.py measures this GPU and writes
its launch table: tuner.py chooses, tune_workloads.py says what is measured, candidates.py what is
tried, compile_ahead.py compiles it, graph_timer.py captures it and takes the time; tune_pdl.py
chooses the one switch for all kernels, by whole steps; table_writer.py writes. Without a GPU
estimate.py takes counts for times. codegen.py reports what the kernels compile
to, for GPUs that need not be here: codegen_report.py plans and checks, step_report.py adds up a
whole step, machine_code.py compiles under stand_in_driver.py and counts, control_flow.py counts
what a warp issues, peak_rates.py has the cards, describe.py names. warm.py fills Triton's cache,
for such GPUs too: warm_kernels.py plans and compiles, cache_keys.py has the launcher's own keys.
compile_pool.py has the processes of both, launchers.py builds what starts a kernel in Triton 3.6,
command_line.py has what the options of all share. They learn from networks.py which convolutions
the real networks have; seeded.py draws their tensors, network_launches.py and torch_launches.py
list what they launch.
"""
