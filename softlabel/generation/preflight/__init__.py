"""Checks before a run: label a sample, diagnose the teachers, estimate time and bytes, refuse runs that must fail."""
