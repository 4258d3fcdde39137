"""Tests of fastres.sweeps."""
