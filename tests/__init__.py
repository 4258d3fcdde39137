"""Tests, in the rooms of what they test; test_house.py holds the rules of the house itself.

conftest.py and helpers/ come first: where kernel tests run (interpreter.py), their tolerance
(numerics.py), their inputs (..._cases.py). Then kernels/, model/, data/, engine/ and benchmarks/.
"""
