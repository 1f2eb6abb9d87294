"""The commands of the command line: parameters are options, docstrings are help, they return the exit code.

Each imports what it needs when it runs, so that `softlabel --help` answers at once.
"""
