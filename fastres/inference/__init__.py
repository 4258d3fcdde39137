"""Using a trained network. Read trained.py first: what is loaded, and from where.

hub_files.py    the folder that a network is shared as; runs.py, what finished runs say
images.py       image files to pixels, as in training, a batch at a time
prediction.py   what a network says of images
test_data.py    which labelled images fit a network; evaluating.py, one on the other
scores.py       accuracy with its interval, classes, calibration, the worst mistakes
tables.py       those as text and CSV; pictures.py, as PNGs
"""
