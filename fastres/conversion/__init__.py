"""Weights of other projects' ResNets, and the way back.

sources.py     what each project calls its parameters, how it normalises, which graph it means
files.py       state_dicts out of whatever a project saves, and back into it
converter.py   from a state_dict to a network of fastres, and back
"""
