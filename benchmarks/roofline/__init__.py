"""How close a training step comes to what the machine can do: `python -m benchmarks.roofline`.

command.py is the command. measure.py takes the step and the machine's peak rates (peak_rates.py) in
turns and sets them beside the bytes and operations of the step (step_traffic.py); view.py shows
them. memory_traffic.py counts the tensor passes of a fused block, launch by launch; profile_step.py
says where a step's time goes, by category; kernel_table.py kernel by kernel, beside estimates.
"""
