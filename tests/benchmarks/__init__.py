"""The measurements: what they time is checked first, and no number stands without its row."""
