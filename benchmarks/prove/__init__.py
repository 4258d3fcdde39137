"""All evidence in one command: `python -m benchmarks.prove`.

proof.py runs the steps of parts.py inside a budget, each as a process of its own; environment.py
says what the machine is and lacks. compare.py measures this tree against another revision, check.py
against the recorded rows. step_parity.py and loss_curves.py ask whether the fast step is right: bit
for bit against itself, and by what it learns against plain torch.
"""
