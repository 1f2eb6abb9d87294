"""Stage 1: run the teachers over a dataset once and store their labels."""
