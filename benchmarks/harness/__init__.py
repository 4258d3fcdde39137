"""How it is measured: budgets, turns, clocks, correctness, and the form of a result.

Read rows.py first (what a result is) and records.py (the JSON beside it). scheduler.py shares a
budget of seconds out among groups of providers, timing.py lets them take turns, worker_pool.py
gives each a process of its own. ablation.py builds a network in one configuration. error_bound.py
refuses a time for a wrong result, step_check.py for a wrong training step; launch_bytes.py counts
what a fused op moves; check_command.py has what commands that check a step share.
"""
