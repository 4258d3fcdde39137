"""The reference network and what describes it."""
