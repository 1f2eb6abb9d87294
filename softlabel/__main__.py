"""`python -m softlabel` is `softlabel`."""

import sys

from softlabel.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
