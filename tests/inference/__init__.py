"""Tests of fastres.inference."""
