"""Tests of fastres.conversion."""
