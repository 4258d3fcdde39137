"""Datasets and the loaders that serve them.

Read `dataset.py` first: `ImageSet` and `Dataset`, what every reader returns. `source.py` finds a
dataset: it asks `readers/`, `download.py`, `cache.py`, or draws the images of `synthetic.py`.
`files.py` opens data files. `plan.py` decides order, crops, flips and cutout of an epoch;
`augmentation.py` applies them. `loaders/` serve the batches.
"""
