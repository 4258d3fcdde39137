"""All evidence in one command: `python -m benchmarks.prove`.

proof.py runs the parts of a stage inside a budget, each as a process of its own (parts.py);
stages.py lists them: look, measure, confirm. environment.py says what the machine is and lacks,
choose_tests.py which tests it can run, sanitize.py runs kernels under compute-sanitizer.
step_parity.py and loss_curves.py ask whether the fast step is right: bit for bit against itself,
and by what it learns against plain torch. time_to_accuracy.py asks how long a recipe takes to be
how accurate, in turns with variants of it and with the best published one. seeds_at_once.py
asks how many small runs a GPU takes at once. compare.py measures this tree against another
revision, check.py against the recorded rows.
"""
