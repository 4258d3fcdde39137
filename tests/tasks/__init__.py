"""Tests of commands that stand alone: doctor, and the Python API behind the commands."""
