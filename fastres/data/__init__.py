"""Datasets and the loaders that serve them.

Read `dataset.py` first: `ImageSet` and `Dataset`, what every reader returns. `source.py` finds a
dataset: it asks `readers/`, `download.py`, `cache.py`, or draws the images of `synthetic.py`.
`files.py` opens data files. `plan.py` decides order and augmentation of an epoch;
`augmentation.py` applies it, `trivial_augment.py` its random operations. `loaders/` serve the
batches.
"""
