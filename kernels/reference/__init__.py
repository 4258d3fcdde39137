"""The same mathematics in plain torch."""
