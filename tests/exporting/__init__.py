"""Tests of fastres.exporting."""
