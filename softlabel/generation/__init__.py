"""Stage 1: teachers label a dataset, once."""
