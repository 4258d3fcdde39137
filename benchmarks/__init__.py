"""Measurements of fastres and the evidence that they leave in results/."""
