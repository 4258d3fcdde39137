"""Today's habit: training scripts as people write them, to measure fastres against.

Each file is a short script that reads from top to bottom; `common.py` holds what they have in
common, the data and the command line. They use the reference network and nothing else of fastres,
so that speed is compared and not networks. `community_nets.py` has networks that people write.
"""
