"""Studies: many runs under one recipe, and what is measured on their networks beside accuracy.

degradation.py is the study of depth that `fastres study degradation` runs; it trains with the
Trainer of fastres/engine. probes.py measures gradients and responses on the plain network,
records.py says what one network leaves behind, folder.py keeps it, picture.py draws it.
"""
