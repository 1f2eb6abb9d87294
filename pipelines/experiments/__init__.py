"""Experiments on what soft labels are worth: one page each, one command, resumable."""
