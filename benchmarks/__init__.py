"""Measurements of fastres and the evidence that they leave in results/; see README.md."""
