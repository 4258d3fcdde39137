"""Many runs: every setting from every seed, as many at once as the machine is faster with.

plan.py      which runs: options given as lists, times seeds
folder.py    the sweep's folder, which says at every moment what has been done
job.py       one run as a process, which child.py is
local.py     the queue of this machine, and how many runs at once are measured to be the fastest
trial.py     what it starts to measure that
cluster.py   the same runs through submitit: Slurm, or processes of this machine
search.py    settings proposed by Optuna
results.py   a row a setting: mean, sd, n, interval; which differences are larger than the seeds'
runner.py    all of it, from the plan to the table
"""
