"""The training program: from options to a finished run.

Read trainer.py first: a whole run from top to bottom. step.py is one training step, eager, compiled
or as a CUDA graph, with optim.py and ema.py; evaluation.py counts the right answers. runtime.py
decides route, precision, layout and loader on this machine, distributed.py lets several processes
train one network. Around them: run_dir.py and checkpoint.py (files), state.py and summary.py (what
is recorded), console.py and curves.py (what is shown), divergence.py (what ends a run that holds a
NaN), signals.py, machine.py.
"""
