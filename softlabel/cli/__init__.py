"""Commands: parameters are options, docstrings are help, the result is the exit code.

Each imports its dependencies when it runs, so that `softlabel --help` is fast.
"""
