"""Readers: from files on disk to a `Dataset`.

`cifar.py` reads CIFAR-10 and CIFAR-100: it takes files out of their archives with `archive.py` and
decodes the python version with `cifar_pickle.py`, which executes nothing. `folder.py` reads folders
of images and decodes each with `image.py`. `cifar.py` and `folder.py` offer `find_...`, which looks
without decoding, and a `read` that decodes and checks.
"""
