"""`python -m softlabel` is `softlabel`."""

import sys

from softlabel.cli import main

if __name__ == "__main__":
    sys.exit(main())
