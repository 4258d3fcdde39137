"""What is measured: five suites of pytest-benchmark.

bench_model.py trains and evaluates whole networks: the ablation from the eager step to the fastest
one, single steps, curves; ablation_cases.py lists its cases, ablation_worker.py trains one
configuration in a process of its own. bench_networks.py trains and evaluates networks that are not
ours. bench_ops.py takes the fused ops one by one on the layers of op_cases.py, bench_loaders.py the
loaders, bench_train.py whole runs of the command. Each prepares its providers, checks their
results, and leaves the timing to harness/.
"""
