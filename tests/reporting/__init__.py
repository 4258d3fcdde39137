"""Tests of fastres.reporting."""
