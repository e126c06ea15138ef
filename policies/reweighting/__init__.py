"""Sample weights, one file per family."""
