"""The training program, from one step to the command.

test_step.py: one step, its losses and gradients; test_checkpoint.py: what a run writes and how it
resumes; test_recipes.py and test_commands.py: options and where their values come from;
test_run_corners.py: odd options and folders; test_distributed.py: several processes; test_train.py:
whole trainings.
"""
