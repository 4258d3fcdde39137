"""Tests of fastres.data, a file for each module.

The readers run on small archives and folders from `tests/helpers/data_fixtures.py`; the loaders
are compared with Pillow and with each other. Real images are used where $FASTRES_TEST_DATA has
them.
"""
