"""Datasets, the augmentation plan and the loaders."""
