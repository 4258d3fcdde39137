"""Studies: what is measured on a network, and a whole study of depth at the smallest size."""
