"""The training step, its loop, checkpoints and records."""
