"""The training program, from one step (test_step.py) to the command (test_train.py)."""
